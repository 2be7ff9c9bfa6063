"""After a universal load at another expert-parallel degree the optimizer group keeps the old name

A Mixtral is saved with `autoep_size` 2 and its universal form loaded with 1. The experts' optimizer
group is still named `ep_size_2`, and is saved so. Expected: the name of the engine's own group.
How: `load_hp_checkpoint_state_from_checkpoint_dir` (runtime/base_optimizer.py) copies every key of
the saved parameter group but `params`. Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 51.
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
from transformers import MixtralConfig, MixtralForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


def to_universal(source):
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", source, "--output_folder", f"{source}_universal", *flags]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def train(rank, folder, ep, load):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/{ep}", None, 2, rank)
    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
              "expert_parallel": {"enabled": True, "autoep_size": ep},
              "checkpoint": {"load_universal": load},
              "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 16)
    counts = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_local_experts"), 2)
    model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, **sizes, **counts))
    engine = deepspeed.initialize(model=model, config=config)[0]
    if load:
        engine.load_checkpoint(folder)
        found = [group.get("name") for group in engine.optimizer.optimizer.param_groups]
        return torch.save(found, f"{folder}/names{rank}")
    engine.backward(engine(torch.arange(8)[None]).logits.sum())
    torch.no_grad()(engine.step)()
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    if deepspeed.__version__ < "0.19":
        sys.exit(print("cannot be tried: no AutoEP in this version") or 77)
    start_processes(train, (folder, 2, False), 2, start_method="fork")
    to_universal(f"{folder}/saved")
    start_processes(train, (folder, 1, True), 2, start_method="fork")
    found = torch.load(f"{folder}/names0")
print(f"there: {found}" if "ep_size_2" in found else f"gone: {found}")
sys.exit(1 if "ep_size_2" in found else 0)
