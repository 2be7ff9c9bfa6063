"""At stage 3 load_checkpoint(load_module_only=True) restores no weights

A checkpoint is saved at ZeRO stage 3. `load_checkpoint(load_module_only=True)` returns its path and
leaves every weight as the model was made.

Expected: the weights of the checkpoint. How: `_load_checkpoint` (runtime/engine.py) makes whole
weights of the shards only where `load_optimizer_states` is false; else `module` of a stage 3 file
holds empty tensors. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 35.
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
    engine = engine_of(torch.nn.Linear(4, 3), folder, zero_optimization={"stage": 3})
    engine.save_checkpoint(folder, "saved")
    engine = engine_of(torch.nn.Linear(4, 3), folder, steps=0, zero_optimization={"stage": 3})
    with deepspeed.zero.GatheredParameters(engine.module.weight):
        before = engine.module.weight.detach().clone()
    engine.load_checkpoint(folder, load_module_only=True)
    with deepspeed.zero.GatheredParameters(engine.module.weight):
        wrong = engine.module.weight.equal(before)
print("there: the weights are those of before the load" if wrong else "gone: weights were loaded")
sys.exit(1 if wrong else 0)
