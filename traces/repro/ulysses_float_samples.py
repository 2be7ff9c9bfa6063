"""Under Ulysses global_samples is saved as a float

With `parallel_state_sp` as mpu, two ranks a sequence, `global_samples` of the saved file is a
float.

Expected: an int. How: `DeepSpeedConfig` (runtime/config.py) divides the number of ranks by the
sequence degree with `/`; the batch size made of it is added to `global_samples`. Seen in DeepSpeed
0.19.8, 0.18.9 (torch 2.13.0, CPU).
Errata: row 13.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from torch.multiprocessing import start_processes

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


try:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
except ImportError as error:
    sys.exit(print(f"cannot be tried: {error}") or 77)

def train(rank, folder):
    model = torch.nn.Linear(4, 3)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", None, 2, rank)
    deepspeed.init_distributed("gloo")
    parallel_state_sp.initialize_sequence_parallel(2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
              "sequence_parallel_size": 2}
    opt = torch.optim.AdamW(model.parameters())
    engine = deepspeed.initialize(None, model, opt, mpu=parallel_state_sp, config=config)[0]
    engine.backward(engine(torch.ones(1, 4)).sum())
    torch.no_grad()(engine.step)()  # for versions before 0.19 with a new torch
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    found = torch.load(f"{folder}/saved/mp_rank_00_model_states.pt")["global_samples"]
print(f"there: it is {found}" if isinstance(found, float) else f"gone: it is {found}")
sys.exit(1 if isinstance(found, float) else 0)
