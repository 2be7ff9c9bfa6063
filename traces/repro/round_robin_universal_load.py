"""An engine with round_robin_gradients loads a universal form into wrong places

A right universal form is loaded at ZeRO stage 2 on two ranks by an engine with
`round_robin_gradients`: parameters get elements of others, silently. Expected: the saved weights.
How: `_link_all_hp_params` (runtime/zero/stage_1_and_2.py) goes by `bit16_groups`, not by the round
robin order. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 39.
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
    saved, model = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in "12")
    engine = engine_of(saved, folder, rank, 2, zero_optimization={"stage": 2})
    engine.save_checkpoint(folder, "saved")
    rank or to_universal(f"{folder}/saved")
    torch.distributed.barrier()
    config = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    engine = engine_of(model, folder, rank, 2, 0, **config, checkpoint={"load_universal": True})
    engine.load_checkpoint(folder)
    pairs = zip(saved.state_dict().items(), model.parameters())
    torch.save([name for (name, value), p in pairs if not value.equal(p)], f"{folder}/{rank}")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    wrong = torch.load(f"{folder}/0")
print(f"there: wrong weights in {wrong}" if wrong else "gone: every weight is right")
sys.exit(1 if wrong else 0)
