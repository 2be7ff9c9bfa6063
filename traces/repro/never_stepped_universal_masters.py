"""ds_to_universal drops the fp32 masters of a checkpoint saved before the first step

A bf16 run at ZeRO stage 1 whose fp32 masters hold more bits than its weights, as after a load
without optimizer states, is saved before it makes a step. The universal form holds bf16 weights
cast to fp32 instead of the masters of the optimizer file (older versions stop).

Expected: the masters of the optimizer file. How: `extract_zero_shards`
(checkpoint/ds_to_universal.py) counts groups by the optimizer's `state`, still empty. Seen in
DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 8.
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
    config = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    engine = engine_of(torch.nn.Linear(4, 3, bias=False), folder, steps=0, **config)
    master = engine.optimizer.single_partition_of_fp32_groups[0]
    master.data.add_(2**-20)
    engine.save_checkpoint(folder, "saved")
    try:
        to_universal(f"{folder}/saved")
    except ValueError as error:
        assert "non-empty list" in str(error), error
        sys.exit(print(f"there: the converter stops: {error}") or 1)
    found = torch.load(f"{folder}/saved_universal/zero/weight/fp32.pt")
wrong = not torch.equal(found["param"].flatten(), master.flatten()[:12])
print("there: no masters, but bf16 weights cast up" if wrong else "gone: the masters are there")
sys.exit(1 if wrong else 0)
