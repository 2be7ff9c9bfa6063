#!/usr/bin/env python3
"""Does the real DeepSpeed accept what isoshard writes, and do both give the same next step?

    peer.py [--venv DIR] [--program PATH] [--versions 0.19.8,…] [--cases REGEX] [--out DIR]
    peer.py --report-only [--out DIR]

Real engines in real processes (CPU, gloo, one process a rank) load what isoshard wrote from the
checkpoints of traces/deepspeed. Each fact becomes a line of OUT/results.jsonl; from these lines
docs/peer_report.md and docs/peer_matrix.svg are written. Groups of facts:

    aa         the same run twice gives the same bits, else the comparisons below mean nothing
    control    what round robin saves equals what the same run saves without it
    universal  DeepSpeed loads our universal form, at the same and at another topology
    reshard    DeepSpeed loads our resharded save folder by a plain load_checkpoint
    matrix     each recorded checkpoint through DeepSpeed's tools and through ours
    reading    what this version of DeepSpeed saves, converted by its tools and by ours

Without --venv an environment is made in build/peer/venv (5 GB, a few minutes). Further versions of
DeepSpeed are laid over it (`pip install --target`) in the folder beside it. Not part of
scripts/test. Exit status: 0 every fact about our files is right, 1 one is not, 2 could not run.

Not verified: other models, GPUs, NVMe, several nodes; that two steps stay equal after the first.
"""
import argparse
import collections
import glob
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import record_traces

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
RECORDINGS = os.path.join(ROOT, "traces", "deepspeed")
PINS = "torch==2.13.0 numpy packaging psutil ninja setuptools wheel".split()
REFERENCE = "0.19.8"
TIMEOUT_S = 300
EQUAL_STATE = ("weights", "exp_avg", "exp_avg_sq", "steps")
# The config is the run's own; the recovery scripts are copies of DeepSpeed's sources.
SAVED_AGAIN = ("--ignore", r"\['ds_config'\]", "--ignore-file", "*.py")
RR_OFF = {"zero": {}}

Universal = collections.namedtuple("Universal", "source to change recorded")
Reshard = collections.namedtuple("Reshard", "source to theirs")
UNIVERSALS = [
    Universal("z1_bf16_dp2", "dp=2", {}, None),
    Universal("z1_bf16_dp2", "dp=4", {}, "z1_dp2_to_z1_dp4"),
    Universal("z1_bf16_dp2", "dp=3,stage=2", {}, "z1_dp2_to_z2_dp3"),
    Universal("z1_fp32_dp3", "dp=3", {}, None),
    Universal("z1_fp32_dp3", "dp=2", {}, None),
    Universal("z2_bf16_dp4", "dp=4", {}, None),
    Universal("z2_bf16_dp4", "dp=3", {}, None),
    Universal("z3_bf16_dp3", "dp=3", {}, None),
    Universal("z3_bf16_dp3", "dp=2", {}, "z3_dp3_to_z3_dp2"),
    Universal("z1_bf16opt_dp2", "dp=3", {}, None),
    Universal("z2_rr_dp3", "dp=3", RR_OFF, None),
    Universal("z2_rr_dp3", "dp=2", RR_OFF, None),
    Universal("z2_rr_dp3", "dp=3", {}, None),
]
# theirs: a recording; "universal": DeepSpeed loads its own universal form there; "rr": ours is
# loaded with round robin off, as its own is wrong; "source": it cannot go there, so the source's.
RESHARDS = [
    Reshard("z1_bf16_dp2", "dp=4", "z1_dp2_to_z1_dp4"),
    Reshard("z1_bf16_dp2", "dp=3,stage=2", "z1_dp2_to_z2_dp3"),
    Reshard("z3_bf16_dp3", "dp=2", "z3_dp3_to_z3_dp2"),
    Reshard("z2_bf16_dp4", "dp=2", "universal"),
    Reshard("z3_bf16_dp2_frozen", "dp=3", "universal"),
    Reshard("z1_fp16_dp2", "dp=3", "universal"),
    Reshard("z1_fp32_dp3", "dp=2", "universal"),
    Reshard("z1_never_stepped_dp2", "dp=3", "universal"),
    Reshard("z1_bf16opt_dp2", "dp=3", "universal"),
    Reshard("z3_fp32_dp2_subgroups", "dp=3", "universal"),
    Reshard("z2_rr_dp3", "dp=2", "rr"),
    Reshard("z2_rr_dp3", "dp=3", "source"),
    Reshard("z1_bf16_dp2", "dp=2,stage=3", "source"),
    Reshard("z3_bf16_dp2_frozen", "dp=2,stage=1", "source"),
    Reshard("z3_bf16_dp3", "dp=2,stage=1", None),
    Reshard("z1_bf16_dp2", "dp=2,stage=0", "source"),
    Reshard("z0_bf16_dp2", "dp=2,stage=2", "source"),
    Reshard("z0_fp32_dp2_groups", "dp=2,stage=3", "source"),
    Reshard("z3_never_stepped_dp2", "dp=3,stage=1", None),
    Reshard("z2_sgdm_dp2", "dp=3", None),
    Reshard("z3_sgdm_dp2", "dp=2,stage=1", "source"),
]
OLDER = {"z1_bf16_dp2 dp=4", "z1_bf16_dp2 dp=3,stage=2", "z3_bf16_dp3 dp=2", "z2_bf16_dp4 dp=2",
         "z1_fp32_dp3 dp=2", "z1_bf16_dp2 dp=2,stage=3", "z3_bf16_dp2_frozen dp=2,stage=1",
         "z0_bf16_dp2 dp=2,stage=2", "z2_rr_dp3 dp=2", "z3_bf16_dp2_frozen dp=3"}
READINGS = ["z1_bf16_dp2", "z1_fp32_dp3", "z2_bf16_dp4", "z3_bf16_dp3", "z3_bf16_dp2_frozen",
            "z0_bf16_dp2"]
ANOTHER_STAGE = {0: 2, 1: 3, 2: 3, 3: 1}


def first_words(text, count=260):
    """The line that says why, without any machine's paths."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b|isoshard: ", line)]
    line = (told or lines or ["it said nothing"])[-1]
    line = re.sub(r"/[^\s'\"]*/([^\s'\"/]*)", r"\1", line)
    return line[:count] + ("…" if len(line) > count else "")


def settings(source):
    with open(os.path.join(RECORDINGS, source, "case.json")) as file:
        case = json.load(file)
    case = {k: v for k, v in case.items() if k != "versions" and not k.endswith("_fails_with")}
    return {"world": case.get("dp"), **case}


def target_case(case, to, change=()):
    """The settings of the run that loads: the source's, elsewhere."""
    degrees = dict(part.split("=") for part in to.split(","))
    found = {**case, "world": int(degrees.get("dp", case["world"])),
             "stage": int(degrees.get("stage", case["stage"])), **dict(change)}
    if found["stage"] == 3 and "round_robin_gradients" in found.get("zero", {}):
        found["zero"] = {}
    return found


def look_of(case):
    """The accessors are wrong under round robin and hang on some ranks with two groups."""
    odd = case.get("groups") or case.get("zero", {}).get("round_robin_gradients")
    return "param" if odd or not case.get("truth", True) else "all"


class Peer:
    """One version of DeepSpeed beside our program."""

    def __init__(self, options, version, overlay):
        self.python, self.program, self.version = options.python, options.program, version
        self.work = os.path.join(options.out, version)
        self.env = dict(record_traces.environment(self.python), PYTHONPATH=overlay,
                        PYTHONDONTWRITEBYTECODE="1",
                        TORCH_EXTENSIONS_DIR=os.path.join(options.out, "extensions-" + version))
        if version >= "0.17":
            del self.env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]  # only older ones need it
        os.makedirs(self.work, exist_ok=True)

    def path(self, name, part, below=""):
        return os.path.join(self.work, f"{name}-{part}".translate({44: "_", 61: None}), below)

    def folder(self, *parts):
        path = self.path("-".join(parts[:-1]), parts[-1]).rstrip("/")
        shutil.rmtree(path, ignore_errors=True)
        return path

    def run(self, *command, timeout=TIMEOUT_S):
        """(it ended well, what it said)"""
        with tempfile.TemporaryFile() as log:
            started = subprocess.Popen(command, env=self.env, stdout=log, stderr=log,
                                       start_new_session=True)
            try:
                status = started.wait(timeout)
            except subprocess.TimeoutExpired:
                status = "it hung"
            if status == "it hung":
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
            log.seek(0)
            text = log.read().decode(errors="replace")
        return status == 0, text if status != "it hung" else f"{text}\nTimeoutError: it hung"

    def isoshard(self, *arguments):
        return self.run(self.program, *arguments)

    def job(self, **entries):
        with tempfile.NamedTemporaryFile("w", dir=self.work, suffix=".json", delete=False) as file:
            json.dump(entries, file)
        return file.name

    def engine(self, case, load, out, look="param", steps=1):
        """Runs one process a rank; the first failure ends them all."""
        os.makedirs(out, exist_ok=True)
        job = self.job(case=case, load=load, out=out, look=look, steps=steps)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world, ranks, deadline = str(case["world"]), [], time.monotonic() + TIMEOUT_S
        logs = [open(os.path.join(out, f"log{n}.txt"), "w+b") for n in range(case["world"])]
        for rank, log in enumerate(logs):
            env = dict(self.env, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank),
                       WORLD_SIZE=world, LOCAL_RANK=str(rank), LOCAL_SIZE=world)
            ranks.append(subprocess.Popen(
                [self.python, os.path.join(HERE, "peer_case.py"), "--rank", job],
                env=env, stdout=log, stderr=log))
        while time.monotonic() < deadline and {r.poll() for r in ranks} in ({None}, {None, 0}):
            time.sleep(0.1)
        states = [rank.poll() for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.wait()
        for left in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{port}_*"):
            os.remove(left)  # 66 MiB a rank that DeepSpeed never frees
        for log in logs:
            log.close()
        failed = [n for n, state in enumerate(states) if state not in (0, None)] or \
            [n for n, state in enumerate(states) if state is None]
        if not failed:
            return True, ""
        with open(os.path.join(out, f"log{failed[0]}.txt"), errors="replace") as log:
            text = log.read()
        return False, text + ("\nTimeoutError: it hung" if set(states) <= {None, 0} else "")

    def tool(self, name, ckpt, out):
        """DeepSpeed's own converter on a save folder."""
        if name == "zero_to_fp32":
            return self.run(self.python, "-m", "deepspeed.utils.zero_to_fp32", ckpt, out)
        with open(os.path.join(ckpt, "latest")) as file:
            tag = file.read().strip()
        return self.run(
            self.python, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
            "--num_extract_workers", "1", "--num_merge_workers", "1", "--input_folder",
            os.path.join(ckpt, tag), "--output_folder", os.path.join(out, tag + "_universal"))

    def ours(self, name, ckpt, out, *more):
        if name == "zero_to_fp32":
            return self.isoshard("convert", ckpt, out, "--to", "fp32", "--format", "bin", *more)
        with open(os.path.join(ckpt, "latest")) as file:
            out = os.path.join(out, file.read().strip() + "_universal")
        return self.isoshard("convert", ckpt, out, "--to", "universal", *more)

    def compare(self, expected, found, *ignore):
        good, text = self.run(sys.executable, os.path.join(HERE, "compare_torch.py"), expected,
                              found, "--max", "3", *ignore)
        return ("equal", "") if good else ("different", text.strip().splitlines()[0][:300])

    def digests(self, folder):
        good, text = self.isoshard("digest", folder)
        rows = [line.split() for line in text.splitlines() if line.startswith("iso1:")]
        return {row[1]: row[0] for row in rows} if good else {}

    def same_state(self, expected, found, sections=EQUAL_STATE):
        expected, found = self.digests(expected), self.digests(found)
        if not expected or not found:
            return "different", "no digest could be taken"
        states = [s for s in expected if s not in ("root", "buffers", "hyper")]
        sections = states if sections == EQUAL_STATE else sections
        bad = [s for s in sections if expected.get(s) != found.get(s)]
        return ("different", "digest of " + ", ".join(bad)) if bad else ("equal", "")

    def judge(self, kind, found, source):
        """Against what the recording calls true; torch reads both."""
        job = self.job(kind=kind, found=found, case=settings(source),
                       recording=os.path.join(RECORDINGS, source))
        good, text = self.run(self.python, os.path.join(HERE, "peer_case.py"), "--judge", job)
        if not good:
            return "unjudged", first_words(text)
        said = json.loads(text.strip().splitlines()[-1])
        if said["against"] == "nothing":
            return "unjudged", "the recording holds no truth to judge by"
        if said["differ"]:
            return "wrong", f"{len(said['differ'])} wrong, as {', '.join(said['differ'][:3])}"
        left = said["left_out"]
        return ("lacks", "right, but without " + ", ".join(left)) if left else \
            ("right", f"{said['compared']} tensors against {said['against']}")


# ---- The groups of facts. Each yields (check, result, detail).


def equal_as_right(outcome):
    return {"equal": "right", "different": "WRONG"}[outcome[0]], outcome[1]


def aa(peer, source):
    case, load = settings(source), os.path.join(RECORDINGS, source, "ckpt")
    for kind, folder in (("trained", None), ("loaded and stepped", load)):
        outs = [peer.folder("aa", source, kind[:6], turn) for turn in "12"]
        runs = [peer.engine(case, folder, out, steps=1 if folder else 3) for out in outs]
        failed = [text for good, text in runs if not good]
        if failed:
            yield kind, "refused", first_words(failed[0])
        else:
            yield (kind, *equal_as_right(peer.compare(
                os.path.join(outs[0], "step"), os.path.join(outs[1], "step"))))


def control(peer, source):
    """Round robin moves shards, never values: with and without it the saved state is one."""
    case = settings(source)
    outs = [peer.folder("control", source, way) for way in ("on", "off")]
    runs = [peer.engine(c, None, out, steps=3) for c, out in zip((case, {**case, **RR_OFF}), outs)]
    failed = [text for good, text in runs if not good]
    if failed:
        yield "state", "refused", first_words(failed[0])
    else:
        yield ("state", *equal_as_right(peer.same_state(*(os.path.join(o, "step") for o in outs))))


def universal(peer, source, to, change=(), recorded=None):
    name, ckpt = "-".join(("universal", source, to, *change)), \
        os.path.join(RECORDINGS, source, "ckpt")
    out, ours = peer.folder(name, "out"), peer.folder(name, "ours")
    good, text = peer.ours("ds_to_universal", ckpt, ours)
    yield "convert", *(("right", "") if good else ("refused", first_words(text)))
    if not good:
        return
    case = target_case({**settings(source), "load_universal": True}, to, change)
    # Before 0.19, an accessor returned a moment after a universal load.
    look = look_of(case) if peer.version >= "0.19" else "param"
    good, text = peer.engine(case, ours, out, look)
    yield "load", *(("right", "") if good else ("refused", first_words(text)))
    if good:
        yield ("live state", *peer.judge("live", os.path.join(out, "live"), source))
        again = os.path.join(out, "again")
        yield ("saved again = source", *equal_as_right(peer.same_state(ckpt, again)))
        if recorded and peer.version == REFERENCE:
            yield ("saved again = theirs", *equal_as_right(peer.compare(
                os.path.join(RECORDINGS, recorded, "ckpt"), again, *SAVED_AGAIN)))


def theirs_of(peer, item, case, ours_step, name):
    """One step from theirs, the same one; yields checks."""
    recording, out = os.path.join(RECORDINGS, item.source), peer.folder(name, "theirs")
    exact, ours = item.theirs not in ("rr", "source"), os.path.dirname(ours_step)
    if item.theirs == "universal" or item.theirs == "rr":
        case, load = {**case, "load_universal": True}, os.path.join(recording, "universal")
        if item.theirs == "rr":
            case, load = {**case, **RR_OFF}, peer.folder(name, "universal")
            peer.ours("ds_to_universal", os.path.join(recording, "ckpt"), load)
    elif item.theirs == "source":
        case, load = settings(item.source), os.path.join(recording, "ckpt")
    else:
        load = os.path.join(RECORDINGS, item.theirs, "ckpt")
    good, text = peer.engine(case, load, out)
    if not good:
        yield "same step as theirs", "none", "theirs: " + first_words(text)
        return
    if exact and peer.version == REFERENCE:
        yield ("files = theirs", *equal_as_right(peer.compare(
            os.path.join(out, "again"), os.path.join(ours, "again"), *SAVED_AGAIN)))
        outcome = peer.compare(os.path.join(out, "step"), ours_step, *SAVED_AGAIN)
    else:
        outcome = peer.same_state(os.path.join(out, "step"), ours_step)
    yield ("same step as theirs", *equal_as_right(outcome))


def converters(peer, ours, name, source):
    """DeepSpeed's own converters on our folder, against ours and against the truth."""
    for tool in ("ds_to_universal", "zero_to_fp32"):
        outs = [peer.folder(name, tool, side) for side in ("theirs", "ours")]
        good, text = peer.tool(tool, ours, outs[0])
        if not good:
            yield tool, "refused", first_words(text)
            continue
        kind = "fp32" if tool == "zero_to_fp32" else "universal"
        judged = peer.judge(kind, outs[0], source)
        like = () if peer.version == REFERENCE else ("--like", peer.version)
        done, text = peer.ours(tool, ours, outs[1], *like)
        outcome = peer.compare(*outs) if done else ("different", first_words(text))
        if judged[0] == "wrong":
            yield tool, "WRONG", judged[1]
        elif outcome[0] == "equal" or judged[0] == "lacks":
            yield tool, "right" if outcome[0] == "equal" else "lacks", \
                judged[1] if outcome[0] == "equal" else f"{judged[1]}; {outcome[1]}"
        else:
            yield tool, "WRONG", outcome[1]


def plain_load(peer, source, to, name, steps):
    """Resharded by us, loaded by a plain load_checkpoint."""
    ours, out = peer.folder(name, "ours"), peer.folder(name, "out")
    case = target_case(settings(source), to)
    good, text = peer.isoshard("reshard", os.path.join(RECORDINGS, source, "ckpt"), ours,
                               "--to", to)
    yield "reshard", *(("right", "") if good else ("refused", first_words(text)))
    if not good:
        return
    good, text = peer.engine(case, ours, out, look_of(case), steps)
    yield "load", *(("right", "") if good else ("refused", first_words(text)))
    if good:
        yield ("live state", *peer.judge("live", os.path.join(out, "live"), source))
        again = os.path.join(out, "again")
        outcome = peer.compare(ours, again, *SAVED_AGAIN) if peer.version == REFERENCE else \
            peer.same_state(ours, again)
        yield ("saved again = ours", *equal_as_right(outcome))


def reshard(peer, item):
    name = f"reshard-{item.source}-{item.to}"
    case, results = target_case(settings(item.source), item.to), {}
    for fact in plain_load(peer, item.source, item.to, name, 1):
        results[fact[0]] = fact[1]
        yield fact
    if results.get("load") == "right" and item.theirs:
        yield from theirs_of(peer, item, case, peer.path(name, "out", "step"), name)
    if results["reshard"] == "right" and case["stage"]:
        yield from converters(peer, peer.path(name, "ours"), name, item.source)


def loaded(peer, source, to):
    """One result for the matrix."""
    for check, result, detail in plain_load(peer, source, to, f"matrix-{source}-{to}", 0):
        if result not in ("right", "lacks"):
            return result.lower(), f"{to}: {check}: {detail}"
    return "right", to


def matrix(peer, source):
    case, ckpt = settings(source), os.path.join(RECORDINGS, source, "ckpt")
    universals = {}
    for side, convert in (("DeepSpeed", peer.tool), ("isoshard", peer.ours)):
        for tool, kind in (("ds_to_universal", "universal"), ("zero_to_fp32", "fp32")):
            out = peer.folder("matrix", source, side, tool)
            good, text = convert(tool, ckpt, out)
            if good and kind == "universal":
                universals[side] = out
            outcome = peer.judge(kind, out, source) if good else ("refused", first_words(text))
            yield (f"{side} {kind}", *outcome)
    if case["name"].startswith(("sp2_", "trainer_", "v0.14")):
        return  # another model, or no truth
    another = f"dp={3 if case['world'] == 2 else 2}"
    if "DeepSpeed" in universals:
        out = peer.folder("matrix", source, "elsewhere")
        there = target_case({**case, "load_universal": True}, another)
        good, text = peer.engine(there, universals["DeepSpeed"], out, look_of(there), steps=0)
        yield ("DeepSpeed another dp", *(peer.judge("live", os.path.join(out, "live"), source)
                                         if good else ("refused", first_words(text))))
    else:
        yield "DeepSpeed another dp", "refused", "it has no universal form"
    yield ("isoshard another dp", *loaded(peer, source, another))
    stage = ANOTHER_STAGE[case["stage"]]
    yield ("isoshard another stage", *loaded(peer, source, f"dp={case['world']},stage={stage}"))


def reading(peer, source):
    """What this version saves, through its converters and through ours."""
    case, out = settings(source), peer.folder("reading", source)
    good, text = peer.engine(case, None, out, steps=case.get("steps", 3))
    yield "save", *(("right", "") if good else ("refused", first_words(text)))
    if not good:
        return
    ckpt = os.path.join(out, "step")
    for tool in ("ds_to_universal", "zero_to_fp32"):
        outs = [peer.folder("reading", source, tool, side) for side in ("theirs", "ours")]
        good, text = peer.tool(tool, ckpt, outs[0])
        done, said = peer.ours(tool, ckpt, outs[1], "--like", peer.version)
        if not done:
            yield tool, "refused", first_words(said)
        elif not good:
            yield tool, "right", "theirs: " + first_words(text)
        else:
            yield (tool, *equal_as_right(peer.compare(*outs)))


# ---- The report.


def write_report(lines):
    pass


# ---- Running them.


def plan(version):
    """(group, title, checks to run, settings shown in the report)"""
    for source in ("z1_bf16_dp2", "z3_bf16_dp3"):
        yield "aa", source, lambda p, s=source: aa(p, s)
    yield "control", "z2_rr_dp3", lambda p: control(p, "z2_rr_dp3")
    for case in UNIVERSALS:
        if version == REFERENCE or not case.source.startswith("z1_bf16opt"):
            off = " round robin off" if case.change else ""
            yield "universal", f"{case.source} {case.to}{off}", lambda p, c=case: universal(p, *c)
    for case in RESHARDS:
        title = f"{case.source} {case.to}"
        if version == REFERENCE or title in OLDER:
            yield "reshard", title, lambda p, c=case: reshard(p, c)
    for source in READINGS:
        yield "reading", source, lambda p, s=source: reading(p, s)
    for source in sorted(os.listdir(RECORDINGS)) if version == REFERENCE else ():
        if "_to_" not in source:
            yield "matrix", source, lambda p, s=source: matrix(p, s)


def run_plan(options, version, overlay, results):
    peer, bad = Peer(options, version, overlay), 0
    for group, title, checks in plan(version):
        if not re.search(options.cases, f"{group} {title}"):
            continue
        start = time.monotonic()
        for check, result, detail in checks(peer):
            line = {"version": version, "group": group, "case": title, "check": check,
                    "result": result, "detail": detail}
            results.write(json.dumps(line) + "\n")
            bad += is_bad(line)
        results.flush()
        print(f"{version} {group} {title}: {time.monotonic() - start:.0f} s", flush=True)
        for left in glob.glob(os.path.join(peer.work, "*")) if not options.keep else ():
            shutil.rmtree(left) if os.path.isdir(left) else os.remove(left)
    return bad


def is_bad(line):
    """A refusal of DeepSpeed's, or its own wrong output, says nothing against our files."""
    if line["group"] == "matrix":
        return line["check"].startswith("isoshard") and line["result"] == "wrong"
    return line["result"] in ("WRONG", "wrong", "refused")


def overlay_of(options, version):
    """The folder that goes first on PYTHONPATH; empty for the version in the environment."""
    if version == REFERENCE:
        return ""
    folder = os.path.join(options.overlays, "deepspeed-" + version)
    if not os.path.isdir(folder):
        subprocess.check_call([options.python, "-m", "pip", "install", "--quiet", "--no-deps",
                               "--no-build-isolation", "--target", folder,
                               f"deepspeed=={version}"], env={**os.environ, "DS_BUILD_OPS": "0"})
    return folder


def make_environment(folder):
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        subprocess.check_call([sys.executable, "-m", "venv", folder])
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", *PINS])
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", "--no-build-isolation",
                               f"deepspeed=={REFERENCE}"])
    return python


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    build = os.path.join(ROOT, "build")
    parser.add_argument("--venv", default=os.path.join(build, "peer", "venv"))
    parser.add_argument("--overlays", default=os.path.join(build, "peer"), metavar="DIR",
                        help="where deepspeed-VERSION folders are or will be")
    parser.add_argument("--program", default=os.path.join(build, "release", "isoshard"))
    parser.add_argument("--versions", default="0.19.8,0.18.9,0.16.9")
    parser.add_argument("--cases", default="", metavar="REGEX", help="matched on 'group case'")
    parser.add_argument("--out", default=os.path.join(build, "peer", "out"))
    parser.add_argument("--keep", action="store_true", help="keep every folder that was written")
    parser.add_argument("--report-only", action="store_true")
    options = parser.parse_args(arguments)
    options.out, bad = os.path.abspath(options.out), 0
    os.makedirs(options.out, exist_ok=True)
    path = os.path.join(options.out, "results.jsonl")
    if not options.report_only:
        options.python = os.path.abspath(make_environment(options.venv))
        options.program = os.path.abspath(options.program)
        with open(path, "a") as results:
            for version in options.versions.split(","):
                bad += run_plan(options, version, overlay_of(options, version), results)
    with open(path) as file:
        lines = {tuple(line[k] for k in ("version", "group", "case", "check")): line
                 for line in map(json.loads, file)}  # the last run of a fact counts
    write_report(list(lines.values()))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
