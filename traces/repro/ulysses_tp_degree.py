"""ds_to_universal takes Ulysses' sequence degree for a tensor-parallel degree and fails

With `UlyssesSPAttentionHF`'s `parallel_state_sp` as mpu, two ranks a sequence, ZeRO stage 1,
ds_to_universal ends in `RuntimeError: Checkpoint model-state file count 1 does not match
pp_degree=1 * tp_degree=2.`

Expected: it is converted, as at stage 3. How: parallel_state_sp names the sequence groups as those
of the model parallel, and the save records their size as `tp_degree`. Seen in DeepSpeed 0.19.8
(torch 2.13.0, CPU).
Errata: row 12.
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

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


def to_universal(source):
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", source, "--output_folder", f"{source}_universal", *flags]
    ds_to_universal.main(ds_to_universal.parse_arguments())


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
    try:
        to_universal(f"{folder}/saved")
        print("gone: it was converted")
    except RuntimeError as error:
        assert "does not match pp_degree=1 * tp_degree=2" in str(error), error
        sys.exit(print(f"there: {error}") or 1)
