"""ds_to_universal at stage 3 accepts parameter shapes that do not fit the flat data

`param_shapes` of a stage 3 checkpoint is too small for the first parameter (damage, or a file of
another run). ds_to_universal converts it, every later parameter shifted. zero_to_fp32 refuses it.

Expected: an error. How: `extract_zero_shards_stage3` (checkpoint/ds_to_universal.py) never compares
the sum of lengths with the length of `fp32_flat_groups`. Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9
(torch 2.13.0, CPU).
Errata: row 10.
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
    engine = engine_of(model, folder, zero_optimization={"stage": 3})
    engine.save_checkpoint(folder, "saved")
    expected = engine.optimizer.fp32_partitioned_groups_flat[0][20:36]
    path = f"{folder}/saved/zero_pp_rank_0_mp_rank_00_model_states.pt"
    file = torch.load(path)
    file["param_shapes"][0]["0.weight"] = torch.Size([3, 4])
    torch.save(file, path)
    try:
        to_universal(f"{folder}/saved")
    except (ValueError, AssertionError) as error:
        sys.exit(print(f"gone: refused: {error}"))
    found = torch.load(f"{folder}/saved_universal/zero/1.weight/fp32.pt")
wrong = not found.equal(expected)
print("there: 1.weight is wrong, silently" if wrong else "gone: 1.weight is right")
sys.exit(1 if wrong else 0)
