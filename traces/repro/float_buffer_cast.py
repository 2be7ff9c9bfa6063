"""Floating buffers are cast to the model's type when the engine starts

With `bf16` enabled a float32 buffer of the model, such as a running mean, is bf16 as soon as
`deepspeed.initialize` returns; it is saved so, and zero_to_fp32 writes the rounded value as
float32: 257 comes out as 256.

Expected: buffers keep their type. How: `_configure_distributed_model` (runtime/engine.py) calls
`self.module.bfloat16()`, which casts buffers with the parameters. Seen in DeepSpeed 0.18.9, 0.16.9
(torch 2.13.0, CPU).
Errata: row 7.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as to_fp32

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
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model.register_buffer("running", torch.tensor([257.0]))
    engine = engine_of(model, folder, zero_optimization={"stage": 1}, bf16={"enabled": True})
    engine.save_checkpoint(folder, "saved")
    found = to_fp32(folder)["running"].item()
wrong = found != 257
print(f"there: 257 became {found}" if wrong else "gone: the buffer is 257")
sys.exit(1 if wrong else 0)
