"""zero_to_fp32 leaves frozen parameters out of a ZeRO stage 1 checkpoint

A model whose first bias does not train is saved at ZeRO stage 1. The state dict that zero_to_fp32
makes of it lacks that bias, and nothing is printed. At stage 2 it is there.

Expected: all parameters of the model. How: `_save_checkpoint` (runtime/engine.py) writes
`frozen_param_shapes` and `frozen_param_fragments` only where
`zero_optimization_partition_gradients()` is true, which excludes stage 1;
`_zero2_merge_frozen_params` (utils/zero_to_fp32.py) returns at once where there are none, although
the values lie in `module` of the same file. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0,
CPU).
Errata: row 3.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as to_fp32

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
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    engine_of(model, folder, zero_optimization={"stage": 1}).save_checkpoint(folder, "saved")
    found = to_fp32(folder)
missing = sorted(set(model.state_dict()) - set(found))
print(f"there: {missing} not in the fp32 form" if missing else "gone: all parameters are there")
sys.exit(1 if missing else 0)
