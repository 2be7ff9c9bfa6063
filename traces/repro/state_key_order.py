"""The order of keys in the optimizer's state differs between ranks after a universal load

After a load of a universal form at ZeRO stage 1 the states `exp_avg` and `exp_avg_sq` stand in an
order that depends on Python's hash seed, which every process draws for itself: the files that ranks
of one job save next differ in it, and two equal runs give files that differ. Expected: one order.
How: `load_hp_checkpoint_state_from_checkpoint_dir` (runtime/base_optimizer.py) collects the keys in
a set and walks it. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 28.
"""
import os
import subprocess
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


if len(sys.argv) > 1:
    folder, config = sys.argv[1], {"zero_optimization": {"stage": 1}}
    engine_of(torch.nn.Linear(4, 3), folder, **config).save_checkpoint(folder, "saved")
    to_universal(f"{folder}/saved")
    config["checkpoint"] = {"load_universal": True}
    engine = engine_of(torch.nn.Linear(4, 3), folder, steps=0, **config)
    engine.load_checkpoint(folder)
    sys.exit(print(*next(iter(engine.optimizer.optimizer.state.values()))))
found = set()
for seed in "123456":
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, __file__, folder]
        found.add(subprocess.check_output(command, env=env, text=True).split("\n")[-2])
    if len(found) > 1:
        break
print(f"there: {sorted(found)}" if len(found) > 1 else f"gone: {found}")
sys.exit(1 if len(found) > 1 else 0)
