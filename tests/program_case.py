"""What the tests that drive the built program share: where it and the recordings are, a folder of
one's own in memory, and how a script of tests runs.

Python's standard library only. Not verified here: anything.
"""

import os
import shutil
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
