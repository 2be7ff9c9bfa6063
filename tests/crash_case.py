"""What the tests of tests/crash.py share: jobs, and what must hold after one was disturbed.

Python's standard library only. Not verified here: anything.
"""

import hashlib
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import hostile as h
from message_check import problems
from program_case import ASKED, CONFIG, ProgramCase

MOST = 10**9 if ASKED == "all" else max(10, min(int(ASKED), 60))
FIGURES = {
    "killed": 0,
    "failed calls": 0,
    "interrupted": 0,
    "absent after": 0,
    "whole after": 0,
    "run again": 0,
}
# System calls that change a disk, as strace names them.
WRITING = ("pwrite64", "ftruncate", "fsync", "syncfs", "mkdir", "renameat2", "rename", "unlinkat")
ERRORS = {
    "ENOSPC": "no space",
    "EDQUOT": "quota",
    "EROFS": "read-only",
    "EACCES": "permission",
    "EIO": "input/output",
}


def spread(count, most=MOST):
    """1 … count, or `most` of them, evenly spread, with both ends."""
    if count <= most:
        return range(1, count + 1)
    return sorted({1 + i * (count - 1) // (most - 1) for i in range(most)})


def fingerprint(folder):
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def run(arguments, before=(), timeout=600, **options):
    return subprocess.run(
        [*before, CONFIG.program, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        **options,
    )


def sections(source):
    result = run(["digest", source, "--json", "--quiet"])
    return json.loads(result.stdout)["sections"] if result.returncode == 0 else result.stderr


class Job:
    """One command, where its output appears, and what that must hold."""

    def __init__(self, place, source, arguments, output, pointer=None):
        self.place, self.source, self.output = place, source, output
        self.command = [arguments[0], source, *arguments[1:], "--quiet", "--json"]
        self.pointer = pointer
        self.before = fingerprint(source if source.is_dir() else source.parent)
        self.expected = sections(source)

    def parent(self):
        return self.place / "out"

    def clear(self):
        shutil.rmtree(self.parent(), ignore_errors=True)

    def hidden(self):
        if not self.parent().is_dir():
            return []
        return [
            str(path)
            for path in self.parent().rglob("*")
            if path.name.startswith(".") and path.parent != self.output
        ]


class Crash(ProgramCase):
    def recording(self, name="z1_bf16_dp2"):
        """A copy of it."""
        target = self.place / "in" / name
        shutil.copytree(self.recorded(name), target)
        return target

    def reshard_job(self, *more):
        out = self.place / "out" / "run"
        return Job(
            self.place,
            self.recording(),
            ["reshard", out, "--to", "dp=3", *more],
            out / "global_step3",
            out / "latest",
        )

    def universal_job(self):
        out = self.place / "out" / "global_step3_universal"
        return Job(
            self.place,
            self.recording("z3_bf16_dp2_frozen"),
            ["convert", out, "--to", "universal"],
            out,
            self.place / "out" / "latest_universal",
        )

    def mount(self, *options):
        point = self.place / "mount"
        point.mkdir(exist_ok=True)
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", point],
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            self.skipTest(f"mount is not permitted here: {result.stderr.strip()}")
        self.addCleanup(subprocess.run, ["umount", "-l", point], capture_output=True)
        return point

    def large_job(self):
        """48 MB of weights: recorded checkpoints are too small to be met half-way by a clock."""
        numel = 1 << 20
        names = [
            (f"layers.{i}.weight", h.tensor((1024, 1024), (1024, 1), key=str(i), numel=numel))
            for i in range(12)
        ]
        storages = [struct.pack("<I", i * 2654435761 % 2**32) * numel for i in range(12)]
        source = self.place / "in" / "pytorch_model.bin"
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(h.torch_file(h.weights(names), storages))
        out = self.place / "out" / "fp32"
        return Job(self.place, source, ["convert", out, "--to", "fp32"], out)

    def told(self, job, result):
        """One message with all its parts, by text and as JSON, that is true of what is there."""
        found = problems(result.stderr, result.stdout, published=job.output.exists())
        self.assertEqual(found, [], result.stderr)

    def check(self, job, again=False, allowed=()):
        """Absent or whole; the source untouched; the same command runs through."""
        if job.output.exists():
            self.assertIn(
                self.compared(job, sections(job.output)),
                [self.compared(job, job.expected), *allowed],
            )
            FIGURES["whole after"] += 1
        else:
            FIGURES["absent after"] += 1
        if job.pointer and job.pointer.exists():
            self.assertEqual(job.pointer.read_text().strip(), job.output.name)
            self.assertTrue(job.output.is_dir(), "the pointer appeared before its folder")
        self.assertEqual(
            fingerprint(job.source if job.source.is_dir() else job.source.parent),
            job.before,
            "the source changed",
        )
        if again:
            result = run(
                [
                    *job.command,
                    *(
                        ["--overwrite"]
                        if job.output.exists() and "--overwrite" not in job.command
                        else []
                    ),
                ]
            )
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(
                self.compared(job, sections(job.output)), self.compared(job, job.expected)
            )
            FIGURES["run again"] += 1

    @staticmethod
    def compared(job, found):
        """Hyper-parameters of universal folders are compared by the program itself."""
        if not isinstance(found, dict):
            return found
        return {key: value for key, value in found.items() if "digest" in value and key != "hyper"}

    def strace(self, job, inject, follow):
        return run(
            job.command,
            before=[
                "strace",
                *(["-f"] if follow else []),
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                f"trace={inject.split(':')[0]}",
                "-e",
                f"inject={inject}",
            ],
        )

    def count(self, job, follow):
        """{system call: most of them that one thread makes}, from a run that succeeds."""
        log = self.place / "strace.log"
        job.clear()
        result = run(
            job.command,
            before=[
                "strace",
                *(["-f"] if follow else []),
                "-qq",
                "-o",
                log,
                "-e",
                f"trace={','.join(WRITING)}",
            ],
        )
        self.assertEqual(result.returncode, 0, result.stderr)
        threads = {}
        for line in log.read_text().splitlines():
            match = re.match(r"(\d+ +)?(\w+)\(", line)
            if match:
                threads.setdefault(match[2], {}).setdefault(match[1], []).append(line)
        return {call: max(map(len, lines.values())) for call, lines in threads.items()}
