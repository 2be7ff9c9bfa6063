"""ds_to_universal writes rounded values under the second name of a tied weight

Two layers share one weight, and the model trains in bf16 at ZeRO stage 1. In the universal form the
first name holds the fp32 master, the second name the bf16 weight cast to fp32. A reader that takes
the second name loses the master's low bits.

Expected: the master under both names, or no second name. How: `main`
(checkpoint/ds_to_universal.py) writes every entry of `module` that has no `fp32.pt` yet as
`tensor.float()`, and does not look at `shared_params`, which names the alias. Seen in DeepSpeed
0.19.8 (torch 2.13.0, CPU).
Errata: row 4.
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
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    engine = engine_of(model, folder, zero_optimization={"stage": 1}, bf16={"enabled": True})
    engine.save_checkpoint(folder, "saved")
    to_universal(f"{folder}/saved")
    paths = [f"{folder}/saved_universal/zero/{n}.weight/fp32.pt" for n in range(2)]
    found = [torch.load(path)["param"] for path in paths
             if os.path.exists(path)]
wrong = len(found) == 2 and not torch.equal(*found)
print("there: the two names hold different values" if wrong else "gone: no rounded copy")
sys.exit(1 if wrong else 0)
