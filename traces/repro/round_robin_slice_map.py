"""ds_to_universal swaps parameters of a checkpoint made with round_robin_gradients

With `round_robin_gradients` at ZeRO stage 2 the universal form holds, under the name of one
parameter, elements of others, silently. In fp32, as here, every master must equal the saved weight.

Expected: `zero/NAME/fp32.pt` and both moments hold the elements of NAME. How:
`_create_param_mapping` (runtime/zero/stage_1_and_2.py) makes `param_slice_mappings` by
`bit16_groups`, the optimizer's order; the flat buffer, and `param_shapes`, follow
`round_robin_bit16_groups`. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 1.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from torch.multiprocessing import start_processes

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


def engine_of(model, folder, rank=0, world=1, steps=1, opt=None, **config):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", None, world, rank)
    opt = opt or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, **config}
    engine = deepspeed.initialize(model=model, optimizer=opt, config=config)[0]
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 4, dtype=next(model.parameters()).dtype)).sum())
        torch.no_grad()(engine.step)()  # for versions before 0.19 with a new torch
    return engine


def to_universal(source):
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", source, "--output_folder", f"{source}_universal", *flags]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def train(rank, folder):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    zero = {"stage": 2, "round_robin_gradients": True}
    engine_of(model, folder, rank, 2, zero_optimization=zero).save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    to_universal(f"{folder}/saved")
    model = torch.load(f"{folder}/saved/mp_rank_00_model_states.pt")["module"]
    path = f"{folder}/saved_universal/zero/%s/fp32.pt"
    wrong = [name for name in model if not torch.load(path % name)["param"].equal(model[name])]
print(f"there: other parameters' values in {wrong}" if wrong else "gone: every master is right")
sys.exit(1 if wrong else 0)
