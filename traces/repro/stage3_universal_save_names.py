"""At stage 3 with load_universal every rank saves its model file under rank 0's name

With `checkpoint.load_universal` on, as after a universal load, ZeRO stage 3 saves the model files
of all ranks under one name, at once. The checkpoint lacks the others and cannot be loaded again.

Expected: one file a rank. How: `_get_ckpt_name` (runtime/engine.py) takes rank 0 for every rank
where `load_universal_checkpoint()`, also while saving. Seen in DeepSpeed 0.16.9 (torch 2.13.0,
CPU).
Errata: row 37.
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


def train(rank, folder):
    config = {"zero_optimization": {"stage": 3}, "checkpoint": {"load_universal": True}}
    engine = engine_of(torch.nn.Linear(4, 3), folder, rank, 2, steps=0, **config)
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    found = [name for name in os.listdir(f"{folder}/saved") if name.endswith("model_states.pt")]
print(f"there: two ranks saved {found}" if len(found) != 2 else "gone: a model file a rank")
sys.exit(1 if len(found) != 2 else 0)
