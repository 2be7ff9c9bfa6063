"""Optimizer moments of a wrong length are loaded without a word

`exp_avg` in an optimizer file of ZeRO stage 2 is cut to half (damage, or a file of another run).
`load_checkpoint` takes it, and the engine goes on with it.

Expected: an error that names the file. How: `_load_legacy_checkpoint`
(runtime/zero/stage_1_and_2.py) hands the state to `load_state_dict` of the optimizer, which checks
numbers of groups and parameters but no shape. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch
2.13.0, CPU).
Errata: row 33.
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
    engine_of(torch.nn.Linear(4, 3, bias=False), folder, **config).save_checkpoint(folder, "saved")
    path = f"{folder}/saved/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file = torch.load(path)
    state = file["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["exp_avg"] = state["exp_avg"][:6].clone()
    torch.save(file, path)
    engine = engine_of(torch.nn.Linear(4, 3, bias=False), folder, steps=0, **config)
    try:
        engine.load_checkpoint(folder)
    except (RuntimeError, ValueError, AssertionError) as error:
        sys.exit(print(f"gone: refused: {error}"))
found = next(iter(engine.optimizer.optimizer.state.values()))["exp_avg"].numel()
print(f"there: 12 elements, {found} moments, silently")
sys.exit(1)
