"""Elastic checkpoints cannot be loaded at another number of ranks

`elastic_checkpoint` promises a load at another number of ranks. A checkpoint of one rank at ZeRO
stage 1 is refused on two: the check of the data-parallel size does not ask for the option.

Expected: it is loaded. How: `_load_zero_checkpoint` (runtime/engine.py) raises
`ZeRORuntimeException` wherever the sizes differ. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch
2.13.0, CPU).
Errata: row 20.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
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


def train(rank, folder, world):
    zero = {"stage": 1, "elastic_checkpoint": True}
    place = f"{folder}/{world}"
    engine = engine_of(torch.nn.Linear(4, 3), place, rank, world, 0, zero_optimization=zero)
    if world == 1:
        engine.save_checkpoint(folder, "saved")
    else:
        engine.load_checkpoint(folder)


with tempfile.TemporaryDirectory() as folder:
    for world in 1, 2:
        os.makedirs(f"{folder}/{world}")
        try:
            start_processes(train, (folder, world), world, start_method="fork")
        except torch.multiprocessing.ProcessRaisedException as error:
            assert "ZeRORuntimeException" in str(error) and world == 2, error
            sys.exit(print("there: ZeRORuntimeException: another DP world size") or 1)
print("gone: it was loaded")
