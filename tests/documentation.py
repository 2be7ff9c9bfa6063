#!/usr/bin/env python3
"""tests/documentation.py PROGRAM TRACES: what README.md shows is printed.

Each line of a ``` block that follows a "$ build/release/isoshard …" line must be in the output of
that command; a line of … alone stands for lines that are left out. docs/flat_partition.svg is what
`diff --svg` draws.
"""
import os
import shlex
import subprocess
import sys
import tempfile

PROGRAM = sys.argv[1]
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")


def check_picture():
    shown = os.path.join(ROOT, "docs", "flat_partition.svg")
    case = os.path.join("traces", "deepspeed", "z2_rr_dp3")
    with tempfile.TemporaryDirectory() as folder:
        drawn = os.path.join(folder, "drawn.svg")
        subprocess.run([PROGRAM, "diff", os.path.join(case, "ckpt"),
                        os.path.join(case, "universal"), "--svg", drawn],
                       cwd=ROOT, capture_output=True)
        if open(drawn, "rb").read() != open(shown, "rb").read():
            sys.exit("FAILED: docs/flat_partition.svg is not what `isoshard diff --svg` draws")


def main():
    check_picture()
    command, output, checked = None, "", 0
    for line in open(os.path.join(ROOT, "README.md"), encoding="utf-8").read().splitlines():
        if line.startswith("$ build/release/isoshard"):
            command = shlex.split(line)[2:]
            run = subprocess.run([PROGRAM, *command], cwd=ROOT, capture_output=True, text=True)
            output = (run.stdout + run.stderr).splitlines()
        elif line.startswith("```"):
            command = None
        elif command and line != "…":
            if line not in output:
                sys.exit(f"FAILED: README shows a line that {command} does not print:\n{line}")
            checked += 1
    if checked == 0:
        sys.exit("FAILED: README shows no output")
    print(f"{checked} lines of README.md are printed by their commands")


main()
