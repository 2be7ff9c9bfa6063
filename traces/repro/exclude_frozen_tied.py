"""save_checkpoint(exclude_frozen_parameters=True) keeps the second name of a tied frozen weight

A frozen weight has two names. Saved without frozen parameters, the checkpoint lacks the first name
and holds the whole weight under the second; `shared_params` says that the second is the first,
which is nowhere, and zero_to_fp32 gives neither name.

Expected: both names left out. How: `module_state_dict` (runtime/engine.py) removes the names that
`named_parameters()` lists, and it lists a shared parameter once. Seen in DeepSpeed 0.19.8, 0.18.9,
0.16.9 (torch 2.13.0, CPU).
Errata: row 46.
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
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    model[2].weight = model[1].weight
    model[1].weight.requires_grad_(False)
    engine = engine_of(model, folder, zero_optimization={"stage": 2})
    engine.save_checkpoint(folder, "saved", exclude_frozen_parameters=True)
    found = torch.load(f"{folder}/saved/mp_rank_00_model_states.pt")["module"]
kept = [name for name in ("1.weight", "2.weight") if name in found]
print(f"there: frozen weight kept as {kept}" if kept else "gone: both names left out")
sys.exit(1 if kept else 0)
