#!/usr/bin/env python3
"""mpi_convert.py PROGRAM TRACES: commands that several processes do together, under mpirun.

What they make equals what one process makes, byte for byte; one message for one failure; a rank
that is killed or stuck leaves no target and its leftovers are swept. Status 77 where mpirun is not
there. Python's standard library only. Not verified: several machines, network file systems.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_gigabyte
from mpi_contract import MPIRUN
from program_case import CONFIG, ProgramCase, run_tests


class Mpi(ProgramCase):
    def command(self, ranks, *arguments):
        return [*MPIRUN, "-n", str(ranks), CONFIG.program, *map(str, arguments)]

    def job(self, status, ranks, *arguments, **environment):
        done = subprocess.run(self.command(ranks, *arguments), text=True, check=False, timeout=300,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.place,
                              env={**os.environ, **environment})
        self.assertEqual(done.returncode, status, (arguments, done))
        return done

    def files(self, folder):
        return {str(path.relative_to(folder)): path.read_bytes()
                for path in sorted(folder.rglob("*")) if path.is_file()}

    def test_what_is_made_is_what_one_process_makes(self):
        jobs = (("z1_bf16_dp2", 2, "convert", ("--to", "universal")),
                ("z3_bf16_dp3", 5, "convert", ("--to", "universal")),
                ("z2_bf16_dp4", 3, "reshard", ("--to", "dp=3")),
                ("autotp_z1_tp2_dp2", 4, "reshard", ("--to", "dp=1,tp=2")),
                ("z3_bf16_dp3", 2, "convert", ("--to", "fp32")),
                ("z1_bf16_dp2", 13, "convert", ("--to", "fp32", "--verify", "disk")))
        for name, ranks, verb, flags in jobs:
            with self.subTest(recording=name, ranks=ranks, verb=verb, flags=flags):
                found = []
                for folder, run in (("alone", lambda *words: self.run_program(0, *words)),
                                    ("team", lambda *words: self.job(0, ranks, *words))):
                    target = self.place / folder / "target"
                    shutil.rmtree(target.parent, ignore_errors=True)
                    target.parent.mkdir()
                    told = run(verb, self.recorded(name), target, *flags)
                    found.append((self.files(target.parent), told.stdout))
                self.assertEqual(found[0][0], found[1][0])
                self.assertEqual(found[0][1].replace("alone", "team"), found[1][1])

    def test_digest_and_verify_say_the_same(self):
        for name in ("z1_bf16_dp2", "z3_bf16_dp3", "autotp_z1_tp2_dp2"):
            for verb in ("digest", "verify"):
                for flag in ((), ("--json",)):
                    words = (verb, self.recorded(name), *flag)
                    self.assertEqual(self.job(0, 3, *words).stdout,
                                     self.run_program(0, *words).stdout)

    def test_one_failure_is_one_message(self):
        source = self.place / "source"
        shutil.copytree(self.recorded(), source)
        path = sorted(source.glob("*/*optim*"))[1]
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
        target = self.place / "target"
        for status, words in ((2, ("convert", source, target, "--to", "universal")),
                              (2, ("digest", self.place / "nowhere")),
                              (2, ("inspect", source)),
                              (2, ("convert", source, target, "--to", "universal", "--resume"))):
            with self.subTest(words=words):
                told = self.job(status, 3, *words)
                self.assertEqual(told.stderr.count("isoshard: "), 1, told.stderr)
                self.assertFalse(target.exists())
        self.assertEqual(os.listdir(self.place), ["source"])
        self.assertIn("CORRUPT", self.job(1, 3, "verify", source).stdout)

    def ranks_of(self, job, count):
        """Process numbers by rank, once all have begun."""
        for _ in range(600):
            found = {}
            for entry in Path("/proc").iterdir():
                try:
                    if entry.name.isdigit() and (entry / "comm").read_text() == "isoshard_mpi\n":
                        words = dict(word.split(b"=", 1) for word in
                                     (entry / "environ").read_bytes().split(b"\0") if b"=" in word)
                        if words.get(b"PWD") == os.fsencode(self.place):
                            found[int(words[b"OMPI_COMM_WORLD_RANK"])] = int(entry.name)
                except (OSError, KeyError, ValueError):
                    continue
            if len(found) == count or job.poll() is not None:
                return found
            time.sleep(0.01)
        return {}

    def test_a_rank_that_is_killed_or_stuck(self):
        source = self.place / "source"
        kill_gigabyte.make_source(source, 100)
        whole = 0
        for number, sign in ((0, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGKILL),
                             (1, signal.SIGSTOP)):
            with self.subTest(rank=number, sign=sign):
                target = self.place / "out" / "target"
                shutil.rmtree(target.parent, ignore_errors=True)
                target.parent.mkdir()
                job = subprocess.Popen(
                    self.command(3, "convert", source, target, "--to", "universal"), text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.place,
                    env={**os.environ, "ISOSHARD_MPI_TIMEOUT": "3", "PWD": str(self.place)})
                ranks = self.ranks_of(job, 3)
                while job.poll() is None and not any(target.parent.iterdir()):
                    time.sleep(0.005)  # MPI's own beginning has no time limit
                if number in ranks:
                    os.kill(ranks[number], sign)
                _, told = job.communicate(timeout=60)
                whole += target.exists()
                if not target.exists():
                    self.assertNotEqual(job.returncode, 0)
                    self.run_program(None, "doctor", "--clean", target.parent)
                if sign == signal.SIGSTOP and not target.exists():
                    self.assertIn("waited 3 s for rank 1", told)
        self.assertLess(whole, 4)


if __name__ == "__main__":
    if shutil.which("mpirun") is None or not Path(sys.argv[1]).with_name("isoshard_mpi").exists():
        print("mpirun or isoshard_mpi is not there")
        sys.exit(77)
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
