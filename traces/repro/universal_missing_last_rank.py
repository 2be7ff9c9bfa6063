"""ds_to_universal does not notice up front that the highest rank's file is missing

A checkpoint of two ranks at ZeRO stage 1 lacks the optimizer file of rank 1. ds_to_universal takes
it for one of a single rank: it fails late, by a shape, and leaves its temporary files behind.

Expected: the missing file is named. How: `DeepSpeedCheckpoint` (checkpoint/deepspeed_checkpoint.py)
counts files. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 25.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
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


def to_universal(source):
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", source, "--output_folder", f"{source}_universal", *flags]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def train(rank, folder):
    engine = engine_of(torch.nn.Linear(4, 3), folder, rank, 2, zero_optimization={"stage": 1})
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    os.remove(f"{folder}/saved/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    try:
        to_universal(f"{folder}/saved")
    except FileNotFoundError as error:
        sys.exit(print(f"gone: refused: {error}"))
    except RuntimeError as error:
        assert "is invalid for input of size" in str(error), error
        sys.exit(print(f"there: not the missing file, but: {error}") or 1)
sys.exit(print("there: converted without a word") or 1)
