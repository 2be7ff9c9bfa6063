"""zero_to_fp32 refuses every checkpoint of BF16_Optimizer

bf16 with `grad_accum_dtype` fp32 at ZeRO stage 1 selects `BF16_Optimizer`. zero_to_fp32, which the
save itself copies beside the checkpoint, ends in `ValueError: ... is not a zero checkpoint`.
ds_to_universal reads the same files.

Expected: the masters, which are there. How: `parse_optim_states` (utils/zero_to_fp32.py) wants
`zero_stage` in the optimizer file, and `state_dict` of runtime/bf16_optimizer.py does not write it.
Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 14.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as to_fp32

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
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    engine = engine_of(model, folder, zero_optimization={"stage": 1}, **config)
    if type(engine.optimizer).__name__ != "BF16_Optimizer":
        sys.exit(print("cannot be tried: BF16_Optimizer was not selected") or 77)
    engine.save_checkpoint(folder, "saved")
    try:
        to_fp32(folder)
        print("gone: it was converted")
    except ValueError as error:
        assert "is not a zero checkpoint" in str(error), error
        sys.exit(print(f"there: {os.path.basename(str(error))}") or 1)
