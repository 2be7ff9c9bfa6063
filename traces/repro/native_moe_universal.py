"""ds_to_universal fails on native MoE with expert parallelism

`deepspeed.moe.layer.MoE` with four experts over two ranks at ZeRO stage 1: ds_to_universal ends in
`RuntimeError: shape ... is invalid for input of size ...`, in 0.16.9 in `KeyError:
'optimizer_state_dict'`.

Expected: it is converted, or refused by name. How: experts are named by their number on the rank,
and `_merge_zero_shards` (checkpoint/ds_to_universal.py) joins experts of one name as one parameter.
Seen in DeepSpeed 0.19.8, 0.18.9, 0.16.9 (torch 2.13.0, CPU).
Errata: row 50.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from torch.multiprocessing import start_processes

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


def to_universal(source):
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", source, "--output_folder", f"{source}_universal", *flags]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def train(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", None, 2, rank)
    deepspeed.init_distributed("gloo")
    expert = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(MoE(4, expert, 4, ep_size=2, use_rts=False, min_capacity=0))
    opt = torch.optim.AdamW(split({"params": list(model.parameters()), "name": "all"}))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    engine = deepspeed.initialize(model=model, optimizer=opt, config=config)[0]
    engine.backward(engine(torch.ones(1, 8, 4))[0].sum())
    torch.no_grad()(engine.step)()  # for versions before 0.19 with a new torch
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    try:
        to_universal(f"{folder}/saved")
        print("gone: it was converted")
    except (RuntimeError, KeyError) as error:
        assert "is invalid for input of" in str(error) or error.args == ("optimizer_state_dict",)
        sys.exit(print(f"there: {type(error).__name__}: {error}") or 1)
