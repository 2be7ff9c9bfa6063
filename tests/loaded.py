#!/usr/bin/env python3
"""tests/loaded.py PROGRAM TRACES: what we reshard equals what DeepSpeed saves after loading there.

Each case A_to_B of traces/deepspeed/ was made by the real DeepSpeed, which loaded the universal
form of A under topology B and saved at once. Our `reshard` of A, from its own and from its
universal form, gives the same files; and back again the files of A. Not compared: ds_config (the
target run's own), and the name of the experts' group, which DeepSpeed leaves stale.
"""

import json
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "scripts"))
import compare_torch  # noqa: E402

PROGRAM, TRACES = sys.argv[1:3]
TIED = ["--tied-layers", "embed=0,7"]
MOST = ["--moe-max-group-size", "330"]
# case → (--to, flags there, flags back)
CASES = {
    "z1_dp2_to_z1_dp4": ("dp=4", [], []),
    "z1_dp2_to_z2_dp3": ("dp=3,stage=2", [], []),
    "z3_dp3_to_z3_dp2": ("dp=2", [], []),
    "autoep_ep2_to_ep1_dp2": ("ep=1,dp=2", [], []),
    "autoep_ep2_to_ep4_dp4": ("ep=4,dp=4", [], []),
    "autoep_z3_ep2_to_ep4_dp4": ("ep=4,dp=4", [], []),
    "autotp_tp2_to_tp1_dp2": ("tp=1,dp=2", [], ["--num-kv-heads", "2", "--split-like", "SOURCE"]),
    "autotp_tp2_to_tp4_dp1": ("tp=4,dp=1", ["--num-kv-heads", "2"], ["--num-kv-heads", "2"]),
    "pipe_pp2_to_pp1_dp2": ("pp=1,dp=2", [], ["--pp-parts", "0,3,6"]),
    "pipe_tied_pp2_to_pp3_dp1": ("pp=3,dp=1", ["--pp-parts", "0,2,4,6"], ["--pp-parts", "0,3,6"]),
    "pipe_bf16_pp3_to_pp2_dp1": ("pp=2,dp=1", ["--pp-parts", "0,3,9", *TIED],
                                 ["--partition-method", "parameters", "--num-layers", "9", *TIED]),
    "pipe_tp2_to_tp1_pp2_dp2": ("tp=1,dp=2", ["--padded-vocab-size", "13"],
                                ["--padded-vocab-size", "14"]),
    "pipe_tp2_to_tp4_pp1_dp1": ("tp=4,pp=1,dp=1", ["--padded-vocab-size", "16"],
                                ["--padded-vocab-size", "14", "--pp-parts", "0,3,5",
                                 "--tied-layers", "embed=0,4"]),
    # Made from our own reshard, by a plain load: DeepSpeed's universal form loses what is frozen.
    "pipe_frozen_pp2_to_pp1_dp1": ("pp=1,dp=1", [], ["--pp-parts", "0,3,6"]),
    # Made from our own reshard, by a plain load: DeepSpeed cannot change the ep of native MoE.
    "moe2_ep2_to_ep1_dp2": ("ep=1,dp=2", [], []),
    "moe2_groups_ep2_to_ep1_dp2": ("ep=1,dp=2", MOST, MOST),
}
# DeepSpeed keeps the source's name of the experts' group (docs/deepspeed_errata.md).
STALE_NAME = r"\['param_groups'\]\[1\]\['name'\]"
IGNORED = [r"\['ds_config'\]", STALE_NAME]
# At stage 3 it lets all sub-groups share one step (row 40 there).
SHARED_STEP = [r"\['step'\]\.tie"]
PADDING = [r"\['fp32_flat_groups'\]\[\d+\]$"]  # of stage 3: never initialised by DeepSpeed
# The padding rows of a vocabulary are no state: at another tp they begin anew, as zeros.
ROWS = [r"\['single_partition_of_fp32_groups'\]\[0\]$", r"^\['weight'\]$"]


def run(*args):
    result = subprocess.run([PROGRAM, *args, "--quiet"], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"FAILED: isoshard {' '.join(args)}: {result.returncode}\n{result.stderr}")
    return result.stdout


def equal(what, expected, found, ignored):
    wrong = compare_torch.compare_paths(expected, found, ignored, []).differences
    if wrong:
        sys.exit(f"FAILED: {what}\n" + "\n".join(str(item) for item in wrong[:10]))


def own_topology(path):
    text = subprocess.run([PROGRAM, "inspect", path, "--json"], capture_output=True, text=True)
    return json.loads(text.stdout.splitlines()[0])["to"]


def main():
    folder = os.path.join(TRACES, "deepspeed")
    unknown = {name for name in os.listdir(folder) if "_to_" in name} - set(CASES)
    if unknown:
        sys.exit(f"FAILED: no line for {unknown}")
    for case, (target, there, back) in CASES.items():
        with open(os.path.join(folder, case, "case.json")) as file:
            source = os.path.join(folder, os.path.dirname(json.load(file)["load_from"]))
        ckpt, expected = os.path.join(source, "ckpt"), os.path.join(folder, case, "ckpt")
        tag = open(os.path.join(expected, "latest")).read()
        with tempfile.TemporaryDirectory() as work:
            ours, again, home = (os.path.join(work, name) for name in ("ours", "again", "home"))
            run("reshard", ckpt, ours, "--to", target, *there)
            shared = SHARED_STEP if case == "autoep_z3_ep2_to_ep4_dp4" else []
            equal(case, expected, ours, IGNORED + PADDING + shared)
            flags = [ckpt if flag == "SOURCE" else flag for flag in back]
            run("reshard", expected, home, "--to", own_topology(ckpt), *flags)
            rows = ROWS if case.startswith("pipe_tp2") else []
            equal(case + " and back", ckpt, home, IGNORED + PADDING + rows)
            if run("digest", ckpt) != run("digest", home):
                sys.exit(f"FAILED: {case} and back: another digest")
            if case.startswith("pipe"):  # a universal folder lacks the layers' files
                continue
            universal = os.path.join(source, "universal")
            if not os.path.isdir(universal):
                universal = os.path.join(work, "universal")
                run("convert", ckpt, os.path.join(universal, tag), "--to", "universal")
            run("reshard", universal, again, "--to", target, "--tag-out", tag, *there)
            equal(case + " from universal", ours, again, [])
    print(f"{len(CASES)} cases: there, from universal, and back")


main()
