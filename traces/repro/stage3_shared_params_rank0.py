"""At stage 3 only rank 0's file says which parameters share their weight

At ZeRO stage 3 every rank saves a model file. `shared_params` is filled in that of rank 0 and is
`{}` in all others: the files of one checkpoint disagree about the model.

Expected: the same in every file. How: `_get_shared_params` (runtime/engine.py) looks at the model
only where `dist.get_rank() == 0`, and every rank of stage 3 saves a file. Seen in DeepSpeed 0.19.8,
0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 23.
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
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    engine = engine_of(model, folder, rank, 2, steps=0, zero_optimization={"stage": 3})
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    path = f"{folder}/saved/zero_pp_rank_%d_mp_rank_00_model_states.pt"
    found = [torch.load(path % n)["shared_params"] for n in range(2)]
wrong = found[0] != found[1]
print(f"there: {found[0]} in rank 0's file, {found[1]} in rank 1's" if wrong else "gone: equal")
sys.exit(1 if wrong else 0)
