"""The universal form of tensor-parallel ranks holds one rank's shard of a frozen weight

Two layers cut by AutoTP over two ranks, the first frozen, ZeRO stage 1. `zero/0.weight/fp32.pt`
holds two of the four rows, silently. Expected: the whole weight. How: `main`
(checkpoint/ds_to_universal.py) writes entries of `module` without a file from the first model file
that has them. Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 48.
"""
import os
import sys
import tempfile
import traceback
os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from torch.multiprocessing import start_processes

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


def train(rank, folder):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    model[0].requires_grad_(False)
    specs = [{"patterns": ["0.weight$"], "partition_type": "column"},
             {"patterns": ["1.weight$"], "partition_type": "row"}]
    tp = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    engine = engine_of(model, folder, rank, 2, zero_optimization={"stage": 1}, tensor_parallel=tp)
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    if deepspeed.__version__ < "0.18.3":
        sys.exit(print("cannot be tried: AutoTP takes no partition_config") or 77)
    start_processes(train, (folder,), 2, start_method="fork")
    to_universal(f"{folder}/saved")
    path = f"{folder}/saved_universal/zero/0.weight/fp32.pt"
    found = list(torch.load(path)["param"].shape) if os.path.exists(path) else [4, 4]
print(f"there: {found} of [4, 4]" if found != [4, 4] else "gone: whole, or not written")
sys.exit(1 if found != [4, 4] else 0)
