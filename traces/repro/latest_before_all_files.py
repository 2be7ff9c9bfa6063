"""`latest` names a checkpoint before all ranks have written their files

Rank 0 writes `latest` as soon as its own files are done. If the job ends while another rank still
writes, `latest` names a checkpoint that is not whole. Here rank 1 waits until `latest` is there,
and saves its file then.

Expected: `latest` is written after a barrier. How: `save_checkpoint` (runtime/engine.py) calls
`dist.barrier()` after it has written `latest`, not before. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9
(torch 2.13.0, CPU).
Errata: row 24.
"""
import os
import sys
import tempfile
import time
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
    engine = engine_of(torch.nn.Linear(4, 3), folder, rank, 2, zero_optimization={"stage": 1})
    save = engine.checkpoint_engine.save

    def save_late(state_dict, path):
        for _ in range(100 if "zero_pp_rank_1" in path else 0):
            time.sleep(0.1)
            if os.path.exists(f"{folder}/latest"):
                open(f"{folder}/early", "w").close()
                break
        return save(state_dict, path)

    engine.checkpoint_engine.save = save_late
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    wrong = os.path.exists(f"{folder}/early")
print("there: latest was written before rank 1's file" if wrong else "gone: latest came last")
sys.exit(1 if wrong else 0)
