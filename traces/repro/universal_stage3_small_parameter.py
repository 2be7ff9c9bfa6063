"""ds_to_universal gives small parameters of stage 3 their padding

A parameter of one element at ZeRO stage 3 on three ranks comes out of ds_to_universal with two: the
padding of the last rank is taken for data.

Expected: one element. How: `extract_zero_shards_stage3` (checkpoint/ds_to_universal.py) takes the
absolute value of a number of elements that is negative where a rank holds padding alone. Seen in
DeepSpeed 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 45.
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
    engine = engine_of(torch.nn.Linear(4, 1), folder, rank, 3, 0, zero_optimization={"stage": 3})
    for value in engine.optimizer.fp32_partitioned_groups_flat:
        state = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
        engine.optimizer.optimizer.state[value] = {"step": torch.tensor(1.0), **state}
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 3, start_method="fork")
    to_universal(f"{folder}/saved")
    found = torch.load(f"{folder}/saved_universal/zero/bias/fp32.pt")
found = (found["param"] if isinstance(found, dict) else found).numel()
print(f"there: {found} elements of 1" if found != 1 else "gone: one element")
sys.exit(1 if found != 1 else 0)
