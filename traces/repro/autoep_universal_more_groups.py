"""A universal load with more optimizer groups of experts than were saved leaves experts untouched

A Mixtral is saved with `autoep_size` 2 and its universal form loaded with 1, where the experts fill
more groups: max_group_size is set to 800 here, as its 178,956,971 elements are to a large model.
w2 and w3 stay as the new model was made, without a word. Expected: all is loaded.
How: `load_hp_checkpoint_state_from_checkpoint_dir` (runtime/base_optimizer.py) goes over
`zip(self.optimizer.param_groups, optim_sd['param_groups'])`, which ends with the shorter.
Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 59.
"""
import glob
import os
import sys
import tempfile
import traceback
os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from torch.multiprocessing import start_processes
from transformers import MixtralConfig, MixtralForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))
split.__defaults__ = (800,)


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
        stacks = {n: p.data for n, p in engine.module.named_parameters() if ".experts.w" in n}
        return torch.save(stacks, f"{folder}/loaded{rank}")
    engine.backward(engine(torch.arange(8)[None]).logits.sum())
    torch.no_grad()(engine.step)()
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    if deepspeed.__version__ < "0.19":
        sys.exit(print("cannot be tried: no AutoEP in this version") or 77)
    start_processes(train, (folder, 2, False), 2, start_method="fork")
    sys.argv[1:] = ["--input_folder", f"{folder}/saved", "--output_folder", f"{folder}/universal"]
    ds_to_universal.main(ds_to_universal.parse_arguments())
    start_processes(train, (folder, 1, True), 2, start_method="fork")
    lost = [name for name, loaded in torch.load(f"{folder}/loaded0").items() if not torch.equal(
        loaded, torch.load(glob.glob(f"{folder}/universal/zero/{name}/fp32.pt")[0])["param"])]
sys.exit(print(f"there: not loaded: {lost}" if lost else "gone: all are loaded") or len(lost) > 0)
