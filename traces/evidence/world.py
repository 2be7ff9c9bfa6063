"""What the scripts of this folder share: tiny models under the real DeepSpeed, and what was seen.

Each script is `SCRIPT.py FOLDER`: it works in FOLDER and leaves there what it made. Its last line
is one JSON object: `reproduced`, `said` (one line, with the figures) and, where the caller goes on
with them, further members.
"""
import json
import os
import sys
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import torch
from torch.multiprocessing import start_processes

sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))
FOLDER = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else sys.exit(__doc__)


def say(reproduced, said, **more):
    said = said.replace(FOLDER + os.sep, "")
    print(json.dumps({"reproduced": bool(reproduced), "said": said, **more}), flush=True)


def deepspeed():
    """Imported where it is used: it costs seconds, and torch alone does for some."""
    import deepspeed as module
    module.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
    return module


def named(name, numel):
    """A model with one parameter of that name; setattr would refuse some names."""
    model = torch.nn.Module()
    model._parameters[name] = torch.nn.Parameter(torch.arange(numel, dtype=torch.float32) / 64)
    model.forward = lambda x: (model._parameters[name] * x).sum()
    return model


def engine_of(model, rank=0, world=1, steps=1, store="store", **config):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", f"file://{FOLDER}/{store}", None, world, rank)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
              "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}, **config}
    engine = deepspeed().initialize(model=model, model_parameters=list(model.parameters()),
                                    config=config)[0]
    train(engine, steps)
    return engine


def train(engine, steps):
    for _ in range(steps):
        dtype = next(engine.module.parameters()).dtype
        engine.backward(engine(torch.ones(1, 4, dtype=dtype) if isinstance(
            engine.module, torch.nn.Linear) else torch.ones((), dtype=dtype)).sum())
        engine.step()


def run_ranks(function, world, *arguments):
    """Forks the ranks and waits for all; their exit codes, negative after a signal."""
    context = start_processes(function, arguments, world, join=False, start_method="fork")
    for process in context.processes:
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in context.processes]


def to_universal(source, target):
    """DeepSpeed's own converter, in this process."""
    deepspeed()
    from deepspeed.checkpoint import ds_to_universal
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", source, "--output_folder", target, *flags]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def first_line(error):
    text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")
    return text if len(text) < 120 else text[:119] + "…"
