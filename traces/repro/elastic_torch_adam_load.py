"""Elastic checkpoints cannot be loaded with torch's Adam

With `elastic_checkpoint` at ZeRO stage 1 and torch's AdamW, an engine cannot load what an equal one
has saved: it ends in an AssertionError without words. Version 0.16.9 cannot even save.

Expected: it is loaded. How: `_restore_step_from_elastic_checkpoint` (runtime/zero/stage_1_and_2.py)
wants a step that only optimizers with `step` in their parameter groups save; torch keeps it as a
tensor in the state, of which older versions try to cut off the padding. Seen in DeepSpeed 0.19.8,
0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 20.
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
    config = {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}
    engine = engine_of(torch.nn.Linear(4, 3), folder, **config)
    try:
        engine.save_checkpoint(folder, "saved")
        engine = engine_of(torch.nn.Linear(4, 3), folder, steps=0, **config)
        engine.load_checkpoint(folder)
        print("gone: it was loaded")
    except IndexError as error:
        assert "0-dim tensor" in str(error), error
        sys.exit(print(f"there: the save fails: IndexError: {error}") or 1)
    except AssertionError:
        assert "_restore_step_from_elastic_checkpoint" in traceback.format_exc()
        sys.exit(print("there: AssertionError in _restore_step_from_elastic_checkpoint") or 1)
