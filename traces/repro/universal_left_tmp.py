"""ds_to_universal merges what an earlier run left in its temporary folder

A conversion of a checkpoint of two ranks was ended half-way; its fragments lie in OUTPUT/tmp. One
of one rank is converted into the same OUTPUT, and fails: the old fragments are joined to its own.

Expected: `tmp` is emptied first. How: `main` (checkpoint/ds_to_universal.py) uses OUTPUT/tmp as it
finds it. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
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


with tempfile.TemporaryDirectory() as folder:
    os.makedirs(f"{folder}/saved_universal/tmp/0.weight/0")
    for name in ("fp32", "exp_avg", "exp_avg_sq"):  # what the earlier run left
        torch.save(torch.zeros(6), f"{folder}/saved_universal/tmp/0.weight/0/{name}.01")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    engine_of(model, folder, zero_optimization={"stage": 1}).save_checkpoint(folder, "saved")
    try:
        to_universal(f"{folder}/saved")
    except RuntimeError as error:
        assert "invalid for input of size 18" in str(error), error
        sys.exit(print(f"there: old fragments were merged: {error}") or 1)
print("gone: old fragments were not merged")
