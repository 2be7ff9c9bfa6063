#!/usr/bin/env python3
"""crash.py PROGRAM TRACES [unittest arguments]: convert and reshard that are killed, or that meet
a full disk, a read-only folder, a refused permission.

After every case the target is absent or whole (its digest is the source's), the source has the same
bytes, and the same command run again succeeds. strace places a signal or an error at each system
call that writes, renames or makes durable; where strace, mount or setpriv is missing, those tests
are skipped with a reason. ISOSHARD_CASES: so many calls a test at most (default 60, evenly spread;
`all`: every call). Python's standard library only.

Not verified: loss of power (checkpoint/publication_test.cc simulates what was not yet durable).
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from crash_case import ERRORS, FIGURES, Crash, fingerprint, run, sections, spread  # noqa: E402
from message_check import problems  # noqa: E402
from program_case import CONFIG, run_tests  # noqa: E402
from tracing import injected  # noqa: E402


@injected
class EveryCall(Crash):
    def points(self, job):
        """(system call, number, with threads) of each point. Without -f only the main thread
        is seen, whose calls the worker's would otherwise hide."""
        points = []
        for follow in (True, False):
            for call, most in self.count(job, follow).items():
                points += [(call, number, follow) for number in range(1, most + 1)]
        return [points[i - 1] for i in spread(len(points))]

    def killed(self, job, again_every=7):
        for turn, (call, number, follow) in enumerate(self.points(job)):
            with self.subTest(call=call, number=number, threads=follow):
                job.clear()
                result = self.strace(job, f"{call}:signal=KILL:when={number}", follow)
                self.assertIn(result.returncode, (-9, 137, 0), result.stderr)
                FIGURES["killed"] += result.returncode != 0
                self.check(job, again=turn % again_every == 0)

    def test_reshard_killed_at_every_call(self):
        self.killed(self.reshard_job())

    def test_universal_killed_at_every_call(self):
        self.killed(self.universal_job())

    def test_overwrite_killed_at_every_call(self):
        """The old folder or the new one, never neither."""
        job = self.reshard_job("--overwrite")
        other = self.recording("z3_bf16_dp2_frozen")
        old = self.place / "old"
        self.assertEqual(
            run(
                [
                    "reshard",
                    other,
                    old / "run",
                    "--to",
                    "dp=3",
                    "--tag-out",
                    job.output.name,
                    "--quiet",
                ]
            ).returncode,
            0,
        )
        former = self.compared(job, sections(old / "run" / job.output.name))
        points = [p for p in self.points(job) if p[0] not in ("pwrite64", "ftruncate")]
        for call, number, follow in points:
            with self.subTest(call=call, number=number, threads=follow):
                job.clear()
                shutil.copytree(old, job.parent())
                result = self.strace(job, f"{call}:signal=KILL:when={number}", follow)
                FIGURES["killed"] += result.returncode != 0
                self.assertTrue(
                    job.output.is_dir(), "neither the old folder nor the new one is there"
                )
                self.check(job, allowed=[former])

    def test_terminated_at_every_call(self):
        """SIGTERM: exit status 143, a message, and nothing left behind; or done.
        One worker: two would both get the signal, and the second ends the program at once."""
        job = self.reshard_job("--workers", "1")
        for call, number, follow in self.points(job):
            with self.subTest(call=call, number=number, threads=follow):
                job.clear()
                result = self.strace(job, f"{call}:signal=TERM:when={number}", follow)
                self.interrupted(job, result, signal.SIGTERM)

    def interrupted(self, job, result, number):
        if result.returncode == 0:
            self.assertTrue(job.output.is_dir())
        else:
            self.assertEqual(result.returncode, 128 + number, result.stderr)
            self.assertIn("interrupted", result.stderr)
            self.told(job, result)
            FIGURES["interrupted"] += 1
        self.assertEqual(job.hidden(), [], "left behind")
        self.check(job)

    def failing(self, errors, calls):
        job = self.reshard_job()
        points = [p for p in self.points(job) if p[0] in calls]
        for turn, (call, number, follow) in enumerate(points):
            error = errors[turn % len(errors)]
            for times in (f"when={number}", f"when={number}+"):  # once, and from then on
                with self.subTest(
                    call=call, number=number, error=error, times=times, threads=follow
                ):
                    job.clear()
                    result = self.strace(job, f"{call}:error={error}:{times}", follow)
                    if result.returncode == 0:  # a call whose failure does no harm
                        self.check(job)
                        continue
                    FIGURES["failed calls"] += 1
                    self.assertEqual(result.returncode, 2, result.stderr)
                    self.assertIn(ERRORS[error], result.stderr)
                    self.told(job, result)
                    if call not in ("unlinkat", "renameat2", "rename"):
                        self.assertEqual(job.hidden(), [], f"left behind: {result.stderr}")
                    self.check(job)

    def test_full_disk_at_every_write(self):
        self.failing(["ENOSPC", "EDQUOT", "EIO"], ("pwrite64", "ftruncate", "fsync", "syncfs"))

    def test_refused_names(self):
        self.failing(["EACCES", "EROFS", "ENOSPC"], ("mkdir", "renameat2", "rename"))

    def test_failed_sync_fails_the_command(self):
        """After a failed fsync the kernel may have dropped the bytes; the next would succeed."""
        job = self.reshard_job()
        for follow in (True, False):
            for number in spread(self.count(job, follow).get("fsync", 0)):
                with self.subTest(number=number, threads=follow):
                    job.clear()
                    result = self.strace(job, f"fsync:error=EIO:when={number}", follow)
                    self.assertEqual(result.returncode, 2, result.stderr)
                    FIGURES["failed calls"] += 1
                    self.told(job, result)

    def test_pointer_that_cannot_be_written(self):
        """The folder is published by then, and the message must say so."""
        job = self.reshard_job()
        most = self.count(job, False)
        for call in ("rename", "pwrite64", "fsync"):
            number = most.get(call, 0) - (
                1 if call == "fsync" else 0
            )  # the last sync is the parent's
            with self.subTest(call=call):
                self.assertGreater(number, 0)
                job.clear()
                result = self.strace(job, f"{call}:error=ENOSPC:when={number}", False)
                self.assertEqual(result.returncode, 2, result.stderr)
                self.assertIn("no space", result.stderr)
                self.assertTrue(
                    job.output.is_dir(), "the folder was not yet published: another call was hit"
                )
                self.told(job, result)
                self.check(job)


class Clock(Crash):
    """Signals at random moments of a conversion of 48 MB."""

    def moments(self, job, number, rounds):
        began = time.monotonic()
        self.assertEqual(run(job.command).returncode, 0)
        lasts = time.monotonic() - began
        self.check(job)
        rolls = random.Random(20260822)
        for turn in range(rounds):
            job.clear()
            process = self.started(job)
            time.sleep(rolls.uniform(0, lasts))
            sent = time.monotonic()
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
            yield process.returncode, errors, time.monotonic() - sent

    def test_killed(self):
        job = self.large_job()
        for turn, (status, errors, _) in enumerate(self.moments(job, signal.SIGKILL, 12)):
            self.assertIn(status, (0, -9), errors)
            FIGURES["killed"] += status != 0
            self.check(job, again=turn % 6 == 0)

    def test_terminated(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            job = self.large_job()
            for status, errors, seconds in self.moments(job, number, 8):
                # A signal before main() has begun ends the program as the kernel does.
                self.assertIn(status, (0, 128 + number, -number), errors)
                self.assertLess(
                    seconds,
                    2 if seconds < 2 else 2 + os.getloadavg()[0],
                    "SIGTERM must end it within 2 s",
                )
                if status == 128 + number:
                    self.assertIn("interrupted", errors)
                    self.assertIn("next:", errors)
                    FIGURES["interrupted"] += 1
                self.assertEqual(job.hidden(), [])
                self.check(job)
            shutil.rmtree(job.source.parent)
            job.clear()

    def started(self, job):
        return subprocess.Popen(
            [CONFIG.program, *map(str, job.command)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_ended_by_a_second_signal(self):
        """At once, and what is left behind is named; the next run says so again."""
        job = self.large_job()
        began = time.monotonic()
        self.assertEqual(run(job.command).returncode, 0)
        lasts, rolls, left = time.monotonic() - began, random.Random(20261121), 0
        for turn in range(60):
            job.clear()
            process = self.started(job)
            time.sleep(rolls.uniform(0, lasts))
            for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
                process.send_signal(number)  # both wait, so that one handler follows the other
            _, errors = process.communicate(timeout=60)
            if process.returncode == 0 or process.returncode < 0:  # over, or before main()
                self.assertEqual(job.hidden(), [])
                continue
            self.assertIn(process.returncode, (128 + signal.SIGTERM, 128 + signal.SIGINT), errors)
            hidden = [path for path in job.hidden() if Path(path).parent == job.parent()]
            self.assertIn("second signal", errors)
            for path in hidden:
                self.assertIn(f'file:     "{path}"', errors)
                self.assertIn("delete that folder", errors)
            FIGURES["interrupted"] += 1
            self.check(job)
            if not hidden or job.output.exists():
                continue
            result = run([each for each in job.command if each != "--quiet"])
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn(Path(hidden[0]).name, result.stderr)
            left += 1
            if left == 3:
                return
        self.assertTrue(left, "no folder was ever left behind: another moment was met")

    def test_two_at_once(self):
        """Two commands with one target: one wins, the other says that the target exists."""
        job = self.reshard_job()
        for _ in range(5):
            job.clear()
            both = [self.started(job) for _ in range(2)]
            outcomes = [
                (process.communicate(timeout=60)[1], process.returncode) for process in both
            ]
            self.assertIn(0, [status for _, status in outcomes], outcomes)
            for errors, status in outcomes:
                if status != 0:
                    self.assertEqual(status, 2, errors)
                    self.assertRegex(errors, "target|exists|appeared|taken")
            self.assertEqual(job.hidden(), [])
            self.check(job)

    def test_source_cut_while_it_is_read(self):
        """Refused, or equal to what was there: never a mixture."""
        job = self.large_job()
        whole = job.source.read_bytes()
        rolls = random.Random(7)
        for _ in range(5):
            job.clear()
            job.source.write_bytes(whole)
            process = self.started(job)
            time.sleep(rolls.uniform(0.005, 0.06))
            os.truncate(job.source, rolls.randrange(len(whole)))
            _, errors = process.communicate(timeout=60)
            self.assertIn(process.returncode, (0, 2), errors)
            if process.returncode == 2:
                self.assertFalse(job.output.exists())
                self.assertIn("file:", errors)
            else:
                self.assertEqual(
                    self.compared(job, sections(job.output)), self.compared(job, job.expected)
                )


class Disks(Crash):
    """Real file systems that are full, read-only, or somebody else's."""

    def refused(self, source, target, *words, before=()):
        kept = fingerprint(source)
        result = run(["convert", source, target, "--to", "universal", "--quiet"], before=before)
        self.said(result, source, target, *words)
        self.assertEqual(fingerprint(source), kept)
        return result

    def said(self, result, source, target, *words):
        """Exit status 2, and a message that is true of what is there."""
        self.assertEqual(result.returncode, 2, result.stderr)
        for word in words:
            self.assertIn(word, result.stderr)
        self.assertEqual(problems(result.stderr, published=target.exists()), [], result.stderr)
        FIGURES["failed calls"] += 1
        if target.exists():  # only the pointer failed
            self.assertEqual(
                Crash.compared(None, sections(target)), Crash.compared(None, sections(source))
            )
        FIGURES["whole after" if target.exists() else "absent after"] += 1

    def test_too_small_a_disk_is_said_before_any_work(self):
        source = self.recording()
        point = self.mount("size=16k")
        result = self.refused(source, point / "u", "space", "bytes")
        self.assertRegex(result.stderr, r"expected: \d+ bytes")
        self.assertEqual(list(point.iterdir()), [])

    def test_too_few_inodes_are_said_before_any_work(self):
        point = self.mount("size=8m", "nr_inodes=20")
        self.refused(self.recording(), point / "u", "inodes")
        self.assertEqual(list(point.iterdir()), [])

    def test_disk_that_fills_in_the_middle(self):
        """Sixty files of 1.6 kB take a page each: more than was foreseen."""
        source = self.recording()
        for kilobytes in (132, 160, 200, 232, 240, 248, 256, 264, 272):
            point = self.mount(f"size={kilobytes}k")
            result = run(["convert", source, point / "u", "--to", "universal", "--quiet"])
            if result.returncode != 0:
                with self.subTest(kilobytes=kilobytes):
                    self.said(result, source, point / "u", "space")
                    self.assertFalse(
                        [path for path in point.iterdir() if path.name != "u"],
                        "left behind on the full disk",
                    )
            subprocess.run(["umount", point], check=True)

    def test_read_only_file_system(self):
        source, point = self.recording(), self.mount("size=8m")
        subprocess.run(["mount", "-o", "remount,ro", point], check=True)
        self.refused(source, point / "u", "read-only")

    def test_read_only_source_is_enough(self):
        point = self.mount("size=8m")
        shutil.copytree(self.recording(), point / "source")
        subprocess.run(["mount", "-o", "remount,ro", point], check=True)
        result = run(
            ["convert", point / "source", self.place / "out", "--to", "universal", "--quiet"]
        )
        self.assertEqual(result.returncode, 0, result.stderr)

    def nobody(self):
        """A prefix that runs the program without root's powers."""
        self.place.chmod(0o755)
        if os.getuid() != 0:
            return []
        if not shutil.which("setpriv"):
            self.skipTest("root ignores permissions, and setpriv is not installed")
        copy = self.place / "program"
        shutil.copy(CONFIG.program, copy)
        copy.chmod(0o755)
        self.addCleanup(setattr, CONFIG, "program", CONFIG.program)
        CONFIG.program = str(copy)
        before = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        if subprocess.run([*before, copy, "--version"], capture_output=True).returncode != 0:
            self.skipTest("setpriv is not permitted here")
        return before

    def test_folder_without_permission(self):
        source, before = self.recording(), self.nobody()
        closed = self.place / "closed"
        closed.mkdir(mode=0o555)
        self.refused(source, closed / "u", "permission", str(closed), before=before)
        self.refused(source, closed / "a" / "b" / "u", "permission", before=before)
        self.assertEqual(list(closed.iterdir()), [])

    def test_source_without_permission(self):
        source, before = self.recording(), self.nobody()
        shard = next(source.rglob("*optim_states.pt"))
        for path, mode in (
            (shard, 0),
            (source / "latest", 0),
            (shard.parent, 0),
            (source, 0),
            (shard.parent, 0o444),
        ):
            with self.subTest(path=path.name, mode=mode):
                kept = path.stat().st_mode
                path.chmod(mode)
                self.addCleanup(path.chmod, kept)
                result = run(["digest", source, "--quiet"], before=before)
                path.chmod(kept)
                self.assertEqual(result.returncode, 2, result.stderr)
                for word in ("permission", path.name, "next:"):
                    self.assertIn(word, result.stderr)
                FIGURES["failed calls"] += 1

    def test_file_size_limit(self):
        """ulimit -f: the kernel sends SIGXFSZ, which must not end the program without a word."""
        source = self.recording()
        result = run(
            ["convert", source, self.place / "out", "--to", "universal", "--quiet"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        )
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertIn("larger than allowed", result.stderr)
        self.assertFalse((self.place / "out").exists())

    def test_few_open_files(self):
        result = run(
            ["convert", self.recording(), self.place / "out", "--to", "universal", "--quiet"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)),
        )
        self.assertIn(result.returncode, (0, 2), result.stderr)
        if result.returncode == 2:
            self.assertIn("open", result.stderr)


def main():
    outcome, seconds = run_tests(__doc__)
    print(
        "crash.py: "
        + ", ".join(f"{count} {what}" for what, count in FIGURES.items())
        + f", {len(outcome.skipped)} skipped, {seconds:.0f} s"
    )
    return 0 if outcome.wasSuccessful() and sum(FIGURES.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
