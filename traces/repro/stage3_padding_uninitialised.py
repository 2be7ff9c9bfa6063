"""Padding of stage 3's flat groups is never initialised and is saved

Where a parameter does not divide by the ranks, the last rank's `fp32_flat_groups` ends in elements
that nothing ever wrote: memory of the process goes into the file, and two equal runs give files
that differ. torch fills fresh memory with NaN here, to make it visible.

Expected: zeros. How: partitions are made by `torch.empty` in `_partition_param`
(runtime/zero/partition_parameters.py), only the part that the parameter covers is copied in, and
the fp32 copy of stage3.py clones all of it. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0,
CPU).
Errata: row 22.
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
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    engine = engine_of(model, folder, rank, 2, steps=0, zero_optimization={"stage": 3})
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    path = f"{folder}/saved/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file = torch.load(path)["optimizer_state_dict"]
found = torch.cat([group.flatten() for group in file["fp32_flat_groups"]])
wrong = int(found.isnan().sum())
print(f"there: {wrong} of {found.numel()} never written" if wrong else "gone: all were written")
sys.exit(1 if wrong else 0)
