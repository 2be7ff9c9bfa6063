"""zero_to_fp32 refuses checkpoints with tensor parallelism

Two layers cut by AutoTP over two ranks, ZeRO stage 1. zero_to_fp32, which the save copies beside
the checkpoint, ends in `ValueError: Expected 1 of '*_optim_states.pt' ... but found 2 files`.

Expected: whole weights, or no recovery script. How: `parse_optim_states` (utils/zero_to_fp32.py)
compares `partition_count` with the number of all files of all tensor-parallel ranks. Seen in
DeepSpeed 0.19.8, 0.18.9 (torch 2.13.0, CPU).
Errata: row 49.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as to_fp32
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


def train(rank, folder):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    specs = [{"patterns": ["0.weight$"], "partition_type": "column"},
             {"patterns": ["1.weight$"], "partition_type": "row"}]
    tp = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    engine = engine_of(model, folder, rank, 2, zero_optimization={"stage": 1}, tensor_parallel=tp)
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    if deepspeed.__version__ < "0.18.3":
        sys.exit(print("cannot be tried: AutoTP takes no partition_config") or 77)
    start_processes(train, (folder,), 2, start_method="fork")
    try:
        to_fp32(folder)
        print("gone: it was converted")
    except ValueError as error:
        assert "Expected 1 of '*_optim_states.pt'" in str(error), error
        sys.exit(print("there: ValueError: Expected 1 of '*_optim_states.pt' but found 2") or 1)
