"""isoshard on copies of a file in each of which one byte is turned over (XOR 0xFF).

For scripts/demo and scripts/peer.py --evidence. `isoshard digest` reads every copy: it must refuse
it, or give the digest of the file as it was, which proves that the byte means nothing. Another
digest would be silent damage.

Not verified: that the message of a refusal is right; tests/damage_test.cc does the same to every
byte, without a process for each.
"""
import concurrent.futures
import os
import random
import subprocess
import tempfile
import time

WORKERS = 2


def spread(length, count):
    """So many offsets of the file, evenly over it, in an order that is everywhere at any time."""
    count = min(count, length)
    offsets = [(i + 1) * length // count - 1 for i in range(count)]
    random.Random(20261130).shuffle(offsets)
    return offsets


def flipped(data, offset):
    damaged = bytearray(data)
    damaged[offset] ^= 0xFF
    return bytes(damaged)


def digest(program, path):
    """(exit status, the root or the message)"""
    done = subprocess.run([program, "digest", path, "--quiet"], capture_output=True, text=True,
                          errors="replace", stdin=subprocess.DEVNULL)
    said = done.stdout if done.returncode == 0 else done.stderr
    return done.returncode, (said.strip().splitlines() or [""])[0]


def judge(program, path, offsets, budget_s=3600):
    """{refused, equal, silent, odd: lists of offsets}; stops when the time is over."""
    with open(path, "rb") as file:
        whole = file.read()
    status, healthy = digest(program, path)
    if status != 0:
        raise SystemExit(f"the undamaged file is refused: {healthy}")
    found = {"refused": [], "equal": [], "silent": [], "odd": []}
    ends = time.monotonic() + budget_s

    def one(offset):
        if time.monotonic() > ends:
            return None
        with tempfile.TemporaryDirectory(prefix="isoshard-evidence-") as folder:
            damaged = os.path.join(folder, os.path.basename(path))
            with open(damaged, "wb") as file:
                file.write(flipped(whole, offset))
            status, said = digest(program, damaged)
        if status == 0:
            return "equal" if said == healthy else "silent"
        return "refused" if status == 2 and said.startswith("isoshard: ") else "odd"

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for offset, word in zip(offsets, pool.map(one, offsets)):
            if word:
                found[word].append(offset)
    return found
