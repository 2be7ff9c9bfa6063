"""zero_to_fp32 --safe_serialization fails on tied weights and leaves earlier shards behind

Two layers share one weight. zero_to_fp32 with `safe_serialization` and small shards ends in
`RuntimeError: Some tensors share memory` (older versions in the same words), after it has written
the shards before the tied ones: the output folder looks like a model, without its index.

Expected: one of the names is written, as transformers does it, or a refusal before anything is
written. How: `convert_zero_checkpoint_to_fp32_state_dict` (utils/zero_to_fp32.py) hands both names
with one storage to `safetensors.torch.save_file`, shard by shard. Seen in DeepSpeed 0.19.8, 0.18.9,
0.16.9 (torch 2.13.0, CPU).
Errata: row 19.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert

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
    model = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(4)))
    model[3].weight = model[2].weight
    engine = engine_of(model, folder, steps=0, zero_optimization={"stage": 3})
    engine.save_checkpoint(folder, "saved")
    try:
        convert(folder, f"{folder}/out", max_shard_size="8KB", safe_serialization=True)
        print("gone: it was converted")
    except ImportError as error:
        sys.exit(print(f"cannot be tried: {error}") or 77)
    except RuntimeError as error:
        assert "share memory" in str(error), error
        left = sorted(os.listdir(f"{folder}/out"))
        sys.exit(print(f"there: tensors share memory; left behind: {left}") or 1)
