#!/usr/bin/env python3
"""shim.py PROGRAM TRACES SHIM [unittest arguments]: convert, reshard and export on a disk that
writes and reads in part, lies, forgets, reports late, or a machine without memory.

SHIM is the LD_PRELOAD library of tests/shim/fault_shim.cc, which strikes at the n-th call that
concerns the source's files, or the target's. After every case: exit status 0 and the target is
whole (its digest is the source's, `verify` agrees, the pointer names it), or 2 and it is absent, or
whole where the message says so; the message passes tests/message_check.py, by text and by JSON; no
hidden folder is left; the source has the same bytes. ISOSHARD_CASES: so many calls a fault at most
(default 60, a sixth of it here, evenly spread; `all`: every call). Python's standard library only.

Not verified: EINTR without end, which would be repeated without end; sanitized builds for memory.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from crash_case import MOST, Crash, Job, fingerprint, run, sections, spread  # noqa: E402
from message_check import problems  # noqa: E402
from program_case import CONFIG, run_tests  # noqa: E402

STRUCK = {}  # what was struck → [cases, refused, done all the same]
EACH = MOST if MOST > 60 else max(4, MOST // 6)


class Outcome:
    """One run under the shim: its status, what it said, and what the shim logged."""

    def __init__(self, place, job, fault, side):
        log = place / "faults.log"
        log.unlink(missing_ok=True)
        under = {"source": place / "in", "target": place / "out", "all": place}[side]
        environment = {
            "LD_PRELOAD": CONFIG.shim,
            "ISOSHARD_FAULT": fault,
            "ISOSHARD_FAULT_UNDER": str(under),
            "ISOSHARD_FAULT_LOG": str(log),
            "ASAN_OPTIONS": "verify_asan_link_order=0:" + os.environ.get("ASAN_OPTIONS", ""),
        }
        done = run([*job.command, "--workers", "1"], env={**os.environ, **environment})
        self.fault, self.status = f"{fault} of {side}", done.returncode
        self.out, self.err = done.stdout, done.stderr
        words = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        self.counts = {call: int(number) for word, call, number in words if word == "count"}
        self.struck = sum(word == "struck" for word, _, _ in words)
        self.told = sum(word == "told" for word, _, _ in words)

    def __str__(self):
        return f"{self.fault}: status {self.status}\n{self.err}"


class Shim(Crash):
    def setUp(self):
        super().setUp()
        out = self.place / "out" / "fp32"
        fp32 = Job(self.place, self.recording("z1_fp16_dp2"), ["convert", out, "--to", "fp32"], out)
        fp32.expected = {key: fp32.expected[key] for key in ("weights", "buffers")}
        # Of the universal folder's many files none is synced for itself: one syncfs does it.
        self.jobs = [self.reshard_job(), self.universal_job(), fp32]

    def counts(self, job, side):
        job.clear()
        outcome = Outcome(self.place, job, "", side)
        self.assertEqual(outcome.status, 0, outcome)
        return outcome.counts

    def met(self, job, fault, side):
        """Runs it, and counts. By one worker: with more, any call may be the one."""
        job.clear()
        outcome = Outcome(self.place, job, fault, side)
        self.assertTrue(outcome.struck, f"{fault} of {side} was never met")
        kind = "{0} {2}".format(*fault.replace("+", "").split(":"))
        row = STRUCK.setdefault(f"{kind} of {side}", [0, 0, 0])
        row[0] += 1
        row[1 if outcome.status else 2] += 1
        return outcome

    def strike(self, job, fault, side, expected=(0, 2)):
        """Runs it, and judges what is there."""
        outcome = self.met(job, fault, side)
        self.assertIn(outcome.status, expected, outcome)
        self.judge(job, outcome)
        return outcome

    def judge(self, job, outcome):
        if outcome.status == 0:
            self.assertTrue(job.output.is_dir(), outcome)
        else:
            self.assertEqual(
                problems(outcome.err, outcome.out, published=job.output.exists()), [], outcome
            )
        # Without memory there may be no way to clean up; then it is said.
        if "doctor --clean" not in outcome.err:
            self.assertEqual(job.hidden(), [], f"left behind: {outcome}")
        self.check(job)

    def each(self, call, whats, side, expected, most=EACH):
        for job in self.jobs:
            numbers = spread(self.counts(job, side)[call], most)
            for what in whats:
                for number in numbers:
                    with self.subTest(job=job.command[0], number=number, what=what, side=side):
                        self.strike(job, f"{call}:{number}:{what}", side, expected)

    def always(self, call, whats, side, expected):
        for job in self.jobs:
            for what in whats:
                with self.subTest(job=job.command[0], what=what, side=side):
                    self.strike(job, f"{call}:1+:{what}", side, expected)


class Parts(Shim):
    """Reads and writes that do a part of what was asked for: the rest is asked for again."""

    def test_short_writes(self):
        self.each("pwrite", ("half", "one"), "target", (0,))
        self.always("pwrite", ("half", "one"), "target", (0,))

    def test_short_reads(self):
        for side in ("source", "target"):
            self.each("pread", ("half", "one"), side, (0,))
            self.always("pread", ("half",), side, (0,))

    def test_interrupted(self):
        for call, side in (("pwrite", "target"), ("pread", "source"), ("pread", "target"),
                           ("open", "source"), ("open", "target")):  # fmt: skip
            self.each(call, ("EINTR",), side, (0,))

    def test_a_write_of_nothing_ends(self):
        self.each("pwrite", ("none",), "target", (2,))
        self.always("pwrite", ("none",), "target", (2,))

    def test_a_file_that_ends_early(self):
        for side in ("source", "target"):
            self.each("pread", ("none",), side, (2,))


class Durable(Shim):
    """Errors that a file system has kept back until a file is closed or made durable."""

    ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINTR")

    def test_closing_fails(self):
        self.each("close", self.ERRORS, "target", (2,))

    def test_syncing_fails(self):
        for call in ("fsync", "syncfs"):
            self.each(call, self.ERRORS, "target", (2,))

    def test_syncing_fails_later(self):
        """The fsync that should have told succeeds; the next that can tell does."""
        for call in ("fsync", "syncfs", "close"):
            for job in self.jobs:
                for number in spread(self.counts(job, "target")["fsync"], EACH):
                    with self.subTest(job=job.command[0], number=number, told_by=call):
                        fault = f"fsync:{number}:EIO@{call}"
                        outcome = self.strike(job, fault, "target")
                        self.assertEqual(outcome.status, 2 if outcome.told else 0, outcome)


class Reads(Shim):
    def test_a_block_that_cannot_be_read(self):
        for side in ("source", "target"):
            self.each("pread", ("EIO", "ESTALE"), side, (2,))
            self.always("pread", ("EIO",), side, (2,))

    def test_one_bit_is_read_wrong(self):
        """Refused; or, where the byte says nothing, the target is right all the same."""
        for side in ("source", "target"):
            self.each("pread", ("flip",), side, (0, 2))
            self.always("pread", ("flip",), side, (2,))

    def test_verify_sees_one_bit(self):
        for source in (self.jobs[0].source, self.jobs[1].source):
            job = Job(self.place, source, ["verify"], source)
            whole = Outcome(self.place, job, "", "source")
            self.assertEqual(whole.status, 0, whole)
            for number in spread(whole.counts["pread"], EACH):
                fault = f"pread:{number}:flip"
                outcome = Outcome(self.place, job, fault, "source")
                with self.subTest(source=source.name, number=number):
                    self.assertTrue(outcome.struck)
                    self.assertIn(outcome.status, (0, 1, 2), outcome)
                    if outcome.status == 0:  # the white space behind a number, say
                        self.assertEqual(outcome.out, whole.out)
                    elif outcome.status == 2:
                        self.assertEqual(problems(outcome.err, outcome.out), [], outcome)

    def test_files_that_do_not_open(self):
        errors = "EMFILE ENFILE ELOOP ENOTDIR ENAMETOOLONG EACCES EPERM EROFS".split()
        for side in ("source", "target"):
            for job in self.jobs:
                for turn, number in enumerate(spread(self.counts(job, side)["open"], EACH)):
                    what = errors[turn % len(errors)]
                    with self.subTest(job=job.command[0], number=number, what=what, side=side):
                        self.strike(job, f"open:{number}:{what}", side)

    def test_a_stale_handle_is_looked_up_again(self):
        for side in ("source", "target"):
            self.each("open", ("ESTALE",), side, (0,), most=6)
            self.always("open", ("ESTALE",), side, (2,))


class Lies(Shim):
    """A disk that says "done" and has not, or not so, or elsewhere."""

    def test_a_write_is_not_what_was_written(self):
        for job in self.jobs:
            for what in ("flip", "lost", "aside"):
                for number in spread(self.counts(job, "target")["pwrite"], EACH):
                    with self.subTest(job=job.command[0], number=number, what=what):
                        self.lied(job, f"pwrite:{number}:{what}", what)

    def lied(self, job, fault, what):
        """Told at once by reading again, or by `verify` or the pointer later."""
        outcome = self.met(job, fault, "target")
        if outcome.status != 0:
            self.assertEqual(outcome.status, 2, outcome)
            return self.judge(job, outcome)
        self.assertEqual(fingerprint(job.source), job.before, "the source changed")
        whole = job.output if job.pointer is None else job.pointer.parent
        if job.pointer and job.pointer.read_text().strip() != job.output.name:
            self.assertNotEqual(run(["verify", whole]).returncode, 0, outcome)
        elif run(["verify", job.output]).returncode == 0:
            told = self.compared(job, sections(job.output)), self.compared(job, job.expected)
            self.assertEqual(*told, outcome)
            if what == "flip":
                self.assertEqual(outcome.fault, "", "a wrong bit that nothing tells")


class Memory(Shim):
    def test_no_memory(self):
        """Every allocation once, from the first of main() on."""
        if b"libasan" in subprocess.run(["ldd", CONFIG.program], capture_output=True).stdout:
            self.skipTest("a sanitized program has its own malloc")
        for job in self.jobs:
            counts = self.counts(job, "all")["malloc"]
            for number in spread(counts, 3 * EACH):
                with self.subTest(job=job.command[0], number=number):
                    self.strike(job, f"malloc:{number}:ENOMEM", "all")


def main():
    if len(sys.argv) < 4 or not os.path.isfile(sys.argv[3]):
        print(__doc__)
        return 2
    CONFIG.shim = os.path.abspath(sys.argv.pop(3))
    outcome, seconds = run_tests(__doc__)
    for kind, (cases, refused, done) in sorted(STRUCK.items()):
        print(f"{cases:6d} {kind}: {refused} refused, {done} whole all the same")
    print(
        f"shim.py: {sum(row[0] for row in STRUCK.values())} faults of {len(STRUCK)} kinds, "
        f"{len(outcome.skipped)} skipped, {seconds:.0f} s"
    )
    return 0 if outcome.wasSuccessful() and STRUCK else 1


if __name__ == "__main__":
    sys.exit(main())
