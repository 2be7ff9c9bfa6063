"""ds_to_universal and zero_to_fp32 cannot read a checkpoint without ZeRO

A checkpoint at ZeRO stage 0 holds weights and optimizer in one file. ds_to_universal ends in
`FileNotFoundError: can't find *_optim_states.pt files`, so that a run cannot move from stage 0 to
another stage or number of ranks by the universal form.

Expected: a universal form, or an error that says that stage 0 is not supported. How: `main`
(checkpoint/ds_to_universal.py) asks for optimizer files by name before it looks at anything else.
Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 18.
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
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    engine = engine_of(model, folder, zero_optimization={"stage": 0})
    engine.save_checkpoint(folder, "saved")
    try:
        to_universal(f"{folder}/saved")
        print("gone: it was converted")
    except FileNotFoundError as error:
        assert "_optim_states.pt" in str(error), error
        sys.exit(print("there: FileNotFoundError: can't find *_optim_states.pt") or 1)
