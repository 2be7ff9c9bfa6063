"""ds_to_universal fails on elastic checkpoints

With `elastic_checkpoint` at ZeRO stage 1 the optimizer's states are saved as a list.
ds_to_universal ends in `AttributeError: 'list' object has no attribute 'get'`.

Expected: it is converted, or refused by name. How: `_get_param_group_states`
(checkpoint/zero_checkpoint.py) and `extract_zero_shards` (checkpoint/ds_to_universal.py) know the
rigid form alone. Seen in DeepSpeed 0.19.8, 0.18.9 (torch 2.13.0, CPU).
Errata: row 20.
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
    zero = {"stage": 1, "elastic_checkpoint": True}
    engine = engine_of(torch.nn.Linear(4, 3), folder, zero_optimization=zero)
    try:
        engine.save_checkpoint(folder, "saved")
        to_universal(f"{folder}/saved")
        print("gone: it was converted")
    except IndexError as error:  # row 20 again, see elastic_torch_adam_load.py
        assert "0-dim tensor" in str(error), error
        sys.exit(print(f"cannot be tried: the save fails: {error}") or 77)
    except AttributeError as error:
        assert str(error) == "'list' object has no attribute 'get'", error
        sys.exit(print(f"there: AttributeError: {error}") or 1)
