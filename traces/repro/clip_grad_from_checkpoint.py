"""At stages 1 and 2 a load replaces the configured gradient_clipping by the saved one

A run with `gradient_clipping` 0.5 at ZeRO stage 1 is loaded by one that is configured with 2.0,
which clips at 0.5 from then on, silently. At stages 0 and 3 the configured value stays. Since the
default became 1.0 in version 0.19 and was 0 before, a run's clipping depends on the version that
saved it.

Expected: the configured value, at every stage. How: `_load_global_state`
(runtime/zero/stage_1_and_2.py) sets `clip_grad` from the file. Seen in DeepSpeed 0.19.8, 0.18.9,
0.16.9 (torch 2.13.0, CPU).
Errata: row 44.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch

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


with tempfile.TemporaryDirectory() as folder:
    config = {"zero_optimization": {"stage": 1}}
    engine = engine_of(torch.nn.Linear(4, 3), folder, gradient_clipping=0.5, **config)
    engine.save_checkpoint(folder, "saved")
    engine = engine_of(torch.nn.Linear(4, 3), folder, steps=0, gradient_clipping=2.0, **config)
    engine.load_checkpoint(folder)
found = engine.optimizer.clip_grad
wrong = found != 2.0
print(f"there: configured 2.0, clips at {found}" if wrong else "gone: clips at 2.0")
sys.exit(1 if wrong else 0)
