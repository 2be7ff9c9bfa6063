"""At stage 3 load_checkpoint(tag, load_optimizer_states=False) loads the latest tag's weights

Two tags are saved at ZeRO stage 3. Asked for the first without optimizer states, `load_checkpoint`
returns its path and loads the weights of the second, the one that `latest` names.

Expected: the weights of the tag that was asked for. How: `_load_checkpoint` (runtime/engine.py)
calls `get_fp32_state_dict_from_zero_checkpoint(load_dir)` without the tag. Seen in DeepSpeed
0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 35.
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
    engine = engine_of(torch.nn.Linear(4, 3), folder, zero_optimization={"stage": 3})
    engine.save_checkpoint(folder, "first")
    with deepspeed.zero.GatheredParameters(engine.module.weight, modifier_rank=0):
        first = engine.module.weight.detach().clone()
    engine.optimizer.fp32_partitioned_groups_flat[0].data.add_(1)  # a step, in short
    engine.save_checkpoint(folder, "second")
    engine = engine_of(torch.nn.Linear(4, 3), folder, steps=0, zero_optimization={"stage": 3})
    with torch.no_grad():
        engine.load_checkpoint(folder, "first", load_optimizer_states=False)
    with deepspeed.zero.GatheredParameters(engine.module.weight):
        found = engine.module.weight.detach().clone()
wrong = found.allclose(first + 1) and not found.allclose(first)
print("there: the weights of the other tag" if wrong else "gone: the weights of the tag")
sys.exit(1 if wrong else 0)
