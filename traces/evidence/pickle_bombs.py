"""E13: two small pickles that grow when they are walked.

    pickle_bombs.py FOLDER      FOLDER/shared.bin and FOLDER/deep.bin

shared: 60 tuples, each of the one before, twice; deep: a list in a list, 200,000 times. torch.load
builds both; what walks them (torch's own tree_leaves) does not end, or dies.
"""
import os
import signal
import subprocess
import sys
import time

import torch
from world import FOLDER, first_line, say

SECONDS = 5


def build(path):
    began = time.monotonic()
    try:
        torch.load(path, weights_only=False)
        return f"built in {time.monotonic() - began:.2f} s"
    except Exception as error:
        return first_line(error)


WALK = f"""
import resource, sys, torch
from torch.utils._pytree import tree_leaves
value, used = torch.load(sys.argv[1], weights_only=False), resource.getrusage(resource.RUSAGE_SELF)
limit = int(used.ru_utime + used.ru_stime) + {SECONDS} + 1
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
print(len(tree_leaves(value)))
"""


def walk(path):
    done = subprocess.run([sys.executable, "-c", WALK, path], text=True, errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"walked for {SECONDS} s of CPU time, then ended from outside"
    last = (done.stderr.strip().splitlines() or [done.stdout.strip()])[-1]
    return f"walked: exit status {done.returncode}, {last[:60]}"


def main():
    told, bad = [], 0
    for name in ("shared", "deep"):
        path = os.path.join(FOLDER, name + ".bin")
        built, walked = build(path), walk(path)
        bad += "built" in built and not walked.startswith("walked: exit status 0")
        told.append(f"{name}, {os.path.getsize(path):,} bytes: {built}, {walked}")
    say(bad == 2, "; ".join(told))


if __name__ == "__main__":
    main()
