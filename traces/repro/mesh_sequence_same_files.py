"""With a mesh of sequence ranks several processes write the same checkpoint files at once

`mesh_param=(1, 2)` makes one data-parallel rank of two sequence ranks. Both processes save the same
files under the same names at the same time, and nothing in them tells the sequence degree.

Expected: one process writes a file. How: `save_checkpoint` (runtime/engine.py) decides by the rank
in the data-parallel group, which is 0 in each of them. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9
(torch 2.13.0, CPU).
Errata: row 26.
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


def train(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", None, 2, rank)
    deepspeed.init_distributed("gloo")
    model = torch.nn.Linear(4, 3)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    opt = torch.optim.AdamW(model.parameters())
    engine = deepspeed.initialize(None, model, opt, mesh_param=(1, 2), config=config)[0]
    save, paths = engine.checkpoint_engine.save, []

    def save_noted(state_dict, path):
        paths.append(os.path.basename(path))
        return save(state_dict, path)

    engine.checkpoint_engine.save = save_noted
    engine.save_checkpoint(folder, "saved")
    torch.save(paths, f"{folder}/paths{rank}")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    found = [set(torch.load(f"{folder}/paths{rank}")) for rank in range(2)]
both = sorted(found[0] & found[1])
print(f"there: two processes wrote {both}" if both else "gone: every file was written once")
sys.exit(1 if both else 0)
