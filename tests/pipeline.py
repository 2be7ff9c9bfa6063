#!/usr/bin/env python3
"""tests/pipeline.py PROGRAM TRACES: pipelines at other numbers of stages.

For every recorded pipe_* case: to its own topology (the very files), and to other pp and dp, said
by --pp-parts, by rule, or inferred: the digest stays, verify says VERIFIED, every layer's file is
the same bytes, every stage's param_shapes names its own layers, and back again gives the source's
files.
Then what is refused: stages that are not certain, parts that do not fit, contradictory flags, stage
2, a universal folder as source. That the files are those of DeepSpeed: golden.loaded.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "scripts"))
import compare_torch  # noqa: E402
import hostile  # noqa: E402

PROGRAM, TRACES = sys.argv[1:3]
# case → its parts
PARTS = {
    "pipe_z1_pp2_dp1": [0, 3, 6],
    "pipe_z1_pp2_dp2_tied": [0, 3, 6],
    "pipe_bf16_pp3_dp2": [0, 2, 4, 9],
    "pipe_frozen_pp2_dp2": [0, 3, 6],
    "pipe_pp2_to_pp1_dp2": [0, 6],
    "pipe_tied_pp2_to_pp3_dp1": [0, 2, 4, 6],
    "pipe_bf16_pp3_to_pp2_dp1": [0, 3, 9],
    "pipe_frozen_pp2_to_pp1_dp1": [0, 6],
    "pipe_tp2_pp2_dp2": [0, 3, 5],
    "pipe_tp2_to_tp1_pp2_dp2": [0, 3, 5],
    "pipe_tp2_to_tp4_pp1_dp1": [0, 5],
    "pipe_z0_bf16_pp2_dp2": [0, 3, 6],
    "pipe_z0_bf16_tp2_pp2_dp2": [0, 3, 5],
}
# dp, parts
TARGETS = [(3, [0, 6]), (1, [0, 2, 6]), (2, [0, 2, 3, 6]), (1, [0, 2, 3, 4, 6])]
RULE = ["--partition-method", "parameters"]
# case, --to, flags, parts of the target, or words of a refusal
SAID = [
    ("pipe_z1_pp2_dp1", "pp=3", [], "type:REGEX"),  # uniform says 0,2,4,6
    ("pipe_z1_pp2_dp1", "pp=4", [], "not certain"),
    ("pipe_bf16_pp3_dp2", "pp=2", [], [0, 3, 9]),  # whatever layer 5 is, and however many there are
    ("pipe_bf16_pp3_dp2", "pp=4", ["--pp-parts", "0,2,4,6,9"], "layers 0,5"),  # or 0,7: the head
    ("pipe_z1_pp2_dp1", "pp=4", RULE, [0, 2, 3, 4, 6]),
    ("pipe_z1_pp2_dp1", "pp=4", ["--partition-method", "uniform"], [0, 2, 4, 5, 6]),
    ("pipe_z1_pp2_dp1", "pp=4", ["--partition-method", "Uniform"], [0, 2, 4, 5, 6]),
    ("pipe_z1_pp2_dp1", "pp=2", ["--partition-method", "uniform", "--num-layers", "9"],
     [0, 5, 9]),
    ("pipe_z1_pp2_dp1", "pp=7", ["--pp-parts", "0,1,2,3,4,5,6,7"], "no element"),
    ("pipe_z1_pp2_dp1", "pp=3", ["--pp-parts", "0,3,6"], "4 rising numbers"),
    ("pipe_z1_pp2_dp1", "pp=2", ["--pp-parts", "0,6,3"], "rising"),
    ("pipe_z1_pp2_dp1", "pp=2", ["--pp-parts", "1,3,6"], "from 0"),
    ("pipe_z1_pp2_dp1", "pp=2", ["--pp-parts", "0,3,5"], "behind layer 5"),
    ("pipe_z1_pp2_dp1", "pp=2", ["--pp-parts", "0,3,6", "--num-layers", "7"], "--num-layers"),
    ("pipe_z1_pp2_dp1", "pp=3", ["--num-layers", "5"], "more than 5"),
    ("pipe_z1_pp2_dp1", "pp=2", ["--pp-parts", "0,3,6", *RULE], "--pp-parts alone"),
    ("pipe_z1_pp2_dp1", "pp=100", RULE, "more stages than layers"),
    ("pipe_z1_pp2_dp1", "pp=8", ["--num-layers", "8", *RULE], "A pipeline stage would hold no"),
    ("pipe_bf16_pp3_dp2", "pp=2", ["--partition-method", "uniform"], "uniform does not"),
    ("pipe_z1_pp2_dp2_tied", "pp=4", ["--pp-parts", "0,1,2,3,5"], 'layers that use "embed"'),
    ("pipe_z1_pp2_dp2_tied", "pp=2", ["--tied-layers", "head=0,5"], '"embed"'),
    ("pipe_z1_pp2_dp1", "pp=1", ["--tied-layers", "embed=0,5"], "tied_modules"),
    ("pipe_z1_pp2_dp2_tied", "pp=3", ["--tied-layers", "embed=0,3"], "layers without a file"),
    ("pipe_z1_pp2_dp2_tied", "pp=3", ["--tied-layers", "embed=5"], "layer 0, whose file"),
    ("pipe_z1_pp2_dp2_tied", "pp=3", ["--tied-layers", "embed=0"], "that hold it"),
    ("pipe_z1_pp2_dp2_tied", "pp=3",
     ["--tied-layers", "embed=0,5", "--partition-method", "uniform"], [0, 2, 4, 6]),
    ("pipe_z1_pp2_dp2_tied", "pp=3", ["--tied-layers", "embed=0,1000000000"], "KEY=N"),
    ("pipe_z1_pp2_dp2_tied", "pp=3", ["--tied-layers", "embed"], "KEY=N"),
    ("pipe_z1_pp2_dp2_tied", "pp=2,stage=2", [], "AssertionError"),
    ("pipe_z1_pp2_dp2_tied", "pp=2,sp=2", [], "sequence-parallel"),
    ("pipe_z1_pp2_dp2_tied", "pp=2,stage=0", [], "stage 0"),
    ("z1_bf16_dp2", "pp=2", [], "not of a PipelineModule"),
    ("pipe_z1_pp2_dp1", "tp=2", [], "does not say how its tensors are cut"),
    ("pipe_tp2_pp2_dp2", "tp=5,dp=1", [], "equal shares"),
    ("pipe_tp2_pp2_dp2", "tp=4,dp=1", [], "--padded-vocab-size"),
    ("pipe_tp2_pp2_dp2", "tp=1,dp=1", ["--padded-vocab-size", "12"], "smaller than"),
    ("pipe_tp2_pp2_dp2", "tp=1,dp=1", ["--num-kv-heads", "2"], "equal shares"),
    ("pipe_tp2_pp2_dp2", "pp=3,dp=1", [], "not certain"),
    ("z1_bf16_dp2", "dp=1", ["--num-layers", "2"], "leave them out"),
]
counted = {"folders": 0, "refusals": 0}


def run(*args, status=0):
    result = subprocess.run([PROGRAM, *args], capture_output=True, text=True)
    if result.returncode != status:
        sys.exit(f"FAILED: isoshard {' '.join(args)}: {result.returncode}, expected {status}\n"
                 f"{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.stdout if status == 0 else result.stderr


def ckpt(case):
    return os.path.join(TRACES, "deepspeed", case, "ckpt")


def tag_of(path):
    return os.path.join(path, open(os.path.join(path, "latest")).read())


def sections(path):
    return json.loads(run("digest", path, "--json"))["sections"]


def slices_of(path, mp_rank):
    """What each partition rank of a stage holds, by group."""
    files = [name for name in os.listdir(tag_of(path)) if f"{mp_rank}_optim" in name]
    return [group for name in files
            for group in compare_torch.load(os.path.join(tag_of(path), name))
            ["optimizer_state_dict"]["param_slice_mappings"]]


def layers_by_stage(path):
    """[layers with parameters, keys of tied modules] of every stage's param_shapes."""
    found = []
    topology = json.loads(run("inspect", path, "--json").splitlines()[0])["to"]
    ranks = int(topology.split("tp=")[1].split(",")[0])
    files = sorted(name for name in os.listdir(tag_of(path)) if name.startswith("mp_rank_"))
    for rank, name in enumerate(files):
        if rank % ranks == 0:  # tensor-parallel ranks of a stage name the same
            groups = compare_torch.load(os.path.join(tag_of(path), name))["param_shapes"]
            if groups is None:  # stage 0
                groups = slices_of(path, f"mp_rank_{rank:02}")
            names = {name for group in groups for name in group}
            found.append((sorted({int(n.split(".")[0]) for n in names if n[0].isdigit()}),
                          sorted({n.split(".")[1] for n in names if not n[0].isdigit()})))
    return found


def is_tied(case):
    return any(word in case for word in ("tied", "bf16", "tp2", "z0"))


def head_of(case):
    return 7 if "pipe_bf16" in case else 4 if "tp2" in case else 5


def expected_layers(case, parts):
    """From the models of the recordings: all between layer 0 and the head are blocks (of the bf16
    model the first four); 0 and the head are embeddings."""
    tied, head = is_tied(case), head_of(case)
    stages = []
    for begin, end in zip(parts, parts[1:]):
        inside = [layer for layer in range(begin, end)
                  if 1 <= layer < min(head, 5) or (not tied and layer in (0, head))]
        stages.append((inside, ["embed"] * (tied and any(begin <= x < end for x in (0, head)))))
    return stages


def check_target(case, target, parts):
    found, wanted = layers_by_stage(target), expected_layers(case, parts)
    if found != wanted:
        sys.exit(f"FAILED: {case}: stages {found}, expected {wanted}")
    if sections(target) != sections(ckpt(case)):
        sys.exit(f"FAILED: {case} at {parts}: another digest")
    if not run("verify", target).startswith("VERIFIED"):
        sys.exit(f"FAILED: {case} at {parts}: not VERIFIED")
    for name in os.listdir(tag_of(ckpt(case))):
        if name.startswith("layer_"):
            with open(os.path.join(tag_of(ckpt(case)), name), "rb") as a, \
                    open(os.path.join(tag_of(target), name), "rb") as b:
                if a.read() != b.read():
                    sys.exit(f"FAILED: {case}: {name} is not the source's")
    counted["folders"] += 1


def told(case, parts):
    """Flags for a target of these parts; the last function and head of the bf16 model stand later,
    the head of the tensor-parallel one before."""
    shift = 3 if "pipe_bf16" in case else -1 if "tp2" in case else 0
    parts = parts[:-1] + [parts[-1] + shift]
    tied = ["--tied-layers", f"embed=0,{head_of(case)}"] if is_tied(case) else []
    return parts, ["--pp-parts", ",".join(map(str, parts)), *tied]


def there_and_back(case, own, work):
    source = ckpt(case)
    topology = json.loads(run("inspect", source, "--json").splitlines()[0])["to"]
    same = os.path.join(work, "same")
    run("reshard", source, same, "--to", topology, "--quiet")
    # DeepSpeed's own after a load elsewhere: the config is the other run's.
    wrong = compare_torch.compare_paths(source, same, [], []).differences
    if wrong:
        sys.exit(f"FAILED: {case} to its own topology\n" + "\n".join(map(str, wrong[:10])))
    flags = told(case, own)[1]
    flags[1] = ",".join(map(str, own))
    for number, (degree, plain) in enumerate(TARGETS):
        parts, there_flags = told(case, plain)
        there, back = (os.path.join(work, f"{way}{number}") for way in ("there", "back"))
        run("reshard", source, there, "--to", f"pp={len(parts) - 1},dp={degree}", "--quiet",
            *there_flags)
        check_target(case, there, parts)
        run("reshard", there, back, "--to", topology, "--quiet", *flags)
        wrong = compare_torch.compare_paths(same, back, [], []).differences
        if wrong:
            sys.exit(f"FAILED: {case} to {parts} and back\n" + "\n".join(map(str, wrong[:10])))


def squares(work):
    """pp·tp·dp 2·2·2 to those of DeepSpeed's own reshape test, by every way of two steps; 16 rows
    of vocabulary fit every tp."""
    degrees = [(1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 4, 1)]
    ends = {1: "0,5", 2: "0,3,5"}

    def reshard(source, name, degree):
        pp, tp, dp = degree
        before = json.loads(run("inspect", source, "--json").splitlines()[0])["to"]
        rows = [] if f"tp={tp}," in before else ["--padded-vocab-size", "16"]
        target = os.path.join(work, name)
        run("reshard", source, target, "--to", f"pp={pp},tp={tp},dp={dp}", "--pp-parts", ends[pp],
            "--tied-layers", "embed=0,4", "--quiet", *rows)
        counted["folders"] += 1
        return target

    source = reshard(ckpt("pipe_tp2_pp2_dp2"), "wide", (2, 4, 2))
    expected = sections(ckpt("pipe_tp2_pp2_dp2"))
    direct = {degree: reshard(source, f"direct{degree}", degree) for degree in degrees}
    for first in degrees:
        for last in degrees:
            again = reshard(direct[first], f"{first}{last}", last)
            wrong = compare_torch.compare_paths(direct[last], again, [], []).differences
            if wrong or sections(again) != expected:
                sys.exit(f"FAILED: by {first} to {last}\n" + "\n".join(map(str, wrong[:10])))


def layers_of_ranks(work):
    """Layer files of tensor-parallel ranks: one missing, one too many."""
    for number, (gone, new, words) in enumerate((
            ("layer_02-model_01-model_states.pt", "", "a layer's file is missing"),
            ("", "layer_02-model_02-model_states.pt", "does not have the name"),
            ("", "layer_02-model_states.pt", "does not have the name"))):
        source = shutil.copytree(ckpt("pipe_tp2_pp2_dp2"), os.path.join(work, f"layers{number}"))
        if new:
            shutil.copy(os.path.join(tag_of(source), "layer_02-model_00-model_states.pt"),
                        os.path.join(tag_of(source), new))
        else:
            os.remove(os.path.join(tag_of(source), gone))
        if words not in run("digest", source, status=2):
            sys.exit(f"FAILED: {gone}{new} is not named")
        counted["refusals"] += 1


def what_ranks_say(work):
    """mp ranks that contradict each other; older files without degrees; a map's only rule."""
    source, number = ckpt("pipe_tp2_pp2_dp2"), 0
    for only, old, new, words in (
            ("mp_rank_03_model", b"tp_degree", b"tp_degrez", "checkpoint_parallel_dimensions"),
            ("mp_rank_02_model", b"tp_replicated_parameter_patterns",
             b"tp_replicated_parameter_patternz", "different things of how tensors are cut"),
            ("mp_rank_01_model", b"original_vocab_size", b"original_vocab_sizf",
             "different things of how tensors are cut")):
        number += 1
        damaged = hostile.ZeroFolder(hostile.Path(source)).replace(old, new, only)
        message = run("digest", str(damaged.write(hostile.Path(work) / f"said{number}")), status=2)
        if words not in message and "tp_degree" not in message:
            sys.exit(f"FAILED: {only}: {message}")
        counted["refusals"] += 1
    older = hostile.ZeroFolder(hostile.Path(source)).replace(
        b"checkpoint_parallel_dimensions", b"checkpoint_parallel_dimensionz", "_model_states")
    older = str(older.write(hostile.Path(work) / "older"))
    if "tp=2,pp=2" not in run("inspect", older):
        sys.exit("FAILED: degrees of an older pipeline")
    universal = os.path.join(work, "universal")
    run("convert", older, universal, "--to", "universal", "--quiet")
    if sections(older)["weights"] != sections(universal)["weights"]:
        sys.exit("FAILED: an older pipeline's universal form")
    counted["folders"] += 1


def stage_zero(work):
    """bf16 at stage 0 and at stage 1: the same state, there and back; the model file's copy of the
    optimizer counts; what the layers' files lack cannot be named."""
    source = ckpt("pipe_z0_bf16_pp2_dp2")
    one, back = os.path.join(work, "one"), os.path.join(work, "back")
    run("reshard", source, one, "--to", "stage=1", "--quiet")
    run("reshard", one, back, "--to", "stage=0", "--quiet")
    if compare_torch.compare_paths(source, back, [], []).differences:
        sys.exit("FAILED: stage 0 to stage 1 and back")
    if sections(one) != sections(source):
        sys.exit("FAILED: stage 0 to stage 1: another digest")
    for number, (only, inside, words) in enumerate((
            ("mp_rank_01_model", "optimizer", "differ"), ("layer_03", "layer", "layer's file"))):
        damaged = os.path.join(work, f"damaged{number}")
        folder = hostile.ZeroFolder(hostile.Path(source))
        for name, (_, records) in folder.files.items():
            if only in name and inside == "optimizer":
                largest = max((key for key in records if key.startswith("data/")),
                              key=lambda key: len(records[key]))
                data = bytearray(records[largest])
                data[5] ^= 1
                records[largest] = bytes(data)
        if inside == "layer":
            folder.files = {name: file for name, file in folder.files.items() if only not in name}
        folder.write(hostile.Path(damaged))
        result = subprocess.run([PROGRAM, "verify", damaged], capture_output=True, text=True)
        if result.returncode == 0 or words not in result.stdout + result.stderr:
            sys.exit(f"FAILED: {only}: {result}")
        counted["refusals"] += 1


def config_and_export(work):
    config = os.path.join(work, "ds.json")
    for stages, world, expected in ((None, 4, "dp2.pp2"), ("auto", 2, "dp1.pp2"), (1, 3, "dp3"),
                                    (None, 3, "a multiple of 2"), (3, 4, "a multiple of 3")):
        with open(config, "w") as file:
            json.dump({"zero_optimization": {"stage": 1}, "pipeline": {"stages": stages} if stages
                       else {}}, file)
        target = os.path.join(work, f"{stages}{world}")
        refused = expected.startswith("a ")
        text = run("reshard", ckpt("pipe_z1_pp2_dp1"), target, "--to-config", config, "--world",
                   str(world), status=2 if refused else 0)
        if expected not in text:
            sys.exit(f"FAILED: --to-config, stages {stages}, world {world}: {text}")
    for name, source in (("two", ckpt("pipe_z1_pp2_dp1")), ("one", os.path.join(work, "13"))):
        run("export", source, os.path.join(work, name), "--no-config", "--quiet")
    if sections(os.path.join(work, "one")) != sections(os.path.join(work, "two")):
        sys.exit("FAILED: an export of one stage differs from that of two")


def a_layer_without_its_buffer(work):
    folder = hostile.ZeroFolder(ckpt("pipe_frozen_pp2_dp2"))
    folder.replace(hostile.text("scale"), hostile.text("other"), only="layer_01")
    message = run("digest", str(folder.write(os.path.join(work, "source"))), status=2)
    if "lacks a buffer" not in message or '"1.scale"' not in message:
        sys.exit(f"FAILED: {message}")


def layer_names(work):
    for name, keep, words in (("layer_5-model_states.pt", False, "name that DeepSpeed gives"),
                              ("layer_2147483647-model_states.pt", True, "name that DeepSpeed"),
                              ("layer_05-model_00-model_states.pt", True, "Two files are of one")):
        source = shutil.copytree(ckpt("pipe_z1_pp2_dp1"), os.path.join(work, name))
        layer = os.path.join(tag_of(source), "layer_05-model_states.pt")
        shutil.copy(layer, os.path.join(tag_of(source), name))
        if not keep:
            os.remove(layer)
        message = run("digest", source, status=2)
        if words not in message:
            sys.exit(f"FAILED: {name}: {message}")


def main():
    recorded = {name for name in os.listdir(os.path.join(TRACES, "deepspeed"))
                if name.startswith("pipe_")}
    if recorded != set(PARTS):
        sys.exit(f"FAILED: no parts for {recorded ^ set(PARTS)}")
    for case, parts in PARTS.items():
        with tempfile.TemporaryDirectory() as work:
            there_and_back(case, parts, work)
    for case, target, flags, expected in SAID:
        with tempfile.TemporaryDirectory() as work:
            command = ["reshard", ckpt(case), os.path.join(work, "out"), "--to", target, *flags]
            if isinstance(expected, str):
                message = run(*command, status=2)
                if expected not in message or os.listdir(work):
                    sys.exit(f"FAILED: {command}: no {expected!r} in\n{message}")
                counted["refusals"] += 1
            else:
                run(*command, "--quiet")
                check_target(case, os.path.join(work, "out"), expected)
    with tempfile.TemporaryDirectory() as work:
        config_and_export(work)
    with tempfile.TemporaryDirectory() as work:
        squares(work)
    with tempfile.TemporaryDirectory() as work:
        stage_zero(work)
        what_ranks_say(work)
    with tempfile.TemporaryDirectory() as work:
        layer_names(work)
        layers_of_ranks(work)
        a_layer_without_its_buffer(work)
    stages = json.loads(run("inspect", ckpt("pipe_z1_pp2_dp2_tied"), "--json").splitlines()[0])
    if stages["stages"] != ["1 2, tied embed", "3 4, tied embed"]:
        sys.exit(f"FAILED: {stages['stages']}")
    with tempfile.TemporaryDirectory() as work:
        source = os.path.join(TRACES, "deepspeed", "pipe_z1_pp2_dp1", "universal")
        message = run("reshard", source, work + "/out", "--to", "pp=1", status=2)
        if "layer files" not in message:
            sys.exit(f"FAILED: {message}")
        message = run("convert", ckpt("pipe_frozen_pp2_dp2"), work + "/out", "--to", "universal",
                      status=2)
        if "frozen parameters" not in message:
            sys.exit(f"FAILED: {message}")
    print(f"{counted['folders']} targets, {counted['refusals'] + 2} refusals")


main()
