"""What the tests of tests/resume.py share: jobs, what an uninterrupted run makes, leftovers.

Python's standard library only. Not verified here: anything.
"""

import hashlib
import json
import shutil
from pathlib import Path

from crash_case import Crash, Job, fingerprint, run

NONCE = "0123456789abcdef0123456789abcdef"
RESUMED = {"killed": 0, "resumed": 0, "bytes saved": 0}


def contents(folder):
    """{path: sha256 or what it is}, of all below."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and not path.is_symlink()
        else "folder" if path.is_dir() and not path.is_symlink() else "other"
        for path in sorted(Path(folder).rglob("*"))
    }


class Resume(Crash):
    def jobs(self):
        """reshard, universal, fp32."""
        out = self.place / "out" / "weights"
        fp32 = Job(self.place, self.recording("z3_bf16_dp3"), ["convert", out, "--to", "fp32"], out)
        return [self.reshard_job(), self.universal_job(), fp32]

    def carrying_job(self):
        """With two files beside the source that go along."""
        out = self.place / "out" / "carried"
        source = self.recording("z1_fp16_dp2")
        (source / "trainer_state.json").write_text("{}")
        (source / "scheduler.pt").write_bytes(b"x" * 100)
        return Job(self.place, source, ["reshard", out, "--to", "dp=3"], out / "global_step3",
                   out / "latest")

    def whole(self, job):
        """What an uninterrupted run leaves in out/, and the target itself, set aside."""
        job.clear()
        result = run([*job.command, "--json"])
        self.assertEqual(result.returncode, 0, result.stderr)
        job.whole = contents(job.parent())
        job.bytes = self.figures(result)["bytes_written"]
        job.aside = self.place / "aside" / job.output.name
        shutil.rmtree(job.aside, ignore_errors=True)
        shutil.copytree(job.output, job.aside)
        return job

    @staticmethod
    def figures(result):
        return next(
            each for each in map(json.loads, result.stdout.splitlines())
            if each["kind"] == "conversion"
        )

    def lay(self, job, nonce=NONCE, papers=False):
        """A leftover that holds everything but its manifest, as one killed just before leaves it;
        without papers, the certificate neither."""
        job.clear()
        staging = job.output.parent / f".{job.output.name}.isoshard-{nonce}"
        shutil.copytree(job.aside, staging)
        (staging / "MANIFEST.json").unlink()
        if not papers:
            (staging / "certificate.json").unlink()
        return staging

    def resume(self, job, *more):
        """Must end well, with what the uninterrupted run left and nothing else."""
        result = run([*(each for each in job.command if each != "--quiet"),
                      "--resume", "--json", *more])
        self.assertEqual(result.returncode, 0, result.stderr)
        self.same(job)
        RESUMED["resumed"] += 1
        return self.figures(result), result.stderr

    def same(self, job):
        self.assertEqual(contents(job.parent()), job.whole)
        source = job.source if job.source.is_dir() else job.source.parent
        self.assertEqual(fingerprint(source), job.before, "the source changed")

    def staged(self, job):
        folder = job.output.parent
        return sorted(folder.glob(f".{job.output.name}.isoshard-*")) if folder.is_dir() else []
