"""A bf16 pipeline at ZeRO stage 0 cannot load what it has saved

A PipelineModule in bf16 without ZeRO trains with BF16_Optimizer and saves one partition file a
rank, and rank 0's partition once more in the model file. `load_checkpoint` of the same run ends in
`KeyError: 0`: it hands the model file's dictionary to a function that wants one for each rank.

Expected: the run goes on. How: `_load_checkpoint` (runtime/engine.py) takes
`optim_checkpoint['optimizer']` where there is no ZeRO, and `_load_legacy_checkpoint`
(runtime/bf16_optimizer.py) looks in it for its own rank. Seen in DeepSpeed 0.19.8, 0.18.9
(torch 2.13.0, CPU).
Errata: row 57.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch.multiprocessing import start_processes

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


def batches():
    while True:
        yield torch.ones(1, 4).bfloat16(), torch.ones(1, 4).bfloat16()


def train(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", None, 2, rank)
    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
              "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    layers = [LayerSpec(torch.nn.Linear, 4, 4) for _ in range(2)]
    model = PipelineModule(layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss)
    engine = deepspeed.initialize(model=model, config=config,
                                  model_parameters=list(model.parameters()))[0]
    engine.train_batch(batches())
    engine.save_checkpoint(folder, "saved")
    try:
        engine.load_checkpoint(folder, "saved")
        found = "gone: it was loaded"
    except KeyError as error:
        found = f"there: KeyError: {error}"
    open(f"{folder}/{rank}", "w").write(found)


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    found = open(f"{folder}/0").read()
print(found)
sys.exit(1 if found.startswith("there") else 0)
