"""What the tests that drive the built program share: where it and the recordings are, a folder of
one's own in memory, and how a script of tests runs.

Python's standard library only. Not verified here: anything.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path


class Config:
    program = "isoshard"
    traces = Path("traces/deepspeed")
    has_verify = False


CONFIG = Config()
MEMORY = (
    "/dev/shm"
    if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 300 << 20
    else None
)
ASKED = os.environ.get("ISOSHARD_CASES", "60")  # so many cases of each kind, or `all`


class ProgramCase(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.place = Path(tempfile.mkdtemp(prefix="isoshard-test-", dir=MEMORY))
        self.addCleanup(shutil.rmtree, self.place, ignore_errors=True)

    def recorded(self, name="z1_bf16_dp2", inside="ckpt"):
        source = CONFIG.traces / name / inside
        if not source.is_dir():
            self.skipTest(f"no recording {source}")
        return source

    def run_program(self, status, *arguments, **how):
        """The program's outcome in the test's folder; `how` goes to subprocess.run. A status of
        None: the caller judges it."""
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.place, **how}
        result = subprocess.run(
            [CONFIG.program, *map(str, arguments)], text=True, check=False, **how
        )
        if status is not None:
            self.assertEqual(result.returncode, status, (arguments, result))
        return result

    def certificate(self, folder):
        """certificate.json of the folder, or of the only one below it."""
        return json.loads(next(folder.rglob("certificate.json")).read_text())

    def safetensors(self, folder):
        """(header, data) of model.safetensors."""
        with open(folder / "model.safetensors", "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            return header, file.read()


def run_tests(usage, prepare=lambda: None):
    """PROGRAM TRACES [unittest arguments] → the outcome and its seconds; exits where they lack."""
    if len(sys.argv) < 3:
        print(usage)
        sys.exit(2)
    CONFIG.program, CONFIG.traces = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).resolve()
    if (CONFIG.traces / "deepspeed").is_dir():
        CONFIG.traces = CONFIG.traces / "deepspeed"
    prepare()
    began = time.monotonic()
    outcome = unittest.main("__main__", argv=[sys.argv[0], *sys.argv[3:]], exit=False).result
    for test, reason in outcome.skipped:
        print(f"skipped: {test.id()}: {reason}")
    return outcome, time.monotonic() - began
