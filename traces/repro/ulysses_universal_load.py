"""A universal load under Ulysses fails at stages 1 and 2

With `parallel_state_sp` as mpu at ZeRO stage 1 a load of a universal form, made from one rank here,
ends in `AttributeError: ... no attribute 'get_tensor_model_parallel_world_size'` (0.18.9: an
IndexError). Expected: it is loaded. How: `load_hp_checkpoint_state_from_checkpoint_dir`
(runtime/base_optimizer.py). Seen in DeepSpeed 0.19.8, 0.18.9 (torch 2.13.0, CPU).
Errata: row 36.
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


def to_universal(source):
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", source, "--output_folder", f"{source}_universal", *flags]
    ds_to_universal.main(ds_to_universal.parse_arguments())


try:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
except ImportError as error:
    sys.exit(print(f"cannot be tried: {error}") or 77)


def train(rank, folder, world):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", f"file://{folder}/{world}", None, world, rank)
    deepspeed.init_distributed("gloo")
    universal = {"zero_optimization": {"stage": 1}, "checkpoint": {"load_universal": True}}
    config, model = {"train_micro_batch_size_per_gpu": 1, **universal}, torch.nn.Linear(4, 3)
    opt, mpu = torch.optim.AdamW(model.parameters()), parallel_state_sp if world > 1 else None
    mpu and mpu.initialize_sequence_parallel(2)
    engine = deepspeed.initialize(None, model, opt, mpu=mpu, config=config)[0]
    if world > 1:
        return engine.load_checkpoint(folder)
    engine.backward(engine(torch.ones(1, 4)).sum())
    torch.no_grad()(engine.step)()
    engine.save_checkpoint(folder, "saved")
    to_universal(f"{folder}/saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder, 1), 1, start_method="fork")
    try:
        start_processes(train, (folder, 2), 2, start_method="fork")
        print("gone: it was loaded")
    except torch.multiprocessing.ProcessRaisedException as error:
        said = str(error).strip().splitlines()[-1]
        assert "no attribute 'get_tensor" in said or "ckpt_list[idx]" in str(error), error
        sys.exit(print(f"there: {said}") or 1)
