"""`--resume`: what an interrupted command left is gone on from, and the result is, byte for byte,
that of a run that nothing interrupted. Leftovers that lie are found out; nothing outside them
changes; a living command's folder is left alone.

resume.py PROGRAM TRACES [unittest arguments]

Commands are killed by strace at system calls that write; where it cannot trace, those tests are
skipped and say so. Python's standard library only. Not verified here: power loss, file systems that
other machines share, and other users' folders where the tests do not run as root.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

from crash_case import fingerprint, run
from program_case import CONFIG, run_tests
from resume_case import NONCE, RESUMED, Resume, contents
from resume_killed import Killed

assert Killed  # its tests run here too


class Leftovers(Resume):
    def test_none_is_an_ordinary_run(self):
        for job in map(self.whole, self.jobs()):
            job.clear()
            figures, _ = self.resume(job)
            self.assertIsNone(figures["resumed"])
            self.assertEqual(figures["bytes_written"], job.bytes)
        job.clear()
        result = run([*(each for each in job.command if each not in ("--quiet", "--json")),
                      "--resume"])
        self.assertIn("nothing to resume", result.stdout)

    def test_a_whole_one_is_compared_and_not_written(self):
        for job in map(self.whole, self.jobs()):
            self.lay(job, papers=True)
            figures, errors = self.resume(job)
            self.assertEqual(figures["bytes_written"], 0)
            self.assertEqual(figures["resumed"]["files_equal"], len(list(
                path for path in job.aside.rglob("*") if path.is_file())) - 2)
            self.assertEqual(errors, "")
            self.lay(job)
            plain = [each for each in job.command if each not in ("--quiet", "--json")]
            said = run([*plain, "--resume"]).stdout
            self.assertIn("were there already and are equal, 0 B written", said)
            self.same(job)

    def test_flipped_bytes_are_found(self):
        for job in map(self.whole, self.jobs()):
            staging = self.lay(job)
            files = [path for path in sorted(staging.rglob("*"))
                     if path.is_file() and path.suffix != ".json"]
            for path in files:
                data = bytearray(path.read_bytes())
                for at in {0, len(data) // 2, len(data) - 1}:
                    data[at] ^= 0xFF
                path.write_bytes(data)
            figures, errors = self.resume(job)
            wrong = figures["resumed"]["bytes_wrong"]
            self.assertGreater(wrong, len(files))
            self.assertIn(f"{wrong} bytes of what lay there were not what they must be", errors)

    def test_every_byte_of_a_file(self):
        """One flipped in each place of a small file, several at once so that it ends."""
        job = self.whole(self.reshard_job())
        path = max((each for each in job.aside.rglob("*.pt")), key=lambda each: each.stat().st_size)
        size = path.stat().st_size
        for first in range(8):
            staging = self.lay(job)
            data = bytearray(path.read_bytes())
            for at in range(first, size, 8):
                data[at] ^= 1
            (staging / path.relative_to(job.aside)).write_bytes(data)
            self.resume(job)

    def test_other_sizes_files_and_links(self):
        for job in map(self.whole, self.jobs()):
            outside = self.place / "outside"
            outside.write_bytes(b"nothing of yours")
            elsewhere = self.place / "elsewhere"
            elsewhere.mkdir(exist_ok=True)
            (elsewhere / "file").write_bytes(b"nor this")
            before = fingerprint(self.place / "elsewhere"), outside.read_bytes()
            for change in ("short", "long", "empty", "link", "hard", "fifo", "folder", "gone",
                           "closed"):
                staging = self.lay(job, papers=change != "long")
                files = [path for path in sorted(staging.rglob("*"))
                         if path.is_file() and path.suffix != ".json"]
                victim = files[len(files) // 2]
                data = victim.read_bytes()
                if change == "short":
                    victim.write_bytes(data[: len(data) * 2 // 3])
                elif change == "long":
                    victim.write_bytes(data + b"more" * 1000)
                elif change == "empty":
                    victim.write_bytes(b"")
                elif change == "closed":
                    victim.chmod(0o400)
                else:
                    victim.unlink()
                if change == "link":
                    victim.symlink_to(outside)
                elif change == "hard":
                    os.link(outside, victim)
                elif change == "fifo":
                    os.mkfifo(victim)
                elif change == "folder":
                    victim.mkdir()
                    (victim / "file").touch()
                (staging / "unknown.pt").write_bytes(b"x" * 100)
                (staging / "unknown").mkdir()
                (staging / "unknown" / "file").touch()
                (staging / "linked").symlink_to(elsewhere)
                with self.subTest(job.command[0], change=change):
                    self.resume(job)
                    self.assertEqual((fingerprint(elsewhere), outside.read_bytes()), before)

    def test_a_folder_that_is_a_link(self):
        job = self.whole(self.universal_job())
        staging = self.lay(job)
        elsewhere = self.place / "zero"
        (staging / "zero").rename(elsewhere)
        next(path for path in elsewhere.rglob("*.pt")).write_bytes(b"of another")
        (staging / "zero").symlink_to(elsewhere)
        before = fingerprint(elsewhere)
        self.resume(job)
        self.assertEqual(fingerprint(elsewhere), before)

    def test_of_another_source(self):
        """What lies there is of a run with other weights and another topology."""
        job = self.whole(self.reshard_job())
        other = self.recording("z1_fp16_dp2")
        staging = self.lay(job)
        shutil.rmtree(staging)
        out = self.place / "other"
        self.assertEqual(run(["reshard", other, out, "--to", "dp=4", "--quiet"]).returncode, 0)
        shutil.copytree(next(path for path in out.iterdir() if path.is_dir()), staging)
        (staging / "MANIFEST.json").unlink()
        self.resume(job)

    def test_the_largest_is_taken(self):
        job = self.whole(self.reshard_job())
        self.lay(job)
        small = job.output.parent / f".{job.output.name}.isoshard-{NONCE[::-1]}"
        small.mkdir()
        (small / "part.pt").write_bytes(b"x")
        other = job.output.parent / f".other.isoshard-{NONCE}"
        shutil.copytree(job.aside, other)
        kept = contents(small), contents(other)
        result = run([*job.command, "--resume", "--json"])
        self.assertEqual(self.figures(result)["bytes_written"], 0)
        self.assertEqual((contents(small), contents(other)), kept)
        shutil.rmtree(small)
        shutil.rmtree(other)
        self.same(job)

    def test_a_living_command_is_left_alone(self):
        for job in map(self.whole, self.jobs()):
            staging = self.lay(job)
            before = fingerprint(staging)
            holder = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(holder, fcntl.LOCK_EX)
                result = run([*(each for each in job.command if each != "--quiet"), "--resume",
                              "--json"])
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertIn("holds its lock", result.stderr)
                self.assertIn(staging.name, result.stderr)
                self.assertEqual(self.figures(result)["bytes_written"], job.bytes)
                self.assertEqual(fingerprint(staging), before)
            finally:
                os.close(holder)
            shutil.rmtree(staging)
            self.same(job)

    def test_doctor_leaves_a_living_command_alone(self):
        job = self.whole(self.reshard_job())
        staging = self.lay(job, papers=False)
        old = time.time() - 10 * 24 * 3600
        for path in [staging, *staging.rglob("*")]:
            os.utime(path, (old, old))
        holder = subprocess.Popen(
            [sys.executable, "-c",
             "import fcntl,os,sys; fd=os.open(sys.argv[1], os.O_RDONLY); "
             "fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()",
             staging], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.assertEqual(holder.stdout.readline(), "held\n")
            result = run(["doctor", job.output.parent, "--clean"])
            self.assertEqual(result.returncode, 1)
            self.assertIn("holds its lock", result.stdout)
            self.assertTrue(staging.exists())
        finally:
            holder.communicate()
        result = run(["doctor", job.output.parent, "--clean"])
        self.assertEqual(result.returncode, 0, result.stdout)
        self.assertFalse(staging.exists())

    def test_two_at_once(self):
        """One goes on from it; the other makes its own. Whoever is second says so."""
        job = self.whole(self.reshard_job())
        for _ in range(5):
            self.lay(job, papers=False)
            command = [CONFIG.program, *map(str, job.command), "--resume"]
            both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                     text=True) for _ in range(2)]
            outcomes = [(each.communicate(timeout=60)[1], each.returncode) for each in both]
            self.assertIn(0, [status for _, status in outcomes], outcomes)
            for errors, status in outcomes:
                self.assertIn(status, (0, 2), errors)
                if status != 0:
                    self.assertRegex(errors, "target|exists|appeared|taken")
            self.same(job)

    def test_overwrite(self):
        job = self.whole(self.reshard_job())
        self.lay(job)
        job.output.mkdir()
        (job.output / "old").write_bytes(b"of another program")
        result = run([*job.command, "--resume"])
        self.assertEqual(result.returncode, 2)
        self.assertEqual(len(self.staged(job)), 1, "it stays, to be gone on from")
        figures, _ = self.resume(job, "--overwrite")
        self.assertEqual(figures["bytes_written"], 0)
        # Beside a target of isoshard's own it may be what that replaced: it stays.
        staging = job.output.parent / f".{job.output.name}.isoshard-{NONCE}"
        shutil.copytree(job.aside, staging)
        (staging / "mine").touch()
        before = fingerprint(staging)
        result = run([*job.command, "--resume", "--overwrite", "--json"])
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIsNone(self.figures(result)["resumed"])
        self.assertEqual(fingerprint(staging), before)
        shutil.rmtree(staging)
        self.same(job)

    def test_a_target_that_is_there(self):
        job = self.whole(self.reshard_job())
        result = run([*job.command, "--resume"])
        self.assertEqual(result.returncode, 2)
        self.assertIn("there is nothing to go on from", result.stderr)
        self.assertIn("verify", result.stderr)
        self.same(job)

    def test_a_target_that_is_another(self):
        """Made of another source, or damaged, without its pointer: that is not put there."""
        job = self.whole(self.reshard_job())
        plain = [each for each in job.command if each != "--quiet"]
        job.pointer.unlink()
        told = run([*plain, "--resume", "--dry-run", "--json"])
        self.assertEqual(json.loads(told.stdout)["to_finish"], [str(job.pointer)])
        self.assertFalse(job.pointer.exists())
        victim = next(job.output.glob("*.pt"))
        data = victim.read_bytes()
        for change in ("damaged", "of other weights", "with another file"):
            if change == "damaged":
                victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            elif change == "with another file":
                (job.output / "more").touch()
            else:
                self.lie_about_the_source(job.output)
            before = fingerprint(job.output)
            with self.subTest(change):
                result = run([*plain, "--resume"])
                self.assertEqual(result.returncode, 2)
                self.assertIn("not known to be what this command makes", result.stderr)
                self.assertFalse(job.pointer.exists())
                self.assertEqual(fingerprint(job.output), before)
            shutil.rmtree(job.output)
            shutil.copytree(job.aside, job.output)

    @staticmethod
    def lie_about_the_source(folder):
        """Papers that agree with each other, of a source with other weights."""
        path = folder / "certificate.json"
        certificate = json.loads(path.read_text())
        digest = certificate["source"]["digests"]["weights"]
        other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
        path.write_text(path.read_text().replace(digest, other))
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        del manifest["self_hash"]
        for each in manifest["files"]:
            if each["path"] == "certificate.json":
                each["hash"] = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        text = json.dumps(manifest, indent=1) + "\n"
        manifest["self_hash"] = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")

    def test_few_inodes_suffice_where_the_files_are_there(self):
        job = self.whole(self.universal_job())
        files = [path for path in job.aside.rglob("*")]
        mount = self.mount(f"size=64m,nr_inodes={len(files) + 16}")
        target = mount / job.output.name
        staging = mount / f".{target.name}.isoshard-{NONCE}"
        shutil.copytree(job.aside, staging)
        (staging / "MANIFEST.json").unlink()
        command = ["convert", job.source, target, "--to", "universal"]
        result = run([*command, "--resume"])
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(contents(target), contents(job.aside))
        shutil.rmtree(target)
        self.assertIn("too few inodes", run(command).stderr)

    def test_the_plan_names_it_and_takes_nothing(self):
        job = self.whole(self.reshard_job())
        staging = self.lay(job)
        before = fingerprint(staging)
        result = run([*job.command, "--resume", "--dry-run", "--json"])
        self.assertEqual(json.loads(result.stdout)["resume_from"], str(staging))
        self.assertEqual(fingerprint(staging), before)
        self.resume(job)

    def test_another_users_is_not_taken(self):
        if os.geteuid() != 0:
            self.skipTest("not root: no folder can be given to another user")
        job = self.whole(self.reshard_job())
        staging = self.lay(job)
        os.chown(staging, 12345, 12345)
        result = run([*job.command, "--resume", "--json"])
        self.assertIsNone(self.figures(result)["resumed"])
        self.assertTrue(staging.exists())
        os.chown(staging, 0, 0)
        shutil.rmtree(job.output)
        victim = next(staging.rglob("*.pt"))
        os.chown(victim, 12345, 12345)
        self.resume(job)
        owners = {path.stat().st_uid for path in job.output.rglob("*")}
        self.assertEqual(owners, {0})

    def test_the_aliases(self):
        source = self.recorded("z1_bf16_dp2")
        tag = next(path for path in source.iterdir() if path.is_dir())
        out = self.place / "out" / "u"
        weights = self.place / "out" / "w"
        for target, command in (
            (out, ["ds_to_universal", "--input_folder", tag, "--output_folder", out]),
            (weights, ["zero_to_fp32", source, weights]),
        ):
            self.assertEqual(run([*command, "--inject_missing_state"] if target == out
                                 else command).returncode, 0)
            whole = contents(target)
            (target / "MANIFEST.json").unlink()
            target.rename(target.parent / f".{target.name}.isoshard-{NONCE}")
            (target.parent / "latest_universal").unlink(missing_ok=True)
            result = run([*command, "--resume",
                          *(["--inject_missing_state"] if target == out else [])])
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("0 B written", result.stdout)
            self.assertEqual(contents(target), whole)


def main():
    outcome, seconds = run_tests(__doc__)
    print(f"resume: {', '.join(f'{count} {name}' for name, count in RESUMED.items())}"
          f" in {seconds:.0f} s")
    return 0 if outcome.wasSuccessful() and RESUMED["resumed"] else 1


if __name__ == "__main__":
    sys.exit(main())
