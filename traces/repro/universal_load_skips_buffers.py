"""A universal load restores neither buffers nor frozen parameters

An engine at ZeRO stage 1 that loads a universal form leaves buffers and frozen parameters as its
own model has them, silently. A plain load of the same checkpoint restores both.

Expected: what a plain load restores. How: `_load_checkpoint` (runtime/engine.py) does not call
`load_module_state_dict`; the optimizer restores only what it owns. Seen in DeepSpeed 0.19.8,
0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 29.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal

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


with tempfile.TemporaryDirectory() as folder:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model[0].bias.requires_grad_(False).fill_(7.0)
    model.register_buffer("running", torch.full((2,), 7.0))
    config = {"zero_optimization": {"stage": 1}, "checkpoint": {"load_universal": True}}
    engine = engine_of(model, folder, **config)
    engine.save_checkpoint(folder, "saved")
    to_universal(f"{folder}/saved")
    model[0].bias.fill_(1.0)
    model.running.fill_(1.0)
    engine.load_checkpoint(folder)
wrong = [name for name, value in engine.module.state_dict().items()
         if name in ("0.bias", "running") and value[0] != 7]
print(f"there: not restored: {wrong}" if wrong else "gone: both were restored")
sys.exit(1 if wrong else 0)
