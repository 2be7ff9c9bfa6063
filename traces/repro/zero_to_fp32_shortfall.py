"""zero_to_fp32 at stages 1 and 2 accepts shapes that leave up to 2 x ranks elements unread

`param_shapes` of a stage 2 checkpoint is one element too short for the first bias: damage, or a
file of another run. zero_to_fp32 converts it without a word, and every later parameter is shifted
by one element.

Expected: an error. How: `_zero2_merge_trainable_params` (utils/zero_to_fp32.py) compares lengths
that it has rounded up to a multiple of 2 x ranks. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch
2.13.0, CPU).
Errata: row 11.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as to_fp32
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
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    engine = engine_of(model, folder, rank, 2, zero_optimization={"stage": 2})
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    path = f"{folder}/saved/mp_rank_00_model_states.pt"
    file = torch.load(path)
    file["param_shapes"][0]["0.bias"] = torch.Size([3])
    torch.save(file, path)
    try:
        found = to_fp32(folder)["1.weight"]
    except ValueError as error:
        sys.exit(print(f"gone: refused: {error}"))
wrong = not torch.equal(found, file["module"]["1.weight"])
print("there: 1.weight is wrong, silently" if wrong else "gone: 1.weight is right")
sys.exit(1 if wrong else 0)
