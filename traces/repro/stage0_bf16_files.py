"""Stage 0 in bf16 saves its optimizer in files that later versions neither write nor read

At ZeRO stage 0 with bf16 the optimizer is BF16_Optimizer, which saves one
`bf16_zero_pp_rank_*_optim_states.pt` a rank; at fp32 it lies in the model file. Later it lies there
for bf16 too, and an older version ends in `FileNotFoundError` on such a checkpoint, for it looks
for files of its own.

Expected: one form of a stage, or an error that names the version. How: `_configure_optimizer`
(runtime/engine.py) takes BF16_Optimizer for bf16 whose gradients are summed in fp32. Seen in
DeepSpeed 0.16.9 (torch 2.13.0, CPU); gone in 0.19.8 and 0.18.9.
Errata: row 43.
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
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).bfloat16()
    engine = engine_of(model, folder, zero_optimization={"stage": 0}, bf16={"enabled": True})
    engine.save_checkpoint(folder, "saved")
    files = sorted(os.listdir(f"{folder}/saved"))
wrong = any(name.startswith("bf16_zero_pp_rank_") for name in files)
print(("there: " if wrong else "gone: ") + ", ".join(files))
sys.exit(1 if wrong else 0)
