"""Are these values the ones that a recording calls true? Values only, read by torch itself.

For scripts/peer_case.py. What is judged: a universal folder, an fp32 folder, or the live state that
the ranks wrote down; against truth/rank0.pt, and against the model file for what does not train.

Not verified: the last bits of a master where the recording has no truth for it (round robin, two
groups on three ranks): then the master is only cast and compared with the model's own weights.
"""
import glob
import os

MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


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
