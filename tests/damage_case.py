"""What tests/damage.py and its parts share: one run within limits, and how it is judged.

Python's standard library only. Not verified here: anything.
"""

import json
import os
import resource
import shutil
import socket
import subprocess
import tempfile

from program_case import CONFIG, ProgramCase

SANITIZED = "san" in os.environ.get(
    "ISOSHARD_FLAVOUR", ""
)  # ISOSHARD_FLAVOUR=san: no limits, slower
SECONDS, KILOBYTES = (60.0, 8 << 20) if SANITIZED else (1.0, 256 << 10)  # of one refused case
FIGURES = {"refused": 0, "refused by verify": 0, "fine": 0, "seconds": 0.0, "kilobytes": 0}
UNHELPFUL = []  # messages without a part that contracts §6 asks for


class Outcome:
    def __init__(self, arguments, folder=None):
        read_out, write_out = os.pipe()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [CONFIG.program, *map(str, arguments)],
                stdout=write_out,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                preexec_fn=self.limit,
            )
            os.close(write_out)
            with os.fdopen(read_out, "rb") as stream:
                self.out = stream.read().decode("utf-8", "replace")
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = self.status = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            self.err = errors.read().decode("utf-8", "replace")
        self.seconds = usage.ru_utime + usage.ru_stime
        self.kilobytes = usage.ru_maxrss

    @staticmethod
    def limit():
        """So that a bomb ends as a failed case and not as a dead machine."""
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        if not SANITIZED:
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    def __str__(self):
        return (
            f"status {self.status}, {self.seconds:.2f} s, {self.kilobytes} kB\n{self.out}{self.err}"
        )


class Case(ProgramCase):
    def setUp(self):
        super().setUp()
        self.canary = self.place / "canary"

    def snapshot(self):
        found = {}
        for path in sorted(self.place.rglob("*")):
            status = path.lstat()
            found[str(path.relative_to(self.place))] = (
                status.st_mode,
                status.st_size,
                status.st_mtime_ns,
            )
        return found

    def refused(self, *arguments, words=(), unharmed=True):
        """Runs the program; it must refuse with one helpful message and change nothing."""
        before = self.snapshot()
        result = Outcome(arguments, self.place)
        self.assertEqual(result.status, 2, result)
        self.assertEqual(result.err.count("isoshard: "), 1, f"not one message: {result}")
        for word in words:
            self.assertIn(word, result.err)
        self.assertFalse([c for c in result.out + result.err if ord(c) < 32 and c != "\n"], result)
        said = {
            part
            for part in ("file:", "entry:", "expected:", "found:", "next:")
            if f"  {part} " in result.err
        }
        if (
            "file:" not in said
            or not said & {"entry:", "expected:", "found:"}
            or "next:" not in said
        ):
            UNHELPFUL.append(f"{self.id().split('.')[-1]}: {result.err.strip()}")
        self.assertLess(result.seconds, SECONDS, result)
        self.assertLess(result.kilobytes, KILOBYTES, result)
        if unharmed:
            self.assertEqual(self.snapshot(), before)
        FIGURES["refused"] += 1
        if arguments[0] == "digest":
            self.not_verified(*arguments[1:])
        FIGURES["seconds"] = max(FIGURES["seconds"], result.seconds)
        FIGURES["kilobytes"] = max(FIGURES["kilobytes"], result.kilobytes)
        return result

    def not_verified(self, *arguments):
        """What digest refuses, verify may not call good: 1 with a verdict, or 2."""
        if not CONFIG.has_verify:
            return
        result = Outcome(["verify", *arguments], self.place)
        self.assertIn(result.status, (1, 2), result)
        self.assertLess(result.seconds, SECONDS, result)
        self.assertLess(result.kilobytes, KILOBYTES, result)
        FIGURES["refused by verify"] += 1

    def done(self, *arguments):
        result = Outcome(arguments, self.place)
        self.assertEqual(result.status, 0, result)
        FIGURES["fine"] += 1
        return result

    def digest(self, source, *arguments):
        result = self.done("digest", source, "--json", "--quiet", *arguments)
        return json.loads(result.out)["sections"]

    def copy(self, name="z1_bf16_dp2", inside="ckpt"):
        """A copy of a recording, and its tag folder."""
        target = self.place / "source"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.recorded(name, inside), target)
        return target, target / (target / "latest").read_text().strip()


def place_special(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
        os.chdir(here)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        raise ValueError(kind)
