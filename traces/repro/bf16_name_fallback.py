"""The fall-back between bf16 and other names of optimizer files never runs

Optimizer files are named `bf16_zero_...` or `zero_...` by the type of the engine. `load_checkpoint`
means to try the other name where the first is not there, and does not: an fp32 engine that loads a
bf16 checkpoint ends in `FileNotFoundError`, or goes on without optimizer states.

Expected: the warning and the load that the code describes. How: `_get_all_zero_checkpoints`
(runtime/engine.py) tries the second name where the first list of names is None, but
`_get_all_zero_checkpoint_names` returns names whether they exist or not. Seen in DeepSpeed 0.19.8,
0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 34.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch

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


with tempfile.TemporaryDirectory() as folder:
    config = {"zero_optimization": {"stage": 2}}
    engine = engine_of(torch.nn.Linear(4, 3), folder, bf16={"enabled": True}, **config)
    engine.save_checkpoint(folder, "saved")
    engine = engine_of(torch.nn.Linear(4, 3), folder, steps=0, **config)
    try:
        engine.load_checkpoint(folder)
    except FileNotFoundError as error:
        assert "/zero_pp_rank_0" in str(error), error
        sys.exit(print("there: FileNotFoundError: zero_pp_rank_0..., bf16_ is there") or 1)
wrong = not engine.optimizer.optimizer.state
print("there: no optimizer state was loaded" if wrong else "gone: the other name was read")
sys.exit(1 if wrong else 0)
