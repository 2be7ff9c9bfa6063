"""ds_to_universal writes rounded values under the second name of an AutoEP router

A Mixtral under AutoEP trains in bf16 at ZeRO stage 1. Its router has two names; the universal form
holds the fp32 master under `router.gate.weight` and the bf16 weight cast to fp32 under
`gate.gate.weight`.

Expected: the master under both, or no second name. How: `main` (checkpoint/ds_to_universal.py)
writes every entry of `module` without a file as `tensor.float()`. Seen in DeepSpeed 0.19.8 (torch
2.13.0, CPU).
Errata: row 52.
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


def train(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", None, 2, rank)
    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
              "expert_parallel": {"enabled": True, "autoep_size": 2}, "bf16": {"enabled": True},
              "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 16)
    counts = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_local_experts"), 2)
    model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, **sizes, **counts))
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.backward(engine(torch.arange(8)[None]).logits[..., 0].sum())
    engine.step()
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    if deepspeed.__version__ < "0.19":
        sys.exit(print("cannot be tried: no AutoEP in this version") or 77)
    start_processes(train, (folder,), 2, start_method="fork")
    to_universal(f"{folder}/saved")
    path = f"{folder}/saved_universal/zero/model.layers.0.mlp.%s.gate.weight/fp32.pt"
    found = [torch.load(path % name)["param"] for name in ("router", "gate")
             if os.path.exists(path % name)]
wrong = len(found) == 2 and not torch.equal(*found)
print("there: gate.gate.weight is not router.gate.weight" if wrong else f"gone: {len(found)} names")
sys.exit(1 if wrong else 0)
