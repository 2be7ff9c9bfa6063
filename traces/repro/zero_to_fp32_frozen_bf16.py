"""zero_to_fp32 leaves frozen parameters in bf16

A model with a frozen bias trains in bf16 at ZeRO stage 2. The file that zero_to_fp32 writes holds
the trained parameters in fp32 and the frozen one in bf16.

Expected: fp32 throughout, as the tool's name says. How: `_zero2_merge_frozen_params` and
`_zero3_merge_frozen_params` (utils/zero_to_fp32.py) take the recorded fragments as they are, and
`to_torch_tensor` does not cast. Seen in DeepSpeed 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 6.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

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
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    engine = engine_of(model, folder, zero_optimization={"stage": 2}, bf16={"enabled": True})
    engine.save_checkpoint(folder, "saved")
    convert_zero_checkpoint_to_fp32_state_dict(folder, f"{folder}/out", max_shard_size=None)
    found = torch.load(f"{folder}/out/pytorch_model.bin")
wrong = [name for name, value in found.items() if value.dtype != torch.float32]
print(f"there: not float32: {wrong}" if wrong else "gone: all is float32")
sys.exit(1 if wrong else 0)
