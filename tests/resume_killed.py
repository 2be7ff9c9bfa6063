"""Commands that were killed or interrupted, for tests/resume.py: by strace, at system calls that
write. Where it cannot trace, these tests are skipped and say so.

Python's standard library only. Not verified here: power loss.
"""

import shutil
import signal
import subprocess
import time

from crash_case import fingerprint, run
from program_case import CONFIG
from resume_case import RESUMED, Resume, contents
from tracing import injected


@injected
class Killed(Resume):
    def points(self, job):
        """(system call, number): at the beginning, in between, and at the end of each kind."""
        job.command += ["--workers", "1"]
        for call, most in self.count(job, True).items():
            if call in ("pwrite64", "fsync", "renameat2", "ftruncate", "syncfs"):
                for number in sorted({1, 1 + most // 3, 1 + 2 * most // 3, most}):
                    if number <= most:
                        yield call, number

    def test_killed_anywhere_and_gone_on(self):
        for job in map(self.whole, self.jobs()):
            for call, number in list(self.points(job)):
                with self.subTest(job.command[0], call=call, number=number):
                    job.clear()
                    killed = self.strace(job, f"{call}:signal=KILL:when={number}", True)
                    if killed.returncode == 0 or job.output.exists():
                        continue  # other threads made fewer, or it was past the last rename
                    RESUMED["killed"] += 1
                    held = sum(
                        path.stat().st_size for each in self.staged(job)
                        for path in each.rglob("*") if path.is_file()
                    )
                    shown = [path for path in self.staged(job) if (path / "MANIFEST.json").exists()]
                    if shown:  # it may be one that was replaced: left alone, and named
                        self.left_alone(job, shown[0])
                        continue
                    figures, _ = self.resume(job)
                    if held == 0:  # nothing was written: an ordinary run, and the folder stays
                        continue
                    self.assertIsNotNone(figures["resumed"])
                    self.assertLessEqual(figures["bytes_written"], job.bytes)
                    RESUMED["bytes saved"] += job.bytes - figures["bytes_written"]

    def left_alone(self, job, staging):
        """Not taken, not changed, and told with the reason; the command makes its own."""
        before = fingerprint(staging)
        result = run([*job.command, "--resume", "--json"])
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIsNone(self.figures(result)["resumed"])
        self.assertEqual(fingerprint(staging), before)
        told = run([*(each for each in job.command if each != "--quiet"), "--resume",
                    "--dry-run", "--overwrite"]).stderr
        self.assertIn(staging.name, told)
        shutil.rmtree(staging)
        self.same(job)

    def same(self, job):
        """Folders without a byte may lie there still: they may be a living command's."""
        for each in self.staged(job):
            if not any(path.is_file() and path.stat().st_size for path in each.rglob("*")):
                shutil.rmtree(each)
        super().same(job)

    def test_killed_at_the_last_rename_it_is_left_alone(self):
        for job in map(self.whole, self.jobs()):
            renames = self.count(job, True)["renameat2"]
            job.clear()
            for number in range(renames, 0, -1):  # a pointer's come behind the folder's
                self.strace(job, f"renameat2:signal=KILL:when={number}", True)
                if self.staged(job) and not job.output.exists():
                    break
                job.clear()
            self.assertTrue((self.staged(job)[0] / "MANIFEST.json").exists())
            self.left_alone(job, self.staged(job)[0])

    def test_what_an_interrupted_overwrite_replaced_is_never_taken(self):
        """Killed between the exchange and the move to the trash; then the target is removed."""
        for job in map(self.whole, self.jobs()):
            plain = job.command
            job.command = [*plain, "--overwrite"]
            (job.output / "mine").write_bytes(b"of the old one")
            old = contents(job.output)
            for number in range(8, 0, -1):
                self.strace(job, f"renameat2:signal=KILL:when={number}", True)
                if self.staged(job) and (self.staged(job)[0] / "mine").exists():
                    break
                for path in job.parent().rglob(".*.isoshard-*"):
                    if path.is_file():  # a pointer that was to be
                        path.unlink()
                if not (job.output / "mine").exists():
                    (job.output / "mine").write_bytes(b"of the old one")
            staging = self.staged(job)[0]
            self.assertEqual(contents(staging), old)
            shutil.rmtree(job.output)
            job.command = plain
            self.left_alone(job, staging)

    def test_killed_behind_the_last_rename_the_rest_is_done(self):
        """The target is there; its pointer and the files beside it are not."""
        for job in map(self.whole, [self.carrying_job(), *self.jobs()[:2]]):
            job.command += ["--workers", "1"]
            calls, beside = self.count(job, True), set()
            points = [(call, number) for call in ("rename", "renameat", "renameat2", "fsync")
                      for number in range(1, calls.get(call, 0) + 1)]
            for call, number in points:
                job.clear()
                self.strace(job, f"{call}:signal=KILL:when={number}", True)
                if not job.output.exists() or job.pointer.exists():
                    continue
                beside.add(len(list(job.pointer.parent.iterdir())))
                before = fingerprint(job.output)
                result = run([*job.command, "--resume", "--json"])
                self.assertEqual(result.returncode, 0, result.stderr)
                figures = self.figures(result)
                self.assertIn(str(job.pointer), figures["finished"])
                self.assertEqual(fingerprint(job.output), before)
                for path in job.parent().rglob(".*.isoshard-*"):
                    path.unlink()  # the text that was to become a file
                self.same(job)
            self.assertTrue(beside, "it was never killed there")

    def test_a_flock_that_fails_is_told_and_one_that_is_not_there_is_not(self):
        job = self.whole(self.reshard_job())
        job.clear()
        result = self.strace(job, "flock:error=EIO", True)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertIn("Locking the folder", result.stderr)
        self.assertEqual(job.hidden(), [])
        for error in ("ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EBADF"):
            job.clear()
            result = self.strace(job, f"flock:error={error}", True)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.same(job)

    def test_a_second_signal_tells_how_to_go_on(self):
        """Held up in its first fsync, it gets two."""
        job = self.whole(self.reshard_job())
        for resume in (True, False):
            job.clear()
            process = subprocess.Popen(
                ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e",
                 "inject=fsync:delay_enter=30000000:when=1", CONFIG.program,
                 *map(str, job.command), *(["--resume"] if resume else [])],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for _ in range(1000):
                if any(True for each in self.staged(job) for _ in each.glob("*.pt")):
                    break
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            errors = process.communicate(timeout=60)[1]
            self.assertIn(process.returncode, (128 + signal.SIGTERM, 128 + signal.SIGINT), errors)
            self.assertIn("second signal", errors)
            self.assertIn(str(self.staged(job)[0]), errors)
            self.assertEqual("delete that folder" in errors, not resume)
            self.assertEqual("with --resume: it goes on from there" in errors, resume)

    def test_a_resumed_run_is_killed_too(self):
        job = self.whole(self.reshard_job())
        job.command += ["--workers", "1"]
        self.lay(job)
        half = next(path for path in self.staged(job)[0].rglob("*") if path.suffix == ".pt")
        half.write_bytes(half.read_bytes()[:100])
        plain, job.command = job.command, [*job.command, "--resume"]
        for call in ("fsync", "pwrite64", "syncfs", "renameat2"):
            result = self.strace(job, f"{call}:signal=KILL:when=1", True)
            self.assertNotEqual(result.returncode, 0)
            self.assertTrue(self.staged(job))
        job.command = plain
        self.resume(job)

    def test_a_signal_keeps_what_was_written_with_resume_alone(self):
        for job in map(self.whole, self.jobs()):
            job.command += ["--workers", "1"]
            plain = job.command
            for name, number in (("TERM", signal.SIGTERM), ("INT", signal.SIGINT)):
                job.clear()
                job.command = plain
                result = self.strace(job, f"fsync:signal={name}:when=1", True)
                self.assertEqual(result.returncode, 128 + number, result.stderr)
                self.assertIn("One with --resume keeps", result.stderr)
                self.assertEqual(job.hidden(), [])
                job.command = [*plain, "--resume"]
                result = self.strace(job, f"fsync:signal={name}:when=1", True)
                self.assertEqual(result.returncode, 128 + number, result.stderr)
                self.assertEqual(len(self.staged(job)), 1)
                self.assertIn(str(self.staged(job)[0]), result.stderr)
                self.assertIn("with --resume: it goes on from there", result.stderr)
                job.command = plain
                figures, _ = self.resume(job)
                self.assertIsNotNone(figures["resumed"])

    def test_an_error_removes_what_was_written(self):
        job = self.whole(self.reshard_job())
        self.lay(job)
        job.command.append("--resume")
        result = self.strace(job, "fsync:error=EIO:when=2", True)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertEqual(job.hidden(), [])
