#!/usr/bin/env python3
"""mpi_contract.py PROGRAM: the contract of communicators over real processes.

PROGRAM is tests/mpi_contract.cc: at 1 to 13 ranks, with and without comparing calls; and what is
told, and how soon, of a rank that is stuck or dies. Python's standard library only. Status 77 where
mpirun is not there. Not verified: several machines, and networks other than shared memory.
"""

import os
import shutil
import subprocess
import sys
import time
import unittest

MPIRUN = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none",
          "--mca", "btl", "self,vader", "--mca", "btl_vader_single_copy_mechanism", "none"]
PROGRAM = ""


class Contract(unittest.TestCase):
    def job(self, ranks, *words):
        """Its status, all that it has printed, and its seconds."""
        began = time.monotonic()
        done = subprocess.run([*MPIRUN, "-n", str(ranks), PROGRAM, *words], text=True, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
                              env={**os.environ, "OMPI_MCA_rmaps_base_oversubscribe": "1"})
        return done.returncode, done.stdout, time.monotonic() - began

    def test_it_is_kept(self):
        for ranks in (1, 2, 3, 4, 5, 6, 7, 13):
            for words in ((), ("uncompared",)):
                with self.subTest(ranks=ranks, words=words):
                    status, text, _ = self.job(ranks, *words)
                    self.assertEqual(status, 0, text)
                    self.assertIn(f"cases on {ranks} ranks", text)

    def test_a_rank_that_is_stuck_is_named(self):
        status, text, seconds = self.job(3, "stuck")
        self.assertNotEqual(status, 0, text)
        self.assertIn("waited 2 s for rank 1", text)
        self.assertIn("barrier (call 0 of group world) at", text)
        self.assertLess(seconds, 30)

    def test_a_rank_that_dies_ends_the_job(self):
        status, text, seconds = self.job(3, "dead")
        self.assertNotEqual(status, 0, text)
        self.assertIn("signal 9", text)
        self.assertLess(seconds, 30)


if __name__ == "__main__":
    if shutil.which("mpirun") is None:
        print("mpirun is not there")
        sys.exit(77)
    PROGRAM = sys.argv.pop(1)
    unittest.main(verbosity=1)
