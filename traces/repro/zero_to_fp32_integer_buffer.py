"""zero_to_fp32 casts integer buffers to float32

The state dict that zero_to_fp32 makes of a checkpoint holds an int64 buffer as float32: integers
above 2^24 are no longer exact.

Expected: buffers keep their type, unless they are floating. How: `parse_model_states`
(utils/zero_to_fp32.py) calls `.float()` on every buffer. Seen in DeepSpeed 0.18.9, 0.16.9 (torch
2.13.0, CPU).
Errata: row 6.
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
    model.register_buffer("count", torch.tensor(2**24 + 1))
    engine_of(model, folder, zero_optimization={"stage": 2}).save_checkpoint(folder, "saved")
    found = to_fp32(folder)["count"]
wrong = found.dtype != torch.int64
print(f"there: 16777217 is {int(found)}, {found.dtype}" if wrong else "gone: the buffer is int64")
sys.exit(1 if wrong else 0)
