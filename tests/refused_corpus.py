#!/usr/bin/env python3
"""refused_corpus.py PROGRAM TRACES [unittest arguments]: the hostile corpus of traces/refused.

Every row is put into a folder of its own and given to `inspect`, `verify` and `convert`:

  refused   convert ends with 2, one message with file, what is safe and what to do next, the
            row's error code and words; verify with the row's verdict and 1, or with 2; inspect with
            2 or, where headers do not show it, 0
  sound     all three end with 0, verify says COMPLETE
  always    within 1 s of processor time and 256 MiB; no file (a canary of code that ran) made,
            changed or taken away anywhere in the folder around it
  traced    every 24th row under strace: no child process, no socket, nothing opened for writing
            and no regular file read outside the folder and the system's own (class Traced;
            skipped, with 77 if it is asked for alone, where nothing can be traced)

Rows run in two processes. KNOWN lists rows that do not hold yet, each with what is wrong; a row
that holds again must leave it. Python's standard library only.

Not verified here: that a message is well written; other verbs than these three.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "traces" / "refused"))
import cases  # noqa: E402
from message_check import problems  # noqa: E402
from program_case import CONFIG, MEMORY, run_tests  # noqa: E402
from tracing import TracedCase, status_of, traced  # noqa: E402

SANITIZED = "san" in os.environ.get("ISOSHARD_FLAVOUR", "")  # slower, larger, no limits
SECONDS, KILOBYTES = (60.0, 8 << 20) if SANITIZED else (1.0, 256 << 10)
PROCESSES = 2
TRACED = 24  # every so many rows
FLOOR, SOUND_FLOOR = 834, 39  # rows that are refused, and sound ones

ROWS = {row.name: row for row in cases.rows()}

# Row → what does not hold.
KNOWN = {
}

OUTSIDE = [Path("/tmp/isoshard-escape"), Path("/tmp/escape")]
SYSTEM = ("/lib", "/usr", "/etc/ld.so", "/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/ssl")


class Run:
    """One run within limits. status, out, err, seconds, kilobytes."""

    def __init__(self, folder, arguments):
        out, err = folder / "stdout", folder / "stderr"
        with open(out, "wb") as to, open(err, "wb") as told:
            process = subprocess.Popen(
                [CONFIG.program, *map(str, arguments)], stdout=to, stderr=told,
                stdin=subprocess.DEVNULL, cwd=folder / "here",
                env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder / "here"),
                     "TMPDIR": str(folder / "here")},
            )
            self.limit(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = self.status = os.waitstatus_to_exitcode(status)
        self.out, self.err = (path.read_bytes().decode("utf-8", "replace") for path in (out, err))
        self.seconds, self.kilobytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss
        self.objects = [json.loads(line) for line in self.out.splitlines() if line[:1] == "{"]

    @staticmethod
    def limit(number):
        """So that a bomb ends as a failed row and not as a dead machine."""
        try:
            resource.prlimit(number, resource.RLIMIT_CPU, (20, 20))
            if not SANITIZED:
                resource.prlimit(number, resource.RLIMIT_AS, (3 << 30, 3 << 30))
        except ProcessLookupError:  # it has ended
            pass

    def first(self, kind):
        return next((each for each in self.objects if each.get("kind") == kind), {})

    def __str__(self):
        return (f"status {self.status}, {self.seconds:.2f} s, {self.kilobytes >> 10} MiB: "
                f"{self.err.strip()[:600]}")


def snapshot(folder):
    """Every path below with what would tell a change."""
    found = {}
    for path, names, files in os.walk(folder):
        for name in names + files:
            each = os.path.join(path, name)
            try:
                status = os.lstat(each)
            except OSError:  # deeper than a path may be long
                continue
            small = stat.S_ISREG(status.st_mode) and status.st_size < 1 << 16
            found[each] = (
                status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns,
                hashlib.sha256(Path(each).read_bytes()).digest() if small else None,
            )
    return found


class Judge:
    """Runs one row and gathers what does not hold."""

    def __init__(self, row, folder):
        self.row, self.folder, self.failures = row, folder, []
        self.seconds, self.kilobytes = 0.0, 0
        (folder / "here").mkdir()
        self.source = row.make(folder / "here")
        self.target = folder / "here" / "out" / "target"

    def check(self, holds, what, run=""):
        if not holds:
            self.failures.append(f"{what} [{run}]" if run else what)

    def commands(self):
        yield "inspect", ["inspect", self.source, "--json"]
        yield "verify", ["verify", self.source, "--json"]
        yield "convert", ["convert", self.source, self.target, "--to", self.row.to, "--json",
                          "--quiet"]

    def judge(self):
        before = snapshot(self.folder / "here")
        for verb, arguments in self.commands():
            if self.failures and self.row.name in KNOWN:
                break
            run = Run(self.folder, arguments)
            if run.seconds >= SECONDS and verb != "convert":  # of a busy machine, perhaps
                run = min(run, Run(self.folder, arguments), key=lambda each: each.seconds)
            self.seconds = max(self.seconds, run.seconds)
            self.kilobytes = max(self.kilobytes, run.kilobytes)
            self.check(run.seconds < SECONDS, f"{verb} took {run.seconds:.2f} s", run)
            self.check(run.kilobytes < KILOBYTES, f"{verb} took {run.kilobytes >> 10} MiB", run)
            getattr(self, verb)(run)
            if run.status or verb != "convert":
                after = snapshot(self.folder / "here")
                changed = {path for path, _ in before.items() ^ after.items()}
                self.check(not changed, f"{verb} changed {sorted(changed)[:3]}")
            for path in OUTSIDE:
                self.check(not path.exists(), f"{verb} wrote {path}")
        return self

    def told(self, run, verb):
        """The one message of a refusal."""
        error, row = run.first("error"), self.row
        self.check(run.err.count("isoshard: ") == 1, f"{verb}: not one message", run)
        self.check(error.get("code") == row.code, f"{verb}: code {error.get('code')}, not "
                   f"{row.code}", run)
        for wrong in problems(run.err, run.out, of_content=True):
            self.check(False, f"{verb}: {wrong}", run)
        text = " ".join(error.get(key, "") for key in ("what", "file", "entry", "expected",
                                                       "found"))
        self.check(row.words in text, f"{verb}: no {row.words!r} in the message", run)
        self.check(not any(ord(c) < 32 and c != "\n" or 0x7F <= ord(c) < 0xA0
                           for c in run.err), f"{verb}: control characters in the message", run)

    def inspect(self, run):
        self.check(run.status in (0, 2), f"inspect ends with {run.status}", run)
        if run.status == 2:
            self.check(self.row.code, "inspect refuses a sound source", run)
            self.told(run, "inspect")
        else:
            self.check(not self.row.inspect or not self.row.code, "inspect sees nothing", run)

    def verify(self, run):
        self.check(run.status == (0 if self.row.verdict == "COMPLETE" else 1) or run.status == 2
                   and self.row.code, f"verify ends with {run.status}", run)
        if run.status == 2:
            return self.told(run, "verify")
        found = run.first("verification")
        self.check(found.get("verdict") == self.row.verdict,
                   f"verify says {found.get('verdict')}, not {self.row.verdict}",
                   json.dumps(found.get("findings", ""))[:500])
        if run.status == 1:
            text = json.dumps(found.get("findings"), ensure_ascii=False)
            self.check("".join(json.dumps(self.row.words, ensure_ascii=False)[1:-1]) in text,
                       f"verify: no {self.row.words!r}", text[:500])

    def convert(self, run):
        if self.row.code:
            self.check(run.status == 2, f"convert ends with {run.status}", run)
            if run.status == 2:
                self.told(run, "convert")
            self.check(not self.target.parent.exists(), "convert left a target")
        else:
            self.check(run.status == 0, f"convert ends with {run.status}", run)
            self.check(self.target.is_dir(), "convert made nothing")


def judged(name, program):
    """(name, failures, seconds, kilobytes); in a process of the pool."""
    CONFIG.program = program
    folder = Path(tempfile.mkdtemp(prefix="isoshard-test-", dir=MEMORY))
    try:
        judge = Judge(ROWS[name], folder).judge()
        return name, judge.failures, judge.seconds, judge.kilobytes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


CHILD = re.compile(r"^\S*\s*(execve|fork|vfork|clone3?|socket\w*|connect|bind|sendto)\(")
OPENED = re.compile(r'open(?:at2?)?\((?:AT_FDCWD, |\d+, )?"((?:[^"\\]|\\.)*)", \{?(?:flags=)?'
                    r"([A-Z_|0-9a-z]+).*\) = \d")


def side_effects(name, program):
    """(name, what a run did besides reading the source)."""
    CONFIG.program = program
    folder = Path(tempfile.mkdtemp(prefix="isoshard-test-", dir=MEMORY))
    found = []
    try:
        judge = Judge(ROWS[name], folder)
        for verb, arguments in judge.commands():
            lines = traced(folder / "trace", [program, *map(str, arguments)],
                           cwd=folder / "here")
            for number, line in enumerate(lines):
                call = CHILD.match(line)
                thread = "CLONE_THREAD" in line
                if call and number > 0 and not thread:
                    found.append(f"{verb}: {line[:120]}")
                opened = OPENED.search(line)
                if opened is None:
                    continue
                path, flags = opened.groups()
                inside = not path.startswith("/") or path.startswith(str(folder / "here"))
                writes = re.search(r"O_WRONLY|O_RDWR|O_CREAT", flags)
                if writes and not (verb == "convert" and inside):
                    found.append(f"{verb} opens for writing: {path}")
                if not inside and not path.startswith(SYSTEM) and "O_DIRECTORY" not in flags:
                    found.append(f"{verb} reads {path}")
        return name, found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_two_processes(work, names):
    with ProcessPoolExecutor(PROCESSES) as pool:
        return list(pool.map(work, names, [CONFIG.program] * len(names), chunksize=4))


class Corpus(unittest.TestCase):
    slowest, largest = ("", 0.0), ("", 0)

    def test_every_row(self):
        only = os.environ.get("ISOSHARD_ROWS", "")
        names = [name for name in ROWS if only in name]
        for name, failures, seconds, kilobytes in in_two_processes(judged, names):
            Corpus.slowest = max(Corpus.slowest, (name, seconds), key=lambda pair: pair[1])
            Corpus.largest = max(Corpus.largest, (name, kilobytes), key=lambda pair: pair[1])
            with self.subTest(name):
                if name in KNOWN:
                    self.assertTrue(failures, f"holds again; take it out of KNOWN: {KNOWN[name]}")
                else:
                    self.assertEqual(failures, [])

    def test_known_rows_exist(self):
        self.assertEqual([name for name in KNOWN if name not in ROWS], [])

    def test_the_corpus_is_as_large_as_it_says(self):
        """Rows may come; the floor is raised with them, so that none goes unnoticed."""
        count = Counter(row.name.split(".")[0] for row in ROWS.values())
        self.assertGreaterEqual(sum(count.values()) - count["sound"], FLOOR)
        self.assertGreaterEqual(count["sound"], SOUND_FLOOR)


class Traced(TracedCase):
    def test_no_child_no_socket_no_other_file(self):
        for name, found in in_two_processes(side_effects, list(ROWS)[::TRACED]):
            with self.subTest(name):
                self.assertEqual(found, [])


def main():
    outcome, seconds = run_tests(__doc__)
    count = Counter(row.name.split(".")[0] for row in ROWS.values())
    print(f"refused_corpus.py: {', '.join(f'{n} {family}' for family, n in count.items())}; "
          f"slowest {Corpus.slowest[1]:.2f} s ({Corpus.slowest[0]}), largest "
          f"{Corpus.largest[1] >> 10} MiB ({Corpus.largest[0]}), {len(KNOWN)} known, "
          f"{seconds:.0f} s")
    return status_of(outcome)


if __name__ == "__main__":
    sys.exit(main())
