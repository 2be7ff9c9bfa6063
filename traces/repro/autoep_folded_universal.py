"""The converter merges a folded AutoEP + AutoTP checkpoint whole before it fails, for another reason

A Mixtral on two ranks with `autoep_size` 2 and `autotp_size` 2. `ds_to_universal` runs through the
merge, then fails: `AssertionError: Unused patterns=[… experts …] while merging tp slices`. Expected:
the `NotImplementedError` that `consolidate_autoep_zero12_expert_states`
(checkpoint/autoep_universal.py) has for it, before any work. How: `tp_replicated_parameter_patterns`
names the experts, which `main` (checkpoint/ds_to_universal.py) has left out of its merge, and the
check of patterns stands before the experts' turn. Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 56.
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


def train(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", None, 2, rank)
    deepspeed.init_distributed("gloo")
    specs = [{"patterns": [r".*[qkv]_proj\.weight$"], "partition_type": "column"},
             {"patterns": [r".*o_proj\.weight$"], "partition_type": "row"}]
    tp = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
              "expert_parallel": {"enabled": True, "autoep_size": 2}, "tensor_parallel": tp,
              "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 16)
    counts = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_local_experts"), 2)
    model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, **sizes, **counts))
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.backward(engine(torch.arange(8)[None]).logits.sum())
    torch.no_grad()(engine.step)()
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    if deepspeed.__version__ < "0.19":
        sys.exit(print("cannot be tried: no AutoEP in this version") or 77)
    start_processes(train, (folder,), 2, start_method="fork")
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", f"{folder}/saved", "--output_folder", f"{folder}/u", *flags]
    try:
        ds_to_universal.main(ds_to_universal.parse_arguments())
        found = "converted"
    except (AssertionError, NotImplementedError) as error:
        found = f"{type(error).__name__}: {error}"
print(f"{'there' if 'Unused' in found else 'gone'}: {found[:80]}")
sys.exit("Unused" in found)
