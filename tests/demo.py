#!/usr/bin/env python3
"""demo.py PROGRAM TRACES [unittest arguments]: scripts/demo, without torch, with few tries.

A demo ends well with our program, leaves nothing behind, and says NOT AS CLAIMED of a program that
takes a damaged file for good, or leaves a result in pieces. Python's standard library only.

Not verified: what torch and DeepSpeed do (scripts/peer.py --evidence).
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

from program_case import CONFIG, ProgramCase, run_tests

DEMO = Path(__file__).resolve().parent.parent / "scripts" / "demo"

# Takes a digest of whatever it is given, and compares nothing.
BELIEVER = """
import hashlib, subprocess, sys
if sys.argv[1] != "digest":
    sys.exit(subprocess.call([{program!r}, *sys.argv[1:]]))
print("iso1:" + hashlib.sha256(open(sys.argv[2], "rb").read()).hexdigest(), "root")
"""

# Publishes what it has not finished.
HASTY = """
import glob, os, subprocess, sys
status = subprocess.call([{program!r}, *sys.argv[1:]])
if sys.argv[1] in ("reshard", "convert"):
    for at, _, names in os.walk(sys.argv[3]):
        for name in names:
            if name.endswith((".pt", ".safetensors")):
                os.truncate(os.path.join(at, name), 100)
sys.exit(status)
"""


class Demo(ProgramCase):
    def demo(self, status, *arguments, program=None):
        """What it says; it must leave nothing in the folder for temporary files."""
        temporary = self.place / "tmp"
        temporary.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-B", DEMO, *arguments, "--without-torch",
             "--program", program or CONFIG.program],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "TMPDIR": str(temporary)})
        self.assertEqual(done.returncode, status, done.stdout)
        self.assertEqual(list(temporary.iterdir()), [])
        return done.stdout

    def liar(self, text):
        path = self.place / "isoshard"
        path.write_text(f"#!{sys.executable}\n" + text.format(program=CONFIG.program))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def test_bytes(self):
        text = self.demo(0, "bytes", "--times", "12")
        self.assertIn("0 silent", text)
        self.assertIn("do not fit its CRC", text)
        self.assertNotIn("NOT AS CLAIMED", text)

    def test_bytes_of_a_program_that_believes_everything(self):
        text = self.demo(1, "bytes", "--times", "12", program=self.liar(BELIEVER))
        self.assertIn("12 silent", text)
        self.assertIn("NOT AS CLAIMED", text)

    def test_kill(self):
        text = self.demo(0, "kill", "--times", "2")
        self.assertEqual(text.count("1 whole after the whole run"), 2, text)
        self.assertNotIn("in pieces", text)

    def test_kill_of_a_program_that_publishes_too_early(self):
        text = self.demo(1, "kill", "--times", "1", program=self.liar(HASTY))
        self.assertIn("1 in pieces after the whole run", text)
        self.assertIn("NOT AS CLAIMED", text)

    def test_usage(self):
        self.assertIn("scripts/demo bytes | kill", self.demo(0, "--help"))
        self.demo(2, "fire")
        self.assertIn("scripts/build", self.demo(2, "bytes", program=str(self.place / "nowhere")))


if __name__ == "__main__":
    outcome, seconds = run_tests(__doc__)
    print(f"{outcome.testsRun} tests in {seconds:.0f} s")
    sys.exit(0 if outcome.wasSuccessful() else 1)
