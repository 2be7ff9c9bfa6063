#!/usr/bin/env python3
"""Records what other programs do, into traces/, on the CPU. The one way in:

    record_traces.py --python PYTHON --case CASE --out DIR    a checkpoint of traces/deepspeed/
    record_traces.py exchanges DIR    Ulysses' exchanges and the collectives of training steps
    record_traces.py training DIR     gradients, steps, states and schedules of small models

The last two are scripts/record_exchanges.py and record_training.py, which say what they write; they
run under the Python that runs this and need torch, DeepSpeed, transformers and ninja. DIR of these
is replaced file by file (exchanges: as a whole). The rest of this page is about checkpoints.

PYTHON has torch, DeepSpeed and ninja. CASE is a JSON file or a folder with a case.json. DIR must
not exist. traces/README.md lists the settings of a case (an unknown one is refused) and the parts
of DIR. One process a rank (gloo, one thread) trains the small network `Net` on random tokens. The
first run on a machine compiles an operator of DeepSpeed; killed meanwhile, it leaves a file `lock`
in torch's cache of extensions, and every later run waits until that is removed.

Not verified: that the result equals the recorded case; scripts/compare_torch.py tells. The last
bits of the values depend on the processor; names, shapes and structure do not.
"""
import argparse
import glob
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

TRACES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "traces", "deepspeed")
TIMEOUT_S = 300
WIDTH, HIDDEN, VOCABULARY, BLOCKS, TOKENS = 10, 17, 13, 2, 8
SEED_WEIGHTS, SEED_TOKENS = 1234, 99
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.01
SETTINGS = set("name stage world dtype steps tied frozen exclude_frozen groups client_optimizer "
               "ds_adam sched zero ds grad_accum_dtype load_universal load_from truth pipeline "
               "method functions buffers tensor".split())
MOMENTS = {"Adagrad": ("sum",), "SGD": ("momentum_buffer",), "RMSprop": ("square_avg",)}
CLIENT_STATE = {"note": "made by the oracle", "epoch": 2, "nested": {"a": [1, 2.5, None, True]}}
UNIVERSAL = "-m deepspeed.checkpoint.ds_to_universal --inject_missing_state \
    --num_extract_workers 1 --num_merge_workers 1 --input_folder ckpt/global_step{0} \
    --output_folder universal/global_step{0}_universal"


def build_model(case):
    """Odd sizes, a one-element parameter, two buffers: what partitioning gets wrong first."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.up = nn.Linear(WIDTH, HIDDEN)
            self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.scale = nn.Parameter(torch.ones(1))  # 0-d is refused by DeepSpeed's broadcast
            self.register_buffer("running", torch.arange(5, dtype=torch.float32))
            self.register_buffer("count", torch.tensor(7, dtype=torch.int64))

        def forward(self, tokens, labels):
            logits = self.head(self.blocks(self.embed(tokens))) * self.scale
            return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    torch.manual_seed(SEED_WEIGHTS)
    model = Net()
    if case.get("tied"):
        model.head.weight = model.embed.weight
    model.blocks[0].norm.requires_grad_(not case.get("frozen"))
    return model


def client_optimizer(case, parameters):
    """The optimizer that the program makes itself, or None where DeepSpeed's config names it."""
    import torch
    asked = case.get("client_optimizer", {"type": "AdamW", "params": {"lr": LEARNING_RATE}})
    if case.get("groups"):  # matrices decay, the rest does not; with 3, one element stands alone
        group_of = {p: (p.dim() < 2) + (p.numel() == 1 and case["groups"] == 3) for p in parameters}
        parameters = [{"params": [p for p in parameters if group_of[p] == group],
                       "weight_decay": 0.0 if group else WEIGHT_DECAY}
                      for group in sorted(set(group_of.values()))]
    elif "client_optimizer" not in case:
        return None
    return getattr(torch.optim, asked["type"])(parameters, **asked["params"])


def deepspeed_config(case, has_client_optimizer):
    """The order of the keys matters: the config is saved in every optimizer file."""
    kind = {} if case.get("ds_adam") else {"torch_adam": True}
    adam = {"lr": LEARNING_RATE, **kind, "weight_decay": WEIGHT_DECAY}
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "optimizer": {"type": "AdamW", "params": adam}, "steps_per_print": 100000,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if case.get("sched"):
        config["scheduler"] = {"type": "WarmupLR", "params": {
            "warmup_max_lr": LEARNING_RATE, "warmup_num_steps": 4}}
    if case.get("dtype", "bf16") == "bf16":
        config["bf16"] = {"enabled": True}
    elif case["dtype"] == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    if "grad_accum_dtype" in case:
        config["data_types"] = {"grad_accum_dtype": case["grad_accum_dtype"]}
    if case.get("load_universal"):
        config["checkpoint"] = {"load_universal": True}
    config.update(case.get("ds", {}))
    if has_client_optimizer:
        del config["optimizer"]
    return config


def truth_of(engine, stepped):
    """Whole tensors by DeepSpeed's own accessors; every rank must ask for the same ones."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    base = type(getattr(engine.optimizer, "optimizer", engine.optimizer)).__name__
    # Before the first step only some ranks would throw, and the others would wait for them.
    moments = MOMENTS.get(base, ("exp_avg", "exp_avg_sq")) if stepped else ()
    truth = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found = {"param": parameter.detach().clone()}
        if parameter.requires_grad:
            found["fp32"] = safe_get_full_fp32_param(parameter)
            found.update({key: safe_get_full_optimizer_state(parameter, key) for key in moments})
        truth[name] = {k: v.detach().clone() for k, v in found.items() if v is not None}
    return truth


def train_and_save(case, out):
    """What one rank does; this alone runs under PYTHON."""
    import deepspeed
    import torch
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    if case.get("dtype") == "fp16":  # the CPU accelerator says no; its arithmetic works
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    rank, world = torch.distributed.get_rank(), case["world"]
    if "pipeline" in case:
        return train_pipeline(case, out, rank)
    model = build_model(case)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = client_optimizer(case, trainable)
    engine, *_ = deepspeed.initialize(
        model=model, config=deepspeed_config(case, optimizer is not None), optimizer=optimizer,
        model_parameters=trainable if optimizer is None else None)
    if "load_from" in case:
        path, _ = engine.load_checkpoint(os.path.join(TRACES, case["load_from"]))
        assert path is not None, f"nothing to load in {case['load_from']}"
    steps, generator = case.get("steps", 3), torch.Generator().manual_seed(SEED_TOKENS)
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (world, 1, TOKENS), generator=generator)[rank]
        engine.backward(engine(tokens, tokens.roll(1, -1)))
        engine.step()
    engine.save_checkpoint(os.path.join(out, "ckpt"), client_state=CLIENT_STATE,
                           exclude_frozen_parameters=bool(case.get("exclude_frozen")))
    truth = truth_of(engine, steps > 0) if case.get("truth", True) else {}
    torch.save(truth, os.path.join(out, "truth", f"rank{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_pipeline(case, out, rank):
    import record_pipeline
    import torch
    engine = record_pipeline.make_engine(case)
    if "load_from" in case:
        path, _ = engine.load_checkpoint(os.path.join(TRACES, case["load_from"]))
        assert path is not None, f"nothing to load in {case['load_from']}"
    record_pipeline.train(engine, case.get("steps", record_pipeline.STEPS))
    engine.save_checkpoint(os.path.join(out, "ckpt"),
                           client_state=record_pipeline.client_state(case))
    torch.save(record_pipeline.truth_of(engine), os.path.join(out, "truth", f"rank{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def read_case(path):
    with open(os.path.join(path, "case.json") if os.path.isdir(path) else path) as file:
        case = json.load(file)
    case = {k: v for k, v in case.items() if k != "versions" and not k.endswith("_fails_with")}
    unknown = sorted(set(case) - SETTINGS)
    if unknown or not {"name", "stage", "world"} <= set(case):
        raise SystemExit(f"record_traces: needs name, stage and world; does not know {unknown}")
    return case


def environment(python):
    path = os.path.dirname(python) + os.pathsep + os.environ["PATH"]  # ninja stands there
    return dict(os.environ, PATH=path, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo",
                DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1",
                TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")  # DeepSpeed 0.14.5 loads its own classes


def run_ranks(case, out, python):
    """Starts one process a rank; the first failure ends them all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [python, os.path.abspath(__file__), "--rank", json.dumps(case), out]
    world, ranks, deadline = str(case["world"]), [], time.monotonic() + TIMEOUT_S
    with tempfile.TemporaryFile() as log:
        for rank in map(str, range(case["world"])):
            variables = dict(environment(python), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                             RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, LOCAL_SIZE=world)
            ranks.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
        while time.monotonic() < deadline and {r.poll() for r in ranks} in ({None}, {None, 0}):
            time.sleep(0.1)
        failed = {n: rank.poll() for n, rank in enumerate(ranks) if rank.poll() != 0}
        for rank in ranks:
            rank.kill()
            rank.wait()
        for left in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{port}_*"):
            os.remove(left)  # 66 MiB a rank that DeepSpeed never frees
        if failed:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-6000:])
            raise SystemExit(f"record_traces: ranks failed (None: still running): {failed}")


def convert(part, command, case, out, python):
    """Runs one of DeepSpeed's converters in OUT; a failure is a result and is recorded."""
    done = subprocess.run([python, *command.split()], cwd=out, env=environment(python),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    if done.returncode != 0:
        last_line = done.stdout.strip().splitlines()[-1]
        last_line = re.sub(".*can't open file.*", "no zero_to_fp32.py is written", last_line)
        case[f"deepspeed_{part}_fails_with"] = re.sub(r"'[^'\s]*/", "'", last_line)
        shutil.rmtree(os.path.join(out, part), ignore_errors=True)


def record(case, out, python):
    os.makedirs(os.path.join(out, "truth"))
    run_ranks(case, out, python)
    query = "import importlib.metadata as m; print(m.version('deepspeed'), m.version('torch'))"
    found = subprocess.check_output([python, "-c", query], text=True).split()
    case["versions"] = dict(zip(("deepspeed", "torch"), (v.split("+")[0] for v in found)))
    if "load_from" not in case:
        steps = case.get("steps", 2 if "pipeline" in case else 3)
        convert("universal", UNIVERSAL.format(steps), case, out, python)
        convert("fp32", "ckpt/zero_to_fp32.py ckpt fp32", case, out, python)
    for script in glob.glob(os.path.join(glob.escape(out), "ckpt", "*.py")):
        os.remove(script)
    with open(os.path.join(out, "case.json"), "w") as file:
        file.write(json.dumps(case, indent=1) + "\n")
    print(f"{out}: {json.dumps(case)}")


def main(arguments):
    if arguments[:1] == ["--rank"]:
        return train_and_save(json.loads(arguments[1]), arguments[2])
    if len(arguments) == 2 and arguments[0] in ("exchanges", "training"):
        return importlib.import_module("record_" + arguments[0]).record(arguments[1])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--python", "--case", "--out"):
        parser.add_argument(option, required=True)
    given = parser.parse_args(arguments)
    python = shutil.which(given.python) or parser.error(f"no program {given.python}")
    record(read_case(given.case), os.path.abspath(given.out), os.path.abspath(python))


if __name__ == "__main__":
    main(sys.argv[1:])
