"""After a universal load at stage 3 all sub-groups share one step, which runs ahead

Two sub-groups at ZeRO stage 3, saved after one step. After a universal load and one more step
Adam's `step` is 3: both sub-groups hold one tensor, and each advances it. Later weights are wrong.
Expected: 2. How: `load_hp_checkpoint_state_from_checkpoint_dir_stage3` (runtime/zero/stage3.py).
Seen in DeepSpeed 0.19.8, 0.18.9 (torch 2.13.0, CPU).
Errata: row 40.
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


def start(folder, steps, **config):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    config["zero_optimization"] = {"stage": 3, "sub_group_size": 20}
    return engine_of(model, folder, steps=steps, **config)


with tempfile.TemporaryDirectory() as folder:
    if deepspeed.__version__ < "0.18":  # erratum 45
        sys.exit(print("cannot be tried: several sub-groups are not converted") or 77)
    start(folder, 1).save_checkpoint(folder, "saved")
    to_universal(f"{folder}/saved")
    engine = start(folder, 0, checkpoint={"load_universal": True})
    engine.load_checkpoint(folder)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
found = [int(state["step"]) for state in engine.optimizer.optimizer.state.values()]
wrong = len(found) > 1 and max(found) != 2
print(f"there: steps {found} after the second step" if wrong else "gone: steps are 2")
sys.exit(1 if wrong else 0)
