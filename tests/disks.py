#!/usr/bin/env python3
"""disks.py PROGRAM TRACES [unittest arguments]: every verb that writes, on a real file system
(tmpfs) of any size up to the one that is enough, and on one that is or becomes read-only.

Each run ends with 0 and a whole target, or with 2, a message that passes tests/message_check.py by
text and as JSON, and nothing new on the disk. Where mount is not permitted all is skipped, with the
reason. Python's standard library only.

Not verified: quotas, and file systems on block devices (loop devices are not permitted everywhere).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from crash_case import Crash, Job, fingerprint, run  # noqa: E402
from doctor_faults import NONCE  # noqa: E402
from message_check import problems  # noqa: E402
from program_case import CONFIG, run_tests  # noqa: E402
from tracing import injected, status_of  # noqa: E402

SIZES = 16  # file systems a verb
FIGURES = {"refused before any work": 0, "failed in the middle": 0, "whole": 0}
BEFOREHAND = ("too little space", "too few inodes")


def pages(folder):
    return sum(-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


class Verbs(Crash):
    def writers(self):
        """(arguments with {} for the folder to write in, what is there when it ends with 0)."""
        source = self.recording()
        models = self.recording("z1_fp16_dp2")
        return [
            (["convert", source, "{}/u", "--to", "universal"], "u/MANIFEST.json"),
            (["convert", source, "{}/f", "--to", "fp32"], "f/MANIFEST.json"),
            (["convert", source, "{}/b", "--to", "fp32", "--format", "bin"], "b/MANIFEST.json"),
            (["reshard", source, "{}/r", "--to", "dp=3"], "r/latest"),
            (["export", models, "{}/e", "--to", "hf", "--no-config"], "e/MANIFEST.json"),
            (["golden", "--out", "{}/g"], "g/golden.json"),
        ]

    def give(self, arguments, folder):
        return run([str(each).format(folder) for each in arguments] + ["--json", "--quiet"])

    def judge(self, result, folder, proof):
        if result.returncode == 0:
            self.assertTrue((folder / proof).is_file(), result)
            FIGURES["whole"] += 1
            return
        self.assertEqual(result.returncode, 2, result)
        published = (folder / proof).parent.exists()
        found = problems(result.stderr, result.stdout, published=published)
        self.assertEqual(found, [], result.stderr)
        early = any(words in result.stderr for words in BEFOREHAND)
        FIGURES["refused before any work" if early else "failed in the middle"] += 1
        if not published:
            self.assertEqual(list(folder.iterdir()), [], f"left behind: {result.stderr}")

    def test_every_size(self):
        for arguments, proof in self.writers():
            enough = self.place / "enough"
            enough.mkdir()
            self.judge(self.give(arguments, enough), enough, proof)
            most, middle = pages(enough) + 2, FIGURES["failed in the middle"]
            shutil.rmtree(enough)
            sources = fingerprint(self.place / "in")
            for size in sorted({max(1, most * k // SIZES) for k in range(1, SIZES)} | {most - 3}):
                with self.subTest(verb=arguments[0], target=proof, pages=size):
                    point = self.mount(f"size={4 * size}k")
                    result = self.give(arguments, point)
                    self.assertIn("space" if result.returncode else "", result.stderr)
                    self.judge(result, point, proof)
                    subprocess.run(["umount", point], check=True)
            self.assertEqual(fingerprint(self.place / "in"), sources, "a source changed")
            with self.subTest(verb=arguments[0], target=proof):
                self.assertGreater(FIGURES["failed in the middle"], middle, "none of the sizes")

    def test_read_only(self):
        writers = self.writers()
        point = self.mount("size=8m")
        subprocess.run(["mount", "-o", "remount,ro", point], check=True)
        for arguments, proof in writers:
            with self.subTest(verb=arguments[0], target=proof):
                result = self.give(arguments, point)
                self.assertEqual(result.returncode, 2, result)
                self.assertIn("read-only", result.stderr)
                self.judge(result, point, proof)

    @injected
    def test_read_only_from_the_last_step_on(self):
        """Held up before the rename that publishes, until the file system takes no more writes."""
        source, point = self.recording(), self.mount("size=8m")
        out = point / "r"
        job = Job(self.place, source, ["reshard", out, "--to", "dp=3"], out / "global_step3")
        process = subprocess.Popen(
            ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=renameat2", "-e",
             "inject=renameat2:delay_enter=4000000:when=2", CONFIG.program,
             *map(str, job.command)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        while process.poll() is None and not list(out.glob(".*/MANIFEST.json")):
            time.sleep(0.02)
        remount = ["mount", "-o", "remount,ro", point]
        while process.poll() is None:  # refused while a file is still open for writing
            if subprocess.run(remount, capture_output=True).returncode == 0:
                break
            time.sleep(0.02)
        answer, text = process.communicate(timeout=60)
        if process.returncode != 0:
            self.assertEqual(process.returncode, 2, text)
            self.assertIn("read-only", text)
            found = problems(text, answer, published=job.output.exists())
            self.assertEqual(found, [], text)
            FIGURES["failed in the middle"] += 1
        subprocess.run(["mount", "-o", "remount,rw", point], check=True)
        self.check(job, again=True)

    def test_doctor_cleans_a_full_disk(self):
        """What to do on a full disk must not need room itself."""
        point = self.mount("size=512k")
        shutil.copytree(self.recording(), point / "run")
        staging = point / "run" / f".global_step4.isoshard-{NONCE}"
        staging.mkdir()
        (staging / "part.pt").write_bytes(bytes(100_000))
        (point / "run" / f".latest.isoshard-{NONCE}").write_text("global_step4")
        for path in point.rglob("*"):
            os.utime(path, (1e9, 1e9))
        with open(point / "filling", "wb", buffering=0) as filling:
            try:
                while filling.write(bytes(4096)):
                    pass
            except OSError:
                pass
        self.assertEqual(shutil.disk_usage(point).free, 0)
        result = run(["doctor", point / "run", "--clean", "--json"])
        self.assertEqual(result.returncode, 0, result)
        told = [json.loads(line) for line in result.stdout.splitlines()]
        self.assertEqual([each["removed"] for each in told], [True, True], result)
        self.assertFalse(staging.exists())
        self.assertGreater(shutil.disk_usage(point).free, 100_000)


def main():
    outcome, seconds = run_tests(__doc__)
    figures = ", ".join(f"{count} {what}" for what, count in FIGURES.items())
    print(f"disks.py: {figures}, {len(outcome.skipped)} skipped, {seconds:.0f} s")
    return status_of(outcome) or (0 if sum(FIGURES.values()) else 1)


if __name__ == "__main__":
    sys.exit(main())
