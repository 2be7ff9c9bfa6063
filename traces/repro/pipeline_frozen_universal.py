"""The universal form of a pipeline loses frozen parameters and buffers

A PipelineModule of two layers on one stage, the first frozen, with a buffer; ZeRO stage 1. Saved,
converted, loaded in a fresh engine whose first layer starts elsewhere: the frozen weight and the
buffer keep the fresh values, silently. Expected: the saved ones. How: they lie in
`layer_00-model_states.pt` alone, which `main` (checkpoint/ds_to_universal.py) does not copy, and a
universal load (runtime/engine.py) does not read. Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 55.
"""
import os
import sys
import tempfile
import traceback
os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1", RANK="0",
                  LOCAL_RANK="0", WORLD_SIZE="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.pipe import PipelineModule

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


class First(torch.nn.Linear):
    def __init__(self, value):
        super().__init__(4, 4)
        self.requires_grad_(False)
        torch.nn.init.constant_(self.weight, value)
        self.register_buffer("scale", torch.full([2], value))


def engine_of(value, universal):
    torch.manual_seed(0)
    layers = [First(value), torch.nn.Linear(4, 4)]
    model = PipelineModule(layers=layers, num_stages=1, loss_fn=torch.nn.functional.mse_loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1}, "checkpoint": {"load_universal": universal}})[0]


with tempfile.TemporaryDirectory() as folder:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", None, 1, 0)
    deepspeed.init_distributed("gloo")
    engine = engine_of(1.0, False)
    engine.train_batch(iter([(torch.ones(1, 4), torch.ones(1, 4))] * 9))
    engine.save_checkpoint(folder, "saved")
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", f"{folder}/saved", "--output_folder", f"{folder}/u", *flags]
    ds_to_universal.main(ds_to_universal.parse_arguments())
    open(f"{folder}/latest_universal", "w").write("u")
    engine = engine_of(5.0, True)
    engine.load_checkpoint(folder, "u")
    first = engine.module.forward_funcs[0]
    found = [first.weight.flatten()[0].item(), first.scale[0].item()]
print(f"there: weight, buffer {found}, saved 1, 1" if 5.0 in found else "gone: both are loaded")
sys.exit(5.0 in found)
