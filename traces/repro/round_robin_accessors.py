"""safe_get_full_fp32_param returns other parameters' values under round_robin_gradients

With `round_robin_gradients` at ZeRO stage 2, `safe_get_full_fp32_param` and
`safe_get_full_optimizer_state` of deepspeed.utils return elements of other parameters. In fp32 the
master of a parameter must equal the parameter, and does not.

Expected: the master of the parameter that was asked for, or an error. How: `_link_all_hp_params`
(runtime/zero/stage_1_and_2.py) links parameters to pieces of the rank's partition by
`bit16_groups`, the optimizer's order; the partition is filled in the order of
`round_robin_bit16_groups`. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 2.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
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


def train(rank, folder):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    zero = {"stage": 2, "round_robin_gradients": True}
    engine_of(model, folder, rank, 2, zero_optimization=zero)
    masters = {name: safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
    if rank == 0:
        torch.save([name for name, p in model.named_parameters()
                    if not torch.equal(p, masters[name])], f"{folder}/wrong")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    wrong = torch.load(f"{folder}/wrong")
print(f"there: wrong for {wrong}" if wrong else "gone: every master equals its weight")
sys.exit(1 if wrong else 0)
