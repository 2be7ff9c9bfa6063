"""Every shard that zero_to_fp32 writes of stages 1 and 2 holds the whole parameter group

zero_to_fp32 with a `max_shard_size` cuts its output into several `.bin` files. Each of them is as
large as all parameters of the group together, so that the output of a model in N shards takes N
times its size on the disk.

Expected: a shard holds the bytes of its own tensors. How: `_zero2_merge_trainable_params`
(utils/zero_to_fp32.py) makes every tensor a view of the group's flat vector, `to_torch_tensor` does
not copy it (`.contiguous()` and `.to()` of the same type are no copies), and `torch.save` writes
the whole storage of a view. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 9.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert

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
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(1000)))
    engine = engine_of(model, folder, steps=0, zero_optimization={"stage": 2})
    engine.save_checkpoint(folder, "saved")
    convert(folder, f"{folder}/out", max_shard_size="20KB")
    sizes = [os.path.getsize(entry) for entry in os.scandir(f"{folder}/out")
             if entry.name.endswith(".bin")]
needed = sum(4 * p.numel() for p in model.parameters())
wrong = len(sizes) > 1 and min(sizes) > needed
print(f"there: {len(sizes)} shards, each above {needed} B" if wrong else "gone: shards are small")
sys.exit(1 if wrong else 0)
