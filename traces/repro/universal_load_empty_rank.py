"""A universal load at stages 1 and 2 fails on a rank that owns no element of a group

Two optimizer groups, one of them a single element, at ZeRO stage 1: rank 1 of 2 owns nothing of it
and ends in `IndexError: list index out of range`. Expected: it is loaded. How:
`load_hp_checkpoint_state_from_checkpoint_dir` (runtime/base_optimizer.py) takes `steps[0]`. Seen in
DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 30.
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
    model = torch.nn.Linear(4, 1)
    opt = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    config = {"zero_optimization": {"stage": 1}, "checkpoint": {"load_universal": True}}
    engine = engine_of(model, folder, rank, 2, 1, opt, **config)
    engine.save_checkpoint(folder, "saved")
    rank or to_universal(f"{folder}/saved")
    torch.distributed.barrier()
    engine.load_checkpoint(folder)


with tempfile.TemporaryDirectory() as folder:
    try:
        start_processes(train, (folder,), 2, start_method="fork")
        print("gone: it was loaded")
    except torch.multiprocessing.ProcessRaisedException as error:
        assert "steps[0]" in str(error) and "IndexError" in str(error), error
        sys.exit(print("there: IndexError: list index out of range") or 1)
