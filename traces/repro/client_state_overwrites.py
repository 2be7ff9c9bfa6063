"""save_checkpoint lets client_state overwrite DeepSpeed's own keys

`client_state` with a key that DeepSpeed uses itself, here `global_steps`, replaces its value in the
saved file. The run that loads the checkpoint goes on with the client's value as its own counter. A
key named `module` would replace the weights.

Expected: an error, as for `checkpoint_parallel_dims`, or a name space of its own. How:
`_save_checkpoint` (runtime/engine.py) ends in `state.update(client_state)`. Seen in DeepSpeed
0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 27.
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
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    engine = engine_of(model, folder, zero_optimization={"stage": 1})
    try:
        engine.save_checkpoint(folder, "saved", client_state={"global_steps": 1000})
    except KeyError as error:
        sys.exit(print(f"gone: refused: {error}"))
    engine.load_checkpoint(folder, "saved")
wrong = engine.global_steps != 1
print(f"there: after 1 step, step {engine.global_steps}" if wrong else "gone: the counter is 1")
sys.exit(1 if wrong else 0)
