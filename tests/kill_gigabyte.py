#!/usr/bin/env python3
"""kill_gigabyte.py PROGRAM [--kills 200] [--megabytes 1000] [--jobs universal,reshard,fp32]
                         [--seed N] [--place FOLDER]

Conversions of a made checkpoint (stage 3, four ranks) that are killed (SIGKILL) at random moments
of the time that an undisturbed run takes. After each kill: the target is absent, or whole (`verify`
says VERIFIED, its digest is the source's); a pointer names what is there; the source's files have
their sizes and times; `doctor --clean` lists every hidden name, and removes it once its times are
set back. After every 20th, and the last: the same command, beside what was left, succeeds with the
source's digest, and every source file has its SHA-256. Ends with 1 at the first that does not hold;
prints the seed. Python's standard library only.

FOLDER needs four times the size; default: /dev/shm where it is that large, else the system's place
for temporary files. Not verified: loss of power (unit.PowerLoss), kills of the machine.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAKE = Path(__file__).resolve().parent.parent / "bench" / "make_checkpoint.py"
TAG = "global_step3"
AGAIN = 20  # a run to the end after so many kills
LONG_AGO = time.time() - 10 * 24 * 3600


def demand(holds, *what):
    if not holds:
        sys.exit("FAILED: " + " ".join(map(str, what)))


def make_source(folder, megabytes):
    """Three fp32 numbers a parameter; the embedding is at most half of it."""
    parameters = megabytes * 1e6 / 12
    hidden = max(16, min(1024, int(parameters / 2 / 50304) // 16 * 16))
    subprocess.run(
        [sys.executable, "-B", MAKE, folder, "--stage", "3", "--dp", "4", "--without-torch",
         "--parameters", str(parameters), "--hidden", str(hidden)],
        check=True, stdout=subprocess.DEVNULL)  # fmt: skip


def stats(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*"))}  # fmt: skip


def hashes(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class Job:
    def __init__(self, options, name, place, source):
        self.program, self.name = options.program, name
        self.parent, self.source = place / name, source
        if name == "reshard":
            self.arguments = ["reshard", source, self.parent, "--to", "dp=3"]
            self.target, self.pointer = self.parent / TAG, self.parent / "latest"
        else:
            self.target, self.pointer = self.parent / name, self.parent / "latest_universal"
            self.arguments = ["convert", source, self.target, "--to", name]
        self.figures = dict.fromkeys(("absent", "whole", "done before", "leftovers", "again"), 0)

    def run(self, *arguments, status=(0,)):
        result = subprocess.run(
            [self.program, *map(str, arguments), "--quiet"], capture_output=True, text=True)
        demand(result.returncode in status, self.name, *arguments, result.stdout, result.stderr)
        return result.stdout

    def digest(self, folder):
        """Of weights alone where the target has no more."""
        sections = json.loads(self.run("digest", folder, "--json"))["sections"]
        kept = ("weights",) if self.name == "fp32" else sections
        return {key: sections[key].get("digest") for key in kept if key != "hyper"}

    def killed(self, after_s):
        """Whether it still ran then."""
        process = subprocess.Popen(
            [self.program, *map(str, self.arguments), "--quiet"], stdout=subprocess.DEVNULL)
        try:
            demand(process.wait(timeout=after_s) == 0, self.name, "failed undisturbed")
            return False
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True

    def judge_target(self, expected):
        if self.pointer.exists():
            named = self.pointer.read_text().strip()
            demand(named == self.target.name, self.pointer, "says", named)
            demand(self.target.is_dir(), self.pointer, "names what is not there")
        if not self.target.exists():
            return False
        found = json.loads(self.run("verify", self.target, "--json").splitlines()[-1])
        demand(found["verdict"] == "VERIFIED", self.target, found)
        demand(self.digest(self.target) == expected, self.target, "has another digest")
        return True

    def hidden(self):
        if not self.parent.is_dir():
            return []
        return sorted(path.name for path in self.parent.iterdir() if path.name.startswith("."))

    def clean(self):
        """What was left is listed, all of it, and goes."""
        left = self.hidden()
        if left:
            for path in self.parent.rglob("*"):
                os.utime(path, (LONG_AGO, LONG_AGO))
            told = self.run("doctor", self.parent, "--clean", "--json")
            names = sorted(Path(json.loads(line)["path"]).name for line in told.splitlines())
            demand(names == left, "doctor --clean lists", names, "instead of", left)
            demand(self.hidden() == [], "doctor --clean left", self.hidden())
            self.figures["leftovers"] += len(left)
        shutil.rmtree(self.parent, ignore_errors=True)

    def again(self, expected):
        if self.target.exists():
            shutil.rmtree(self.target)
            self.pointer.unlink(missing_ok=True)
        self.run(*self.arguments)
        demand(self.judge_target(expected), self.name, "made no target")
        self.figures["again"] += 1
        shutil.rmtree(self.target)  # doctor keeps what a folder of that name may have replaced
        self.pointer.unlink(missing_ok=True)


def disturb(job, kills, rolls):
    before, bytes_before = stats(job.source), hashes(job.source)
    expected = job.digest(job.source)
    began = time.monotonic()
    job.run(*job.arguments)
    lasts = time.monotonic() - began
    demand(job.judge_target(expected), job.name, "made no target")
    job.clean()
    for number in range(1, kills + 1):
        running = job.killed(rolls.uniform(0, lasts))
        whole = job.judge_target(expected)
        demand(running or whole, job.name, "ended well and made nothing")
        job.figures["whole" if whole and running else "absent" if running else "done before"] += 1
        demand(stats(job.source) == before, "the source changed at kill", number)
        if number % AGAIN == 0 or number == kills:
            job.again(expected)
            demand(hashes(job.source) == bytes_before, "the source's bytes changed")
        job.clean()
    demand(job.digest(job.source) == expected, "the source has another digest")
    told = ", ".join(f"{count} {what}" for what, count in job.figures.items())
    print(f"{job.name}: {kills} kills within {lasts:.2f} s: {told}; source unchanged", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("program", type=os.path.abspath)
    parser.add_argument("--kills", type=int, default=200, help="a job")
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--jobs", default="universal,reshard")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    parser.add_argument("--place", help="an existing folder")
    options = parser.parse_args()
    room = options.megabytes * 4e6
    if options.place is None and os.path.isdir("/dev/shm"):
        options.place = "/dev/shm" if shutil.disk_usage("/dev/shm").free > room else None
    place = Path(tempfile.mkdtemp(prefix="isoshard-kill-", dir=options.place))
    began = time.monotonic()
    try:
        demand(shutil.disk_usage(place).free > room, place, "has no room for", room, "bytes")
        source = place / "in" / "run"
        make_source(source, options.megabytes)
        size = sum(path.stat().st_size for path in source.rglob("*.pt"))
        print(f"kill_gigabyte.py: {size / 1e6:.0f} MB, seed {options.seed}", flush=True)
        rolls = random.Random(options.seed)
        for name in options.jobs.split(","):
            disturb(Job(options, name, place, source), options.kills, rolls)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"kill_gigabyte.py: all held, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
