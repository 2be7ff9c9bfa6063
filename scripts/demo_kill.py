"""scripts/demo kill: programs are killed (SIGKILL) at random moments; what lies where it should?

Beside isoshard stand torch.save and ds_to_universal, or a plain write into the final name, which is
what torch.save does (E3 of docs/EVIDENCE.md). Not verified: loss of power; tests/power_loss_test.cc
does that.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

from evidence_bench import ROOT

sys.path.insert(0, os.path.join(ROOT, "tests"))
import hostile as h  # noqa: E402

RECORDED = os.path.join(ROOT, "traces", "deepspeed", "z1_bf16_dp2", "ckpt")
TIMES, LEAST, BUDGET_S = 20, 6, 4.0
LAYERS, SIDE = 12, 1024
ROLLS = random.Random(20261130)


def large_file(path):
    """48 MB of weights: small checkpoints are over before a clock can meet them half-way."""
    numel = SIDE * SIDE
    names = [(f"layers.{i}.weight", h.tensor((SIDE, SIDE), (SIDE, 1), key=str(i), numel=numel))
             for i in range(LAYERS)]
    storages = [bytes([i + 1, 2 * i + 1, 63, 61]) * numel for i in range(LAYERS)]
    with open(path, "wb") as file:
        file.write(h.torch_file(h.weights(names), storages))
    return path


class Job:
    """One command of ours and where its result appears."""

    def __init__(self, bench, source, target, output, arguments):
        self.bench, self.source, self.target, self.output = bench, source, target, output
        self.command = [bench.program, arguments[0], source, target, *arguments[1:], "--quiet"]
        self.expected = self.sections(source)

    def sections(self, path):
        """{section: digest}, or None where it cannot be read."""
        done = subprocess.run([self.bench.program, "digest", path, "--json", "--quiet"],
                              capture_output=True, text=True)
        if done.returncode:
            return None
        found = json.loads(done.stdout.splitlines()[-1])["sections"]
        return {key: each["digest"] for key, each in found.items()
                if key != "hyper" and "digest" in each}

    def state(self):
        if not os.path.exists(self.output):
            return "absent"
        return "whole" if self.sections(self.output) == self.expected else "in pieces"

    def clear(self):
        shutil.rmtree(os.path.dirname(self.target), ignore_errors=True)
        os.makedirs(os.path.dirname(self.target))

    def kill_often(self, times):
        """{what was found: how often}, and how many were killed before they were done."""
        self.clear()
        began = time.monotonic()
        subprocess.run(self.command, check=True)
        lasts, ends = time.monotonic() - began, time.monotonic() + BUDGET_S
        found, killed = {self.state() + " after the whole run": 1}, 0
        for _ in range(times):
            if time.monotonic() > ends:
                break
            self.clear()
            process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
            time.sleep(ROLLS.uniform(0, lasts))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            word = self.state()
            found[word] = found.get(word, 0) + 1
        return found, killed

    def again(self):
        """The same command after the last kill, into what that has left."""
        more = ["--overwrite"] if os.path.exists(self.output) else []
        return subprocess.run(self.command + more).returncode == 0 and self.state() == "whole"


def plain_writes(folder):
    """The standard library: a good file is opened with O_TRUNC and written anew."""
    path, good, new = os.path.join(folder, "model"), b"\1" * (48 << 20), b"\2" * (48 << 20)
    found = {}

    def write(data):
        with open(path, "wb") as file:
            file.write(data)

    began = time.monotonic()
    write(good)
    lasts, ends = time.monotonic() - began, time.monotonic() + BUDGET_S
    for turn in range(TIMES):
        if turn >= LEAST and time.monotonic() > ends:
            break
        write(good)
        pid = os.fork()
        if pid == 0:
            write(new)
            os._exit(0)
        time.sleep(ROLLS.uniform(0, lasts))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(path, "rb") as file:
            data = file.read()
        word = "old" if data == good else "new" if data == new else "torn"
        found[word] = found.get(word, 0) + 1
    return found


def said(found):
    return ", ".join(f"{count} {word}" for word, count in sorted(found.items())) or "none in time"


def theirs(bench, folder):
    if bench.python:  # TIMES, however few of ours were asked for: the budget ends it
        with open(os.path.join(RECORDED, "latest")) as file:
            tag = os.path.join(RECORDED, file.read().strip())
        told = bench.real("killed_writes", folder, tag, str(TIMES), str(BUDGET_S))
        print(f"    torch.save of 48 MB over a good file: {said(told['saved'])}\n"
              f"    ds_to_universal:                      {said(told['converted'])}")
        return
    print(f"    a good file of 48 MB is opened and written anew: {said(plain_writes(folder))}\n"
          "    That is how torch.save writes (E3 of docs/EVIDENCE.md); torch is not here.")


def ours(title, job, times):
    found, killed = job.kill_often(times)
    again = job.again()
    print(f"    {title}\n      {said(found)}; {killed} were killed on the way\n"
          f"      the same command behind the last kill: {'whole' if again else 'NOT WHOLE'}",
          flush=True)
    good = not set(found) - {"absent", "whole", "whole after the whole run"}
    return good and again


def run(bench, folder, times):
    times = times or TIMES
    print("*** 1. Programs that write into the final name, killed at random moments\n", flush=True)
    theirs(bench, folder)
    print("\n*** 2. isoshard, killed at random moments (whole: it has the source's digest)\n",
          flush=True)
    out = os.path.join(folder, "out")
    small = Job(bench, RECORDED, os.path.join(out, "run"), os.path.join(out, "run", "global_step3"),
                ("reshard", "--to", "dp=3"))
    large = Job(bench, large_file(os.path.join(folder, "pytorch_model.bin")),
                os.path.join(out, "fp32"), os.path.join(out, "fp32"), ("convert", "--to", "fp32"))
    good = [ours("reshard of a ZeRO-1 checkpoint, 2 ranks to 3:", small, times),
            ours("convert of 48 MB of weights:", large, times)]
    print("""
    A kill at every system call, full disks, signals: ctest -R cli.crash.
    Loss of power: ctest -R PowerLoss.
    A rank that dies while DeepSpeed saves: scripts/peer.py --evidence --cases 'E1 '""")
    if not all(good):
        print("    NOT AS CLAIMED", file=sys.stderr)
    return all(good)
