"""safe_get_full_optimizer_state fails between a plain load and the next step

At ZeRO stages 1 and 2, after `load_checkpoint` and before the next step,
`safe_get_full_optimizer_state(parameter, "exp_avg")` ends in `TypeError: argument of type
'NoneType' is not iterable`, although the moments were loaded.

Expected: the moment that was loaded. How: `_load_legacy_checkpoint` (runtime/zero/stage_1_and_2.py)
links the parameters anew, and the link to the optimizer's states is made lazily, in the next
`step`. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 42.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state

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
    config = {"zero_optimization": {"stage": 1}}
    engine_of(torch.nn.Linear(4, 3), folder, **config).save_checkpoint(folder, "saved")
    engine = engine_of(torch.nn.Linear(4, 3), folder, steps=0, **config)
    engine.load_checkpoint(folder)
    try:
        found = safe_get_full_optimizer_state(engine.module.weight, "exp_avg")
        print(f"gone: {found.numel()} elements")
    except TypeError as error:
        assert "is not iterable" in str(error) or "NoneType" in str(error), error
        sys.exit(print(f"there: TypeError: {error}") or 1)
