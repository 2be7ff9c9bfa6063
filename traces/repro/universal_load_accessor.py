"""safe_get_full_fp32_param returns a moment after a universal load

At ZeRO stage 1 in fp32 the master of a parameter equals the parameter. After a load of the
universal form `safe_get_full_fp32_param` returns one of Adam's moments instead.

Expected: the master. How: `map_to_flat_opt_states` (utils/tensor_fragment.py) sets `hp_fragment` of
each parameter, which is its master, to the piece of the moment that it has just laid out. Seen in
DeepSpeed 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 32.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param

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
    config = {"zero_optimization": {"stage": 1}}
    engine_of(torch.nn.Linear(4, 3), folder, **config).save_checkpoint(folder, "saved")
    to_universal(f"{folder}/saved")
    model = torch.nn.Linear(4, 3)
    engine = engine_of(model, folder, steps=0, **config, checkpoint={"load_universal": True})
    engine.load_checkpoint(folder)
    found = safe_get_full_fp32_param(model.weight)
wrong = not model.weight.equal(found)
print("there: the accessor's master is not the weight" if wrong else "gone: it is the weight")
sys.exit(1 if wrong else 0)
