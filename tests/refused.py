#!/usr/bin/env python3
"""tests/refused.py PROGRAM TRACES: checkpoints of kinds that are not covered are refused by name.

For every folder of traces/refused/: exit status 2 from inspect, digest, convert and reshard, a
message that names the kind, and no output left behind.
"""

import os
import subprocess
import sys
import tempfile

PROGRAM, TRACES = sys.argv[1:3]
WORDS = {
    "autotp": "ensor-parallel",
    "moe": "ixture-of-experts",
    "autoep": "ixture-of-experts",
    "pipe": "ipeline",
}


def main():
    count = 0
    for case in sorted(os.listdir(os.path.join(TRACES, "refused"))):
        source = os.path.join(TRACES, "refused", case, "ckpt")
        if not os.path.isdir(source):
            continue
        with tempfile.TemporaryDirectory() as work:
            target = os.path.join(work, "out", "x")
            for command in (
                ["inspect", source],
                ["digest", source],
                ["convert", source, target, "--to", "universal"],
                ["reshard", source, target, "--to", "dp=1"],
            ):
                result = subprocess.run([PROGRAM, *command], capture_output=True, text=True)
                word = WORDS[case.split("_")[0]]
                if result.returncode != 2 or word not in result.stderr or os.listdir(work):
                    sys.exit(f"FAILED: {command}: status {result.returncode}, {result.stderr}")
                count += 1
    if count == 0:
        sys.exit("FAILED: nothing was tried")
    print(f"{count} commands refused by name")


main()
