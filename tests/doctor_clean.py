"""`isoshard doctor --clean`, for tests/doctor.py: what is dead goes, all else stays.

Not verified: file systems that other machines share, and processes of other users. Python's
standard library only.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import doctor_faults as faults
from doctor_case import Case
from program_case import CONFIG
from tracing import injected

OLD = time.time() - 10 * 24 * 3600


class Sweep(Case):
    """doctor --clean."""

    def clean(self, status, *arguments):
        lines = self.run_program(status, "doctor", *arguments, "--clean", "--json").stdout
        return {Path(each["path"]).name: each for each in map(json.loads, lines.splitlines())}

    def lay(self, age=OLD):
        """A save folder with one leftover of each kind."""
        source, tag = self.copy()
        staging = source / f".global_step4.isoshard-{faults.NONCE}"
        staging.mkdir()
        (staging / "part.pt").write_bytes(b"half")
        temporary = source / f".latest.isoshard-{faults.NONCE}"
        temporary.write_text("global_step4")
        trash = source / f".trash-{faults.NONCE}"
        shutil.copytree(tag, trash)
        unfinished = source / "global_step5"
        unfinished.mkdir()
        (unfinished / f".isoshard-{faults.NONCE}").touch()
        for path in [*source.rglob("*")]:
            os.utime(path, (age, age))
        return source, staging, temporary, trash, unfinished

    def test_what_is_dead_is_removed(self):
        source, *paths = self.lay()
        before = sorted(path.name for path in source.iterdir())
        told = self.clean(1, source, "--dry-run")
        self.assertEqual(sorted(path.name for path in source.iterdir()), before)
        self.assertEqual({each["what"] for each in told.values()},
                         {"staging folder", "pointer temporary", "trash", "unfinished folder"})
        self.assertEqual([each["kept"] for each in told.values()], [""] * 4)
        told = self.clean(0, source)
        self.assertTrue(all(each["removed"] for each in told.values()))
        self.assertEqual(sorted(path.name for path in source.iterdir()), ["global_step3", "latest"])
        self.assertEqual(self.clean(0, source / "global_step3"), {})
        self.run_program(0, "verify", source)

    def test_what_is_new_stays(self):
        source, *paths = self.lay(age=time.time())
        told = self.clean(1, source)
        self.assertEqual(len(told), 4)
        for path in paths:
            self.assertTrue(path.exists())
            self.assertIn("may be at work", told[path.name]["kept"])

    def test_what_a_program_holds_stays(self):
        source, staging, temporary, trash, _ = self.lay()
        with open(staging / "part.pt", "rb"), open(temporary, "rb"):
            sleeper = subprocess.Popen(["sleep", "60"], cwd=trash)
            try:
                told = self.clean(1, source)
            finally:
                sleeper.kill()
                sleeper.wait()
        for path in (staging, temporary):
            self.assertIn(f"process {os.getpid()}", told[path.name]["kept"])
            self.assertTrue(path.exists())
        self.assertIn(f"process {sleeper.pid}", told[trash.name]["kept"])
        self.assertTrue((trash / sorted(trash.iterdir())[0].name).exists())

    @injected
    def test_one_that_cannot_be_locked_stays_and_the_others_go(self):
        source, staging, temporary, trash, unfinished = self.lay()
        result = subprocess.run(
            ["strace", "-qq", "-o", "/dev/null", "-e", "trace=flock", "-e",
             "inject=flock:error=EIO:when=1", CONFIG.program, "doctor", source, "--clean",
             "--json"], capture_output=True, text=True)
        self.assertEqual(result.returncode, 1, result.stderr)
        told = {Path(each["path"]).name: each
                for each in map(json.loads, result.stdout.splitlines())}
        kept = [each for each in told.values() if each["kept"]]
        self.assertEqual(len(kept), 1, told)
        self.assertIn("lock cannot be asked for", kept[0]["kept"])
        self.assertEqual([path.exists() for path in (staging, temporary, trash, unfinished)],
                         [str(path) == kept[0]["path"]
                          for path in (staging, temporary, trash, unfinished)])

    def test_a_folder_that_may_not_be_opened_stays_and_the_others_go(self):
        source, staging, temporary, trash, unfinished = self.lay()
        staging.chmod(0)
        user = {}
        if os.geteuid() == 0:
            user = {"user": 65534, "group": 65534, "extra_groups": []}
            self.place.chmod(0o755)
            for path in [source, *source.rglob("*")]:
                os.chown(path, 65534, 65534)
        try:
            result = subprocess.run([CONFIG.program, "doctor", source, "--clean", "--json"],
                                    capture_output=True, text=True, **user)
        except PermissionError:
            self.skipTest("the program cannot be started by another user")
        staging.chmod(0o700)
        self.assertEqual(result.returncode, 1, result.stderr)
        told = {Path(each["path"]).name: each
                for each in map(json.loads, result.stdout.splitlines())}
        self.assertIn("lock cannot be asked for", told[staging.name]["kept"])
        self.assertTrue(staging.exists())
        self.assertEqual([path.exists() for path in (temporary, trash, unfinished)], [False] * 3)

    @injected
    def test_a_running_command_keeps_its_folder(self):
        """Held up in its first fsync, with all its times set back; then killed there."""
        out = self.place / "out"
        process = subprocess.Popen(
            ["strace", "-f", "-o", "/dev/null", "-e", "trace=fsync", "-e",
             "inject=fsync:delay_enter=30000000:when=1", CONFIG.program, "reshard",
             self.recorded(), out, "--to", "dp=3", "--quiet"], start_new_session=True)
        try:
            staging = self.wait_for(out)
            self.set_back(staging)
            told = self.clean(1, out)
            self.assertIn("process", told[staging.name]["kept"])
            self.assertTrue(staging.exists())
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.assertTrue(staging.exists())
        self.set_back(staging)
        told = self.clean(0, out)
        self.assertTrue(told[staging.name]["removed"])
        self.assertFalse(staging.exists())

    def test_a_program_of_isoshard_that_works_there_keeps_all(self):
        """Without an open file or its own folder there: by its arguments alone."""
        source, *paths = self.lay()
        program = self.place / "isoshard"
        shutil.copy("/bin/sh", program)
        for argument in (source, source / "global_step4", f"--out={source}"):
            worker = subprocess.Popen([program, "-c", "read line", "reshard", argument],
                                      stdin=subprocess.PIPE)
            if argument not in (source, source / "global_step4"):
                program.unlink()  # as where a newer one is installed while it runs
            try:
                told = self.clean(1, source)
            finally:
                worker.communicate()
            self.assertEqual(len(told), 4)
            for path in paths:
                self.assertIn(f"process {worker.pid}, a program of isoshard",
                              told[path.name]["kept"])
                self.assertTrue(path.exists())

    @staticmethod
    def set_back(folder):
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (OLD, OLD))

    def wait_for(self, out):
        for _ in range(200):
            for found in out.glob(".*.isoshard-*") if out.is_dir() else ():
                if any(path.suffix == ".pt" for path in found.iterdir()):
                    time.sleep(0.5)
                    return found
            time.sleep(0.05)
        self.fail("no staging folder appeared")

    def test_what_somebody_may_miss_stays(self):
        source, staging, _, _, unfinished = self.lay()
        (staging / "MANIFEST.json").write_text("{}")
        (unfinished / "somebodys.pt").write_bytes(b"x")
        replaced = source / f".global_step3.isoshard-{faults.NONCE}"
        shutil.copytree(source / "global_step3", replaced)
        (source / "global_step3" / "MANIFEST.json").write_text("{}")
        strange = source / ".latest.isoshard-0123"
        strange.write_text("no name of ours")
        for path in [*source.rglob("*")]:
            os.utime(path, (OLD, OLD))
        told = self.clean(1, source)
        self.assertIn("manifest", told[staging.name]["kept"])
        self.assertIn("final name", told[unfinished.name]["kept"])
        self.assertIn("replaced", told[replaced.name]["kept"])
        self.assertNotIn(strange.name, told)
        for path in (staging, unfinished, replaced, strange):
            self.assertTrue(path.exists())

    def test_a_folder_without_a_checkpoint(self):
        (self.place / "empty").mkdir()
        told = self.run_program(0, "doctor", self.place / "empty", "--clean").stdout
        self.assertEqual(told, "nothing was left by an interrupted command\n")
