"""torch.save and ds_to_universal, killed (SIGKILL) at random moments of their work.

    killed_writes.py FOLDER SOURCE TIMES SECONDS

torch.save writes 48 MB over a good file of the same size; ds_to_universal converts SOURCE, the tag
folder of a checkpoint. TIMES each, or as many as SECONDS allow, and six at least. Counted is what
lies under the final name afterwards.
"""
import contextlib
import os
import random
import shutil
import signal
import sys
import time

import torch
from world import FOLDER, deepspeed, say, to_universal

NUMEL, LEAST = 12 << 20, 6
ROLLS = random.Random(20261130)


def child(work):
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
                contextlib.redirect_stderr(nowhere):
            work()
        os._exit(0)
    return pid


def lasting(work):
    began = time.monotonic()
    os.waitpid(child(work), 0)
    return time.monotonic() - began


def killed(work, seconds):
    pid = child(work)
    time.sleep(ROLLS.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def rounds(work, prepare, judge, times, budget_s):
    """{what was found: how often}"""
    found, ends = {}, time.monotonic() + budget_s
    prepare()
    seconds = lasting(work)
    judge()  # what the whole work leaves
    for turn in range(times):
        if turn >= LEAST and time.monotonic() > ends:
            break
        prepare()
        killed(work, seconds)
        word = judge()
        found[word] = found.get(word, 0) + 1
    return found


def saves(times, budget_s):
    path = os.path.join(FOLDER, "model.pt")
    good, new = ({"weight": torch.full((NUMEL,), value)} for value in (1.0, 2.0))
    torch.save(good, path + ".good")

    def judge():
        try:
            found = torch.load(path, weights_only=True)["weight"]
        except Exception:
            return "torn"
        for word, value in (("old", 1.0), ("new", 2.0)):
            if bool((found == value).all()):
                return word
        return "torn"

    return rounds(lambda: torch.save(new, path), lambda: shutil.copy(path + ".good", path), judge,
                  times, budget_s)


def conversions(source, times, budget_s):
    target, whole = os.path.join(FOLDER, "out", "universal"), []

    def listed():
        return sorted((os.path.relpath(os.path.join(at, name), target),
                       os.path.getsize(os.path.join(at, name)))
                      for at, _, names in os.walk(target) for name in names)

    def judge():
        if not whole:
            whole.append(listed())
        if not os.path.isdir(target):
            return "absent"
        return "whole" if listed() == whole[0] else "in pieces"

    return rounds(lambda: to_universal(source, target),
                  lambda: shutil.rmtree(os.path.dirname(target), ignore_errors=True), judge, times,
                  budget_s)


def main(source, times, budget_s):
    deepspeed()
    from deepspeed.checkpoint import ds_to_universal  # noqa: F401: imported once, for all children
    saved = saves(times, budget_s / 2)
    converted = conversions(source, times, budget_s / 2)
    say(saved.get("torn") and converted.get("in pieces"), f"torch.save {saved}, ds_to_universal "
        f"{converted}", saved=saved, converted=converted)


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
