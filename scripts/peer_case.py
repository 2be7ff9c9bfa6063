#!/usr/bin/env python3
"""What scripts/peer.py runs under the Python that has torch and DeepSpeed.

    peer_case.py < REQUESTS > REPLIES      one JSON object a line

A request is {kind, timeout_s, children: [{log, env, argument}]}. Each child is a process of its
own, forked after torch and DeepSpeed were imported: importing costs more than all else a case does.
The first child that fails ends the others. The reply lists their exit statuses, null for a child
that had to be ended. Kinds, and what `argument` is:

    rank    one rank of the real engine: load, look, save again, step, save.
            {case, load, truth, out, look, steps}; `case` as in traces/README.md, `load` a save
            folder or null, `look` "all" or "param". OUT then holds live/rankN.pt (the state after
            the load), again/ (saved at once) and step/ (saved after `steps` further steps). With
            `truth`, a recorded rankN.pt, the state is set from it before the steps
    judge   are these values the ones that the recording calls true? {kind, found, recording, case};
            the log is one JSON object
    module  a module of DeepSpeed as `python -m` runs it: [name, argument…]

The engine and its model are those of scripts/record_traces.py, so what differs is the checkpoint.

Not verified: the last bits of a master where the recording has no truth for it (round robin, two
groups on three ranks): then the master is only cast and compared with the model's own weights.
"""
import contextlib
import glob
import json
import os
import runpy
import signal
import sys
import time
import traceback

import record_traces

SEED_STEPS = 7  # other tokens than those of the recorded steps
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def make_engine(case):
    import deepspeed
    model = record_traces.build_model(case)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = record_traces.client_optimizer(case, trainable)
    config = record_traces.deepspeed_config(case, optimizer is not None)
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer,
                                model_parameters=trainable if optimizer is None else None)[0]


def whole_weights(engine):
    """Parameters as the model computes with them; no accessor of DeepSpeed's optimizer is used."""
    import deepspeed
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = {"param": parameter.detach().clone()}
    return found


def gather_mode():
    """DeepSpeed before 0.19 gathers into views with autograd on, which torch 2.13 refuses."""
    import deepspeed
    import torch
    return torch.no_grad() if deepspeed.__version__ < "0.19" else contextlib.nullcontext()


def train(engine, steps, rank, world):
    import torch
    generator = torch.Generator().manual_seed(SEED_STEPS)
    size = (world, 1, record_traces.TOKENS)
    for _ in range(steps):
        tokens = torch.randint(0, record_traces.VOCABULARY, size, generator=generator)[rank]
        engine.backward(engine(tokens, tokens.roll(1, -1)))
        with gather_mode():
            engine.step()


def set_state(engine, truth, rank, world):
    """The recorded truth, through DeepSpeed's own setters: a load in which no file takes part."""
    import deepspeed
    import torch
    from deepspeed import utils
    for name, parameter in engine.module.named_parameters():
        whole = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=whole):
            parameter.data.copy_(truth[name]["param"])
        for state, value in truth[name].items() if parameter.requires_grad else ():
            if whole:  # its setter of a whole tensor fails where the ranks' shares are uneven
                share = -(-value.numel() // world)
                padded = torch.zeros(share * world)
                padded[:value.numel()] = value.flatten()
                value = padded[share * rank:share * (rank + 1)]
            kind = "local" if whole else "full"
            if state == "fp32":
                getattr(utils, f"safe_set_{kind}_fp32_param")(parameter, value)
            elif state != "param":
                getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, value, state)


def run_rank(job):
    import deepspeed
    import torch
    case, out, client_state = job["case"], job["out"], record_traces.CLIENT_STATE
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    if case.get("dtype") == "fp16":  # the CPU accelerator says no; its arithmetic works
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    rank, excludes = torch.distributed.get_rank(), bool(case.get("exclude_frozen"))
    engine = make_engine(case)
    if job["load"]:
        with gather_mode():
            path, found = engine.load_checkpoint(job["load"], load_module_strict=not excludes)
        if path is None:
            raise SystemExit("load_checkpoint returned None")
        client_state = {key: found[key] for key in client_state}  # what the folder says, not we
        stepped = case.get("steps", 3) > 0
        link_moments = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if stepped and link_moments:
            link_moments()  # or the accessors find no moments until the next step, which does this
        live = whole_weights(engine) if job["look"] == "param" else \
            record_traces.truth_of(engine, stepped)
        os.makedirs(os.path.join(out, "live"), exist_ok=True)
        torch.save(live, os.path.join(out, "live", f"rank{rank}.pt"))
        engine.save_checkpoint(os.path.join(out, "again"), client_state=client_state,
                               exclude_frozen_parameters=excludes)
    if job.get("truth"):  # the steps before it make the counters and the learning rate right
        train(engine, case.get("steps", 3), rank, case["world"])
        set_state(engine, load(job["truth"]), rank, case["world"])
    if job["steps"] or not job["load"]:
        train(engine, job["steps"], rank, case["world"])
        engine.save_checkpoint(os.path.join(out, "step"), client_state=client_state,
                               exclude_frozen_parameters=excludes)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# ---- The judge: values only, read by torch itself.


def load(path):
    import torch
    return torch.load(path, map_location="cpu", weights_only=False)


def model_states(recording):
    with open(os.path.join(recording, "ckpt", "latest")) as file:
        folder = os.path.join(recording, "ckpt", file.read().strip())
    return next(load(path) for path in (os.path.join(folder, name) for name in MODEL_FILES)
                if os.path.exists(path))


def expectation(recording, case, kind):
    """({name: {state: tensor}}, {other name: tensor}, where from): trained, and the rest."""
    states, trained, other, origin = model_states(recording), {}, {}, "truth"
    paths = sorted(glob.glob(os.path.join(glob.escape(recording), "truth", "rank0.pt")))
    trained = load(paths[0]) if paths else {}
    whole = case["stage"] < 3
    if trained and case.get("zero", {}).get("round_robin_gradients"):
        origin = "truth (weights)"  # DeepSpeed's accessors are wrong under round robin
        trained = {name: {"param": found["param"]} for name, found in trained.items()}
    elif not trained and whole:
        origin = "module"
        buffers, shared = states["buffer_names"], states["shared_params"] or {}
        trained = {name: {"param": tensor} for name, tensor in states["module"].items()
                   if name not in buffers and name not in shared}
    frozen = states["frozen_param_shapes"] or {}
    if case.get("frozen"):
        frozen = frozen or {name: 0 for name in trained if name.startswith("blocks.0.norm.")}
    for name in frozen:
        found = trained.pop(name, None)
        if found and not case.get("exclude_frozen"):
            other[name] = found["param"]
    other.update({name: states["module"][name] for name in states["buffer_names"]})
    for alias, name in (states["shared_params"] or {}).items():
        if name in trained:
            # DeepSpeed's universal form holds the alias as rounded as the model computes with it.
            master = "fp32" if kind == "fp32" else "param"
            other[alias] = trained[name].get(master, trained[name]["param"])
    return trained, other, origin if trained else "nothing"


def read_universal(folder):
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "*", "zero", "**", "*.pt"),
                          recursive=True):
        name, state = os.path.split(os.path.relpath(path, path[:path.index("/zero/") + 6]))
        if name:
            value = load(path)
            found.setdefault(name, {})[state[:-3]] = \
                value["param"] if isinstance(value, dict) else value
    return [found]


def read_fp32(folder):
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "*.bin"), recursive=True):
        found.update(load(path))
    return [{name: {"fp32": tensor} for name, tensor in found.items()}]


def read_live(folder):
    return [load(path) for path in glob.glob(os.path.join(glob.escape(folder), "rank*.pt"))]


def same(found, expected):
    """Bit for bit; where `expected` is narrower, after the cast that a load would do."""
    import torch
    found = found.reshape(expected.shape) if found.numel() == expected.numel() else found
    if found.shape != expected.shape:
        return False
    return torch.equal(found.to(expected.dtype).contiguous().view(torch.uint8).flatten(),
                       expected.contiguous().view(torch.uint8).flatten()) if found.dim() else \
        bool(found == expected)


def judge(job):
    trained, other, origin = expectation(job["recording"], job["case"], job["kind"])
    readers = {"universal": read_universal, "fp32": read_fp32, "live": read_live}
    compared, differ, left_out = 0, set(), set()
    copies = readers[job["kind"]](job["found"])
    for copy in copies:
        for name, states in trained.items():
            for state, expected in states.items():
                # A file holds the master alone; its cast must be the model's weight.
                holds = state if job["kind"] == "live" or state != "param" else "fp32"
                if job["kind"] == "fp32" and holds != "fp32":
                    continue
                value = copy.get(name, {}).get(holds)
                if value is None and (job["kind"] != "live" or state == "param"):
                    differ.add(f"{name}/{holds} is missing")
                elif value is not None:
                    compared += 1
                    if not same(value, expected):
                        differ.add(f"{name}/{holds}")
        for name, expected in other.items():
            value = copy.get(name, {}).get("param" if job["kind"] == "live" else "fp32")
            if value is None:
                left_out.add(name)
            elif not same(value.to(expected.dtype), expected):
                differ.add(name)
            else:
                compared += 1
    if not copies or compared == 0:
        origin = "nothing"
    return {"compared": compared, "differ": sorted(differ), "against": origin,
            "left_out": [] if job["kind"] == "live" else sorted(left_out)}


def run_module(argument):
    sys.argv = list(argument)
    runpy.run_module(argument[0], run_name="__main__", alter_sys=True)


KINDS = {"rank": run_rank, "judge": lambda job: print(json.dumps(judge(job))),
         "module": run_module}


# ---- One process for all requests, one forked child for each rank.


def child(kind, entries):
    """Never returns."""
    status = 1
    try:
        os.setsid()
        log = os.open(entries["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(entries.get("env", {}))
        KINDS[kind](entries["argument"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        print("" if isinstance(end.code, int) or end.code is None else f"Error: {end.code}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def answer(request):
    pids, states = [], {}
    for entries in request["children"]:
        pid = os.fork()
        if pid == 0:
            child(request["kind"], entries)
        pids.append(pid)
    deadline = time.monotonic() + request["timeout_s"]
    while len(states) < len(pids) and not any(states.values()) and time.monotonic() < deadline:
        for pid in set(pids) - set(states):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                states[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for pid in set(pids) - set(states):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [states.get(pid) for pid in pids]


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed logs to the standard output
    import deepspeed.checkpoint.ds_to_universal
    import deepspeed.utils.zero_to_fp32
    import torch
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
