"""ds_to_universal ignores where AutoEP's metadata says that experts lie

`ds_autoep_layers` names each rank's experts (`expert_placement`). Here two ranks of stage 1 with one
expert each exchange their numbers. The universal form stays as it was, experts under the wrong
numbers; and ranks with unequal counts end in `RuntimeError: AutoEP expert count mismatch`.

Expected: stacks by the experts' numbers. How: `main` (checkpoint/ds_to_universal.py) keeps six fields
of each layer, without the placement. Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 54.
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
if deepspeed.__version__ < "0.19":
    sys.exit(print("cannot be tried: no AutoEP in this version") or 77)


def train(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", None, 2, rank)
    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
              "expert_parallel": {"enabled": True, "autoep_size": 2},
              "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 16)
    model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_attention_heads=2,
                                             num_key_value_heads=2, num_local_experts=2, **sizes))
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.backward(engine(torch.arange(8)[None]).logits[..., 0].sum())
    engine.step()
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    path, stacks = f"{folder}/saved/mp_rank_00_model_states.pt", []
    state = torch.load(path)
    layer = state["ds_autoep_layers"][0]
    for order in ((0, 1), (1, 0)):
        for rank in (0, 1):
            layer["expert_placement"]["ranks"][rank]["experts"] = [order[rank]]
        torch.save(state, path)
        sys.argv[1:] = f"--input_folder {folder}/saved --output_folder {folder}/{order[0]}".split()
        ds_to_universal.main(ds_to_universal.parse_arguments())
        found = f"{folder}/{order[0]}/zero/model.layers.0.mlp.experts.w1/fp32.pt"
        stacks.append(torch.load(found)["param"])
wrong = not torch.equal(stacks[1], stacks[0].flip(0))
print("there: experts 0 and 1 lie as before" if wrong else "gone: each lies under its number")
sys.exit(1 if wrong else 0)
