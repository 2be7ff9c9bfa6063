"""The universal form of a stage 3 checkpoint cannot be loaded at stage 2

A checkpoint of ZeRO stage 3 is converted by ds_to_universal, which is to free it of its stage. An
engine at stage 2 ends in an AssertionError without words; nor is there another way between the
stages.

Expected: it is loaded, or refused by name. How: the names of the model files differ by stage, and
`zero/NAME/fp32.pt` of stage 3 holds a flat tensor where the loader of stages 1 and 2 wants `param`.
Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 21.
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
    engine = engine_of(torch.nn.Linear(4, 3), folder, zero_optimization={"stage": 3})
    engine.save_checkpoint(folder, "saved")
    to_universal(f"{folder}/saved")
    config = {"zero_optimization": {"stage": 2}, "checkpoint": {"load_universal": True}}
    engine = engine_of(torch.nn.Linear(4, 3), folder, steps=0, **config)
    try:
        engine.load_checkpoint(folder)
        print("gone: it was loaded")
    except AssertionError:
        assert "check_ckpt_list" in traceback.format_exc()
        sys.exit(print("there: AssertionError in check_ckpt_list: no model file found") or 1)
