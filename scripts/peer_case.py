#!/usr/bin/env python3
"""What scripts/peer.py runs under the Python that has torch and DeepSpeed.

    peer_case.py < REQUESTS > REPLIES      one JSON object a line

A request is {kind, timeout_s, children: [{log, env, argument}]}. Each child is a process of its
own, forked after torch and DeepSpeed were imported: importing costs more than all else a case does.
The first child that fails ends the others. The reply lists their exit statuses, null for a child
that had to be ended. Kinds, and what `argument` is:

    rank    one rank of the real engine: load, look, save again, step, save.
            {case, load, truth, out, look, steps, as_it_is}; `case` as in traces/README.md, `load` a
            save folder or null, `look` "all" or "param". OUT then holds live/rankN.pt (the state
            after the load; after the steps where nothing was loaded), again/ (saved at once) and
            step/ (saved after `steps` further steps).
            With `truth`, a recorded rankN.pt, the state is set from it before the steps; with
            `as_it_is`, two faults of DeepSpeed after a load are left as they are
    judge   are these values the ones that the recording calls true? {kind, found, recording, case};
            the log is one JSON object
    module  a module of DeepSpeed as `python -m` runs it: [name, argument…]

The engine and its model are those of scripts/record_traces.py, or of peer_ulysses.py where
`model` is "llama": what differs is the checkpoint.

Not verified: GPUs; ranks on several machines.
"""
import contextlib
import json
import os
import runpy
import signal
import sys
import time
import traceback

import peer_judge
import peer_ulysses
import record_traces

SEED_STEPS = 7  # other tokens than those of the recorded steps


def make_engine(case):
    import deepspeed
    llama = case.get("model") == "llama"
    model = (peer_ulysses if llama else record_traces).build_model(case)
    mpu = peer_ulysses.register(case, model) if llama else None
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = record_traces.client_optimizer(case, trainable)
    config = record_traces.deepspeed_config(case, optimizer is not None)
    config.setdefault("gradient_clipping", 1.0)  # 0.19's default; the older one is not to clip
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer, mpu=mpu,
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


def loss_of(engine, case, generator, rank):
    import torch
    if case.get("model") == "llama":
        return peer_ulysses.loss_of(engine, case, generator, rank)
    size = (case["world"], 1, record_traces.TOKENS)
    tokens = torch.randint(0, record_traces.VOCABULARY, size, generator=generator)[rank]
    return engine(tokens, tokens.roll(1, -1))


def train(engine, case, steps, rank):
    import torch
    generator = torch.Generator().manual_seed(SEED_STEPS)
    for _ in range(steps):
        engine.backward(loss_of(engine, case, generator, rank))
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


def wait_for_gathers():
    """DeepSpeed before 0.19 waits for the last of several gathers; those of gloo end in any order.

    Without this a weight looked at right after a load may be memory never written (erratum 38).
    """
    import torch
    gather = torch.distributed.all_gather_into_tensor

    def gather_and_wait(*arguments, **named):
        handle = gather(*arguments, **named)
        if handle is not None:
            handle.wait()
        return handle

    torch.distributed.all_gather_into_tensor = gather_and_wait


def look(engine, job, stepped):
    import torch
    live = whole_weights(engine) if job["look"] == "param" else \
        record_traces.truth_of(engine, stepped)
    os.makedirs(os.path.join(job["out"], "live"), exist_ok=True)
    rank = torch.distributed.get_rank()
    torch.save(live, os.path.join(job["out"], "live", f"rank{rank}.pt"))


def load_and_look(engine, job):
    """Loads, writes live/rankN.pt, and returns the client state of the folder."""
    import deepspeed
    case, excludes = job["case"], bool(job["case"].get("exclude_frozen"))
    with gather_mode():
        path, found = engine.load_checkpoint(job["load"], load_module_strict=not excludes)
    if path is None:
        raise SystemExit("load_checkpoint returned None")
    if deepspeed.__version__ < "0.18" and not job.get("as_it_is"):
        # Or at stage 3 every rank saves its model file as rank 0's (erratum 37).
        engine._config.load_universal_checkpoint = False
    stepped = case.get("steps", 3) > 0
    link_moments = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if stepped and link_moments and not job.get("as_it_is"):
        link_moments()  # or the accessors fail until the next step, which does this (erratum 42)
    look(engine, job, stepped)
    return {key: found[key] for key in record_traces.CLIENT_STATE}


def run_rank(job):
    import deepspeed
    import torch
    case, client_state = job["case"], record_traces.CLIENT_STATE
    torch.set_num_threads(1)
    if deepspeed.__version__ < "0.19":
        wait_for_gathers()
    deepspeed.init_distributed(dist_backend="gloo")
    if case.get("dtype") == "fp16":  # the CPU accelerator says no; its arithmetic works
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    rank, engine = torch.distributed.get_rank(), make_engine(case)

    def save(part):
        engine.save_checkpoint(os.path.join(job["out"], part), client_state=client_state,
                               exclude_frozen_parameters=bool(case.get("exclude_frozen")))

    if job["load"]:
        client_state = load_and_look(engine, job)
        save("again")
    if job.get("truth"):  # the steps before it make the counters and the learning rate right
        train(engine, case, case.get("steps", 3), rank)
        set_state(engine, peer_judge.load(job["truth"]), rank, case["world"])
    if job["steps"] or not job["load"]:
        train(engine, case, job["steps"], rank)
        save("step")
        if not job["load"]:
            look(engine, job, job["steps"] > 0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_module(argument):
    sys.argv = list(argument)
    runpy.run_module(argument[0], run_name="__main__", alter_sys=True)


KINDS = {"rank": run_rank, "judge": lambda job: print(json.dumps(peer_judge.judge(job))),
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
