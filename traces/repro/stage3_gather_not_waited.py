"""Stage 3 on gloo: gathered weights may be looked at before they have arrived

Several gathers are started at once and only the last is waited for; gloo ends them in any order. A
weight looked at right after `GatheredParameters` has begun is memory that nothing has written yet.
torch fills fresh memory with NaN here, to make it visible.

Expected: all gathers are waited for. How: `AllGatherCoalescedHandle.wait`
(runtime/zero/partition_parameters.py). Seen in DeepSpeed 0.18.9, 0.16.9 (torch 2.13.0, CPU); whether
it shows in one run is chance.
Errata: row 38.
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


def look(rank, folder):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 700),
                                torch.nn.Linear(700, 3000), torch.nn.Linear(3000, 1))
    engine = engine_of(model, folder, rank, 3, steps=0, zero_optimization={"stage": 3})
    unwritten = 0
    for _ in range(40):
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            unwritten += any(bool(p.isnan().any()) for p in engine.module.parameters())
    open(f"{folder}/{rank}", "w").write(str(unwritten))


with tempfile.TemporaryDirectory() as folder:
    start_processes(look, (folder,), 3, start_method="fork")
    wrong = sum(int(open(f"{folder}/{rank}").read()) for rank in range(3))
print(f"there: {wrong} of 120 looks" if wrong else "gone: not seen in 120 looks")
sys.exit(1 if wrong else 0)
