"""One version of the real DeepSpeed beside our program, for scripts/peer.py.

Engines, DeepSpeed's converters and the judge run in children of one process of peer_case.py, which
is asked over a pipe; our program and compare_torch.py are run as they are.
"""
import glob
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import record_traces
from peer_report import first_words

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
RECORDINGS = os.path.join(ROOT, "traces", "deepspeed")
REFERENCE = "0.19.8"
TIMEOUT_S, COMPILE_S = 300, 1800  # the first run compiles an operator of DeepSpeed
EQUAL_STATE = ("weights", "exp_avg", "exp_avg_sq", "steps")
# The config is the run's own; the recovery scripts are copies of DeepSpeed's sources.
SAVED_AGAIN = ("--ignore", r"\['ds_config'\]", "--ignore-file", "*.py")
# Padding of stage 3 holds what was in memory; `ds_id` counts frozen parameters left out as well.
PADDING = ("--ignore", r"\['(fp32_flat_groups|frozen_param_fragments)'\]|'ds_id'")
SLICES = ("--ignore", r"\['param_slice_mappings'\]")


def settings(source):
    with open(os.path.join(RECORDINGS, source, "case.json")) as file:
        case = json.load(file)
    case = {k: v for k, v in case.items() if k != "versions" and not k.endswith("_fails_with")}
    return {"world": case.get("dp"), **case}


def recorded(source, key, otherwise=None):
    with open(os.path.join(RECORDINGS, source, "case.json")) as file:
        return json.load(file).get(key, otherwise)


def writer_of(source):
    return recorded(source, "versions", {}).get("deepspeed", REFERENCE)


def target_case(case, to, change=()):
    """The settings of the run that loads: the source's, elsewhere."""
    degrees = dict(part.split("=") for part in to.split(","))
    sequence = int(degrees.get("sp", case.get("ulysses", 1)))
    data = int(degrees.get("dp", case["world"] // case.get("ulysses", 1)))
    found = {**case, "world": data * sequence, "ulysses": sequence,
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
        self.work, self.server = os.path.join(options.out, version), None
        self.operators = os.path.join(options.out, "operators-" + version)
        self.env = dict(record_traces.environment(self.python), PYTHONPATH=overlay,
                        PYTHONDONTWRITEBYTECODE="1",
                        TORCH_EXTENSIONS_DIR=self.operators)
        if version >= "0.17":
            del self.env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]  # only older ones need it
        os.makedirs(self.work, exist_ok=True)
        for left in glob.glob(os.path.join(self.operators, "*", "lock")):
            os.remove(left)  # a run killed while compiling: every later one would wait for ever

    def path(self, name, part, below=""):
        return os.path.join(self.work, f"{name}-{part}".translate({44: "_", 61: None}), below)

    def folder(self, *parts):
        path = self.path("-".join(parts[:-1]), parts[-1]).rstrip("/")
        shutil.rmtree(path, ignore_errors=True)
        return path

    def ask(self, kind, arguments, logs, env=({},), timeout_s=TIMEOUT_S):
        """(they ended well, what the one that failed said)"""
        if self.server is None:
            with open(os.path.join(self.work, "server.log"), "w") as log:
                self.server = subprocess.Popen([self.python, os.path.join(HERE, "peer_case.py")],
                                               env=self.env, text=True, stderr=log,
                                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children = [{"argument": argument, "log": log, "env": variables} for
                    argument, log, variables in zip(arguments, logs, env)]
        request = {"kind": kind, "timeout_s": timeout_s, "children": children}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        reply = self.server.stdout.readline()
        if not reply:
            self.server = None
            return False, "Error: the process that starts the ranks was ended from outside"
        states = json.loads(reply)
        failed = [n for n, state in enumerate(states) if state] or \
            [n for n, state in enumerate(states) if state is None] or [0]
        texts = []
        for number in failed:
            with open(logs[number], errors="replace") as log:
                texts.append(log.read())
        # A rank whose neighbour failed says only that the connection is closed.
        lost = re.compile(r"gloo|\[pair\.cc|Connection (reset|closed)")
        text = next((t for t in texts if not lost.search(first_words(t))), texts[0])
        hung = None in states and not any(states)
        return set(states) == {0}, text + ("\nTimeoutError: it hung" if hung else "")

    def run(self, *command):
        """(it ended well, what it said)"""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              errors="replace")
        return done.returncode == 0, done.stdout

    def isoshard(self, *arguments):
        return self.run(self.program, *arguments)

    def engine(self, case, load, out, look="param", steps=1, **more):
        """Real ranks, one process each. `more`: truth, as_it_is."""
        os.makedirs(out, exist_ok=True)
        job = {"case": case, "load": load, "out": out, "look": look, "steps": steps, **more}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = str(case["world"])
        env = [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank),
                "WORLD_SIZE": world, "LOCAL_RANK": str(rank), "LOCAL_SIZE": world}
               for rank in range(case["world"])]
        logs = [os.path.join(out, f"log{rank}.txt") for rank in range(case["world"])]
        operator = "cpu_adam" if case.get("ds_adam") else "deepspeed_shm_comm"
        built = os.path.exists(os.path.join(self.operators, operator, operator + ".so"))
        result = self.ask("rank", [job] * case["world"], logs, env,
                          TIMEOUT_S if built else COMPILE_S)
        for left in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{port}_*"):
            os.remove(left)  # 66 MiB a rank that DeepSpeed never frees
        return result

    def tool(self, name, ckpt, out):
        """DeepSpeed's own converter on a save folder."""
        log = [os.path.join(self.work, "tool.log")]
        if name == "zero_to_fp32":
            return self.ask("module", [["deepspeed.utils.zero_to_fp32", ckpt, out]], log)
        with open(os.path.join(ckpt, "latest")) as file:
            tag = file.read().strip()
        command = ["deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
                   "--num_extract_workers", "1", "--num_merge_workers", "1",
                   "--input_folder", os.path.join(ckpt, tag),
                   "--output_folder", os.path.join(out, tag + "_universal")]
        return self.ask("module", [command], log)

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

    def same_saved(self, expected, found, case, ignored=()):
        """Bit by bit, less what DeepSpeed never initialises and the slices it gets wrong."""
        ignored = (*SAVED_AGAIN, *ignored)
        outcome, aside = self.compare(expected, found, *ignored), ()
        if case["stage"] == 3:
            aside = PADDING
        elif case.get("zero", {}).get("round_robin_gradients"):
            aside = SLICES
        if outcome[0] == "different" and aside and \
                self.compare(expected, found, *ignored, *aside)[0] == "equal":
            return self.same_state(expected, found)
        return outcome

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

    def judge(self, kind, found, source, recording=None):
        """Against what the recording calls true; torch reads both."""
        job = {"kind": kind, "found": found, "case": settings(source),
               "recording": recording or os.path.join(RECORDINGS, source)}
        good, text = self.ask("judge", [job], [os.path.join(self.work, "judge.log")])
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
