"""ds_to_universal fails on a BF16_Optimizer group that has fewer elements than ranks

bf16 with `grad_accum_dtype` fp32 at ZeRO stage 1 selects `BF16_Optimizer`. With a group of one
element on four ranks ds_to_universal ends in `RuntimeError: narrow(): length must be non-negative.`
Expected: it is converted. How: runtime/bf16_optimizer.py records all padding of the group for the
last rank, more than the rank's partition holds, and `_strip_tensor_paddings`
(checkpoint/zero_checkpoint.py, as DeepSpeedCheckpoint uses it) cuts that off. Seen in DeepSpeed
0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 15.
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
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = engine_of(model, folder, rank, 4, 1, opt, zero_optimization={"stage": 1}, **config)
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 4, start_method="fork")
    try:
        to_universal(f"{folder}/saved")
        print("gone: it was converted")
    except RuntimeError as error:
        assert "length must be non-negative" in str(error), error
        sys.exit(print(f"there: {error}") or 1)
