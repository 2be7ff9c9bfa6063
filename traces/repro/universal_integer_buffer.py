"""ds_to_universal writes integer buffers as float32

A model with an int64 buffer is saved at ZeRO stage 1. The universal form holds the buffer as if it
were a parameter without gradient, cast to float32: integers above 2^24 are no longer exact.

Expected: no file, or one in the buffer's own type. How: `main` (checkpoint/ds_to_universal.py)
writes every entry of `module` that has no `fp32.pt` yet as `tensor.float()`, meant for parameters
that never received a gradient; `buffer_names` of the same file, which tells the buffers, is not
read. Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 5.
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
    model.register_buffer("count", torch.tensor(2**24 + 1))
    engine_of(model, folder, zero_optimization={"stage": 1}).save_checkpoint(folder, "saved")
    to_universal(f"{folder}/saved")
    path = f"{folder}/saved_universal/zero/count/fp32.pt"
    found = torch.load(path)["param"] if os.path.exists(path) else None
wrong = found is not None and found.is_floating_point()
print(f"there: 16777217 is {int(found)}, {found.dtype}" if wrong else "gone: no rounded copy")
sys.exit(1 if wrong else 0)
