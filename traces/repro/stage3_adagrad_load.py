"""At stage 3 an Adagrad checkpoint cannot be loaded again

A run with Adagrad at ZeRO stage 3 saves a checkpoint. An equal run that loads it ends in
`ValueError: loaded state dict contains a parameter group that doesn't match the size of optimizer's
group`.

Expected: it is loaded, as with Adam. How: for Adagrad `initialize_optimizer_states`
(runtime/zero/stage3.py) makes the optimizer anew over the fp32 partitions, while for the others the
parameter groups are left empty, and `load_state_dict` compares the two. Seen in DeepSpeed 0.19.8,
0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 41.
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


def start(folder, steps):
    model = torch.nn.Linear(4, 3)
    opt = torch.optim.Adagrad(model.parameters())
    return engine_of(model, folder, steps=steps, opt=opt, zero_optimization={"stage": 3})


with tempfile.TemporaryDirectory() as folder:
    start(folder, 1).save_checkpoint(folder, "saved")
    try:
        start(folder, 0).load_checkpoint(folder)
        print("gone: it was loaded")
    except ValueError as error:
        assert "match the size of optimizer's group" in str(error), error
        sys.exit(print(f"there: {error}") or 1)
