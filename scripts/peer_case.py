#!/usr/bin/env python3
"""What scripts/peer.py runs under the Python that has torch and DeepSpeed.

    peer_case.py --rank JOB      one rank of the real engine: load, look, save again, step, save
    peer_case.py --judge JOB     are these values the ones that the recording calls true?

JOB is a JSON file. Of a rank: {case, load, out, look, steps}; `case` as in traces/README.md, `load`
a save folder or null, `look` "all" or "param". OUT then holds live/rankN.pt (the state after the
load), again/ (saved at once) and step/ (saved after `steps` further steps). Of a judgement: {kind,
found, recording, case}; it prints one JSON object.

The engine and its model are those of scripts/record_traces.py, so what differs is the checkpoint.

Not verified: the last bits of a master where the recording has no truth for it (round robin, two
groups on three ranks): then the master is only cast and compared with the model's own weights.
"""
import glob
import json
import os
import sys

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


def train(engine, steps, rank, world):
    import torch
    generator = torch.Generator().manual_seed(SEED_STEPS)
    size = (world, 1, record_traces.TOKENS)
    for _ in range(steps):
        tokens = torch.randint(0, record_traces.VOCABULARY, size, generator=generator)[rank]
        engine.backward(engine(tokens, tokens.roll(1, -1)))
        engine.step()


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
    if job["steps"]:
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


def expectation(recording, case):
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
            other[alias] = trained[name].get("fp32", trained[name]["param"])
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
    trained, other, origin = expectation(job["recording"], job["case"])
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


def main(arguments):
    with open(arguments[1]) as file:
        job = json.load(file)
    if arguments[0] == "--judge":
        print(json.dumps(judge(job)))
    else:
        run_rank(job)


if __name__ == "__main__":
    main(sys.argv[1:])
