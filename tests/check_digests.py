#!/usr/bin/env python3
"""tests/check_digests.py PROGRAM TRACES: every bundled checkpoint's digest, computed again.

Runs scripts/check_digest.py, which shares no code with the program, on ckpt/, universal/ and the
.bin under fp32/ of each case. Stage 0, experts, and shards of several mp ranks are outside that
script and counted apart; of the last the universal form is inside.
"""
import os
import subprocess
import sys

PROGRAM, TRACES = sys.argv[1:3]
HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "..", "scripts", "check_digest.py")


def main():
    equal = skipped = 0
    root = os.path.join(TRACES, "deepspeed")
    for case in sorted(os.listdir(root)):
        for part in ("ckpt", "universal", "fp32/pytorch_model.bin"):
            source = os.path.join(root, case, part)
            if not os.path.exists(source):
                continue
            result = subprocess.run(
                [sys.executable, "-B", SCRIPT, source, "--against", PROGRAM],
                capture_output=True,
                text=True,
            )
            outside = "not covered" in result.stderr
            if result.returncode == 2 and outside:
                skipped += 1
            elif result.returncode != 0:
                sys.exit(f"FAILED: {source}\n{result.stdout}{result.stderr}")
            else:
                equal += 1
    if equal == 0:
        sys.exit("FAILED: nothing was compared")
    print(f"{equal} digests equal, {skipped} checkpoints outside the script")


main()
