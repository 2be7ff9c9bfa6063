"""scripts/demo bytes: one byte of a torch.save file is turned over; who notices?

Beside isoshard stands torch itself, or Python's zipfile with its comparison of CRCs switched off,
which is how torch is built. Not verified: other damage than one byte (tests/damage_test.cc).
"""
import os
import shutil
import subprocess
import sys
import zipfile

import evidence_flips
from evidence_bench import ROOT

RECORDED = os.path.join(ROOT, "traces", "deepspeed", "z1_bf16_dp2", "fp32", "pytorch_model.bin")
OURS, OURS_S, EVERY = 300, 7, 9
LOADED = """
import sys, torch
saved, found = (torch.load(path, weights_only=True) for path in sys.argv[1:])
for name in saved:
    for i, (x, y) in enumerate(zip(saved[name].flatten(), found[name].flatten())):
        if not torch.equal(x, y):
            print(f"    torch.load: {name}, element {i}: {x.item():.6g} was saved, {y.item():.6g} "
                  "is loaded; no error, no warning")
"""


def records(path, compare):
    """What zipfile reads; without the comparison of CRCs unless `compare`."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as record:
                if not compare:
                    record._expected_crc = None
                found[info.filename] = record.read()
    return found


def library(path, folder):
    """What byte_flips.py counts, of zipfile: how many files, (without CRCs, with CRCs)."""
    whole, damaged = records(path, True), os.path.join(folder, "damaged.bin")
    with open(path, "rb") as file:
        data = file.read()
    counts = [{"silent": 0, "error": 0, "harmless": 0} for _ in range(2)]
    offsets = range(0, len(data), EVERY)
    for offset in offsets:
        with open(damaged, "wb") as file:
            file.write(evidence_flips.flipped(data, offset))
        for compare in (False, True):
            try:
                word = "harmless" if records(damaged, compare) == whole else "silent"
            except Exception:
                word = "error"
            counts[compare][word] += 1
    return len(offsets), counts


def theirs(bench, folder):
    """Prints what is loaded without isoshard; returns the file."""
    if bench.python:
        told = bench.real("byte_flips", folder, str(EVERY))
        print(f"    {told['said']}")
        return told["file"]
    path = os.path.join(folder, os.path.basename(RECORDED))
    shutil.copy(RECORDED, path)
    tried, (without, with_crc) = library(path, folder)
    silent, share = without["silent"], 100 * without["silent"] / tried
    print(f"""    torch is not here, so Python's zipfile stands in for it. torch.load does not
    compare the CRCs that the file holds. A reader that does not (zipfile, its comparison
    switched off) takes {silent:,} of {tried:,} damaged files ({share:.1f} %) for good,
    and hands out other bytes. One that does compare them: {with_crc["silent"]:,}.
    What torch itself does: scripts/peer.py --evidence --cases 'E2 '""")
    return path


def example(bench, path, folder):
    """One byte in the middle of a payload, and what isoshard says of it."""
    with open(path, "rb") as file:
        data = file.read()
    offset = len(data) // 2
    shown = os.path.join(folder, "shown")
    os.makedirs(shown)
    damaged = os.path.join(shown, os.path.basename(path))
    with open(damaged, "wb") as file:
        file.write(evidence_flips.flipped(data, offset))
    print(f"\n    byte {offset:,} of it, for instance: {data[offset]:#04x} became "
          f"{data[offset] ^ 0xff:#04x}")
    if bench.python:
        subprocess.run([bench.python, "-c", LOADED, path, damaged], check=True)
    print(f"    $ isoshard verify {os.path.basename(damaged)}", flush=True)
    done = subprocess.run([bench.program, "verify", damaged], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        print("      " + line.replace(shown + os.sep, ""))
    return done.returncode == 1


def run(bench, folder, times):
    print("*** 1. Each ninth byte of a torch.save file is turned over, one at a time\n", flush=True)
    path = theirs(bench, folder)
    seen = example(bench, path, folder)
    print("\n*** 2. The same file, and isoshard\n", flush=True)
    offsets = evidence_flips.spread(os.path.getsize(path), times or OURS)
    found = evidence_flips.judge(bench.program, path, offsets, OURS_S)
    counts = {word: len(each) for word, each in found.items()}
    print(f"    isoshard digest of {sum(counts.values())} such files: {counts['refused']} refused, "
          f"{counts['equal']} proven equal\n    (the byte means nothing), "
          f"{counts['silent']} silent, {counts['odd']} otherwise")
    print("\n    Every byte, and every bit outside payloads, is done by `ctest -R Damage`.")
    good = seen and counts["refused"] > 0 and not counts["silent"] and not counts["odd"]
    if not good:
        print("    NOT AS CLAIMED", file=sys.stderr)
    return good
