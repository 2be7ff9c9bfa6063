#!/usr/bin/env python3
"""damage.py PROGRAM TRACES [unittest arguments]: damaged folders and hostile files.

Each case must end with exit status 2 and one message (docs/CONTRACTS.md §6), within 1 s of
processor time and 256 MiB, with no file made or changed anywhere; legitimate odd names must survive
every conversion. Files come from tests/hostile.py and the recordings in TRACES. The last line says
how many cases ran. Python's standard library only.

Not verified: damage of single bytes (tests/damage_test.cc), crashes while writing (tests/crash.py).
"""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hostile as h  # noqa: E402
from damage_case import CONFIG, FIGURES, UNHELPFUL, Case, Outcome, place_special  # noqa: E402
from damage_files import Safetensors, Weights  # noqa: E402, F401
from damage_zero import Names, Zero  # noqa: E402, F401
from program_case import run_tests  # noqa: E402


class Folders(Case):
    """Shards that are missing, left over, swapped, renamed or of another save."""

    RECORDINGS = (
        "z0_bf16_dp2",
        "z1_bf16_dp2",
        "z2_bf16_dp4",
        "z3_bf16_dp2_frozen",
        "z1_bf16opt_dp2",
    )

    def test_missing_shard(self):
        for name in self.RECORDINGS:
            files = sorted(path.name for path in self.copy(name)[1].glob("*.pt"))
            for each in files:
                with self.subTest(recording=name, missing=each):
                    source, tag = self.copy(name)
                    (tag / each).unlink()
                    self.refused("digest", source)

    def test_missing_and_surplus_shard_is_named(self):
        source, tag = self.copy("z2_bf16_dp4")
        shard = sorted(tag.glob("*rank_2*optim*"))[0]
        shard.unlink()
        self.refused("digest", source, words=("rank 2", "incomplete"))
        self.refused("convert", source, self.place / "out", "--to", "universal", words=("rank 2",))

    def test_extra_shard(self):
        for name in self.RECORDINGS[1:]:
            with self.subTest(recording=name):
                source, tag = self.copy(name)
                shard = sorted(tag.glob("*optim_states.pt"))[-1]
                further = tag / shard.name.replace("pp_rank_", "pp_rank_1")  # rank 1 → rank 11
                shutil.copy(shard, further)
                self.refused("digest", source, words=(further.name,))

    def test_one_file_in_place_of_another(self):
        """Every file over every other: n² swaps and duplicates."""
        for name in self.RECORDINGS:
            files = sorted(path.name for path in self.copy(name)[1].glob("*.pt"))
            for each in files:
                for other in files:
                    if each == other:
                        continue
                    with self.subTest(recording=name, file=each, over=other):
                        source, tag = self.copy(name)
                        shutil.copy(tag / each, tag / other)
                        self.refused("digest", source)

    def test_two_files_exchanged(self):
        for name in ("z1_bf16_dp2", "z3_bf16_dp2_frozen"):
            source, tag = self.copy(name)
            for kind in ("*optim_states.pt", "*model_states.pt"):
                files = sorted(tag.glob(kind))
                if len(files) < 2:
                    continue
                with self.subTest(recording=name, kind=kind):
                    files[0].rename(tag / "aside")
                    files[1].rename(files[0])
                    (tag / "aside").rename(files[1])
                    self.refused("digest", source, words=("swapped", "--allow-renamed"))

    def test_exchanged_on_purpose_is_still_seen_at_stage_1(self):
        """--allow-renamed lets the name pass; the slice maps still tell the ranks apart."""
        source, tag = self.copy()
        files = sorted(tag.glob("*optim_states.pt"))
        files[0].rename(tag / "aside")
        files[1].rename(files[0])
        (tag / "aside").rename(files[1])
        self.refused("digest", source, "--allow-renamed")

    def test_renamed_shard(self):
        source, tag = self.copy()
        shard = sorted(tag.glob("*optim_states.pt"))[0]
        for other in (
            "optim.pt",
            "zero_pp_rank_0_mp_rank_00_optim_states.pt.bak",
            "bf16_zero_pp_rank_x_mp_rank_00_optim_states.pt",
            shard.name.replace("rank_0_", "rank_00000000000000000001_"),
            shard.name.replace("mp_rank_00", "mp_rank_01"),
        ):
            with self.subTest(renamed=other):
                source, tag = self.copy()
                (tag / shard.name).rename(tag / other)
                self.refused("digest", source)

    def test_two_runs_mixed(self):
        expected = self.digest(self.recorded())
        for other in (
            "z1_fp16_dp2",
            "z1_fp32_dp3",
            "z2_bf16_dp4",
            "z1_adagrad_dp2",
            "z1_bf16opt_dp2",
        ):
            folder = self.recorded(other)
            theirs = folder / (folder / "latest").read_text().strip()
            for path in sorted(theirs.glob("*.pt")):
                with self.subTest(other=other, file=path.name):
                    source, tag = self.copy()
                    old = (tag / path.name).read_bytes() if (tag / path.name).exists() else b""
                    if old == path.read_bytes():
                        continue
                    shutil.copy(path, tag / path.name)
                    if (
                        "model_states" in path.name
                        and Outcome(["digest", source], self.place).status == 0
                    ):
                        self.model_of_another_run(source, expected)
                    else:
                        self.refused("digest", source)

    def model_of_another_run(self, source, expected):
        """The copies in the model's dtype are not digested; verify and convert compare them with
        the masters.
        Where these fit too, nothing tells two runs of one step apart (contracts §5)."""
        result = Outcome(["verify", source], self.place)
        if result.status == 0:
            self.assertIn("two runs at the same step cannot be told apart", result.out)
            self.assertEqual(self.digest(source), expected)
        else:
            self.not_verified(source)
            target = self.place / "out"
            words = ("master", "--force")
            self.refused("convert", source, target, "--to", "universal", words=words)
            self.refused("reshard", source, target, "--to", "dp=3", words=words)

    def test_two_steps_mixed_in_the_optimizer(self):
        folder = h.ZeroFolder(self.recorded())
        for inside, (_, records) in folder.files.items():
            if "pp_rank_1" in inside:
                self.assertEqual(records["data/0"], struct.pack("<f", 3))
                records["data/0"] = struct.pack("<f", 4)
        self.refused("digest", folder.write(self.place / "source"), words=("step", "3", "4"))

    def test_two_steps_mixed_in_model_files(self):
        """Stage 3: each rank's model file knows the step."""
        key = h.text("global_steps")
        folder = h.ZeroFolder(self.recorded("z3_bf16_dp2_frozen"))
        for inside, (_, records) in folder.files.items():
            if "pp_rank_1_mp_rank_00_model" in inside:
                data = records["data.pkl"]
                at = data.index(key) + len(key)
                at += 2 if data[at : at + 1] == b"q" else 5  # BINPUT or LONG_BINPUT
                self.assertEqual(data[at : at + 2], b"K\x03")
                records["data.pkl"] = data[:at] + b"K\x04" + data[at + 2 :]
        self.refused("digest", folder.write(self.place / "source"), words=("step 4", "step 3"))

    def test_model_file_of_another_world(self):
        key = h.text("dp_world_size")
        for size in (
            b"K\x00",
            b"K\x01",
            b"K\x03",
            b"J\x00\x00\x00\x80",
            b"J\x80\x96\x98\x00",
            b"J\xff\xff\xff\x7f",
            b"N",
        ):
            with self.subTest(dp_world_size=size):
                self.refused("digest", self.world(key, size))

    def world(self, key, size):
        shutil.rmtree(self.place / "source", ignore_errors=True)
        folder = h.ZeroFolder(self.recorded())
        for inside, (_, records) in folder.files.items():
            data = records["data.pkl"]
            if key in data:
                at = data.index(key) + len(key) + 2
                self.assertEqual(data[at : at + 2], b"K\x02")
                records["data.pkl"] = data[:at] + size + data[at + 2 :]
        return folder.write(self.place / "source")


class Pointers(Case):
    """`latest` that is empty, dangling, hostile or no file."""

    def point(self, content):
        source, _ = self.copy()
        (source / "latest").write_bytes(content)
        return source

    def test_empty_latest_lists_the_tags(self):
        for content in (b"", b"\n", b"  \n\n", b"\t"):
            with self.subTest(content=content):
                self.refused(
                    "digest", self.point(content), words=("latest", "0 bytes", "global_step3")
                )

    def test_dangling_latest_lists_the_tags(self):
        self.refused(
            "digest", self.point(b"global_step4"), words=("global_step4", '"global_step3"')
        )

    def test_hostile_latest(self):
        shutil.copytree(self.recorded(), self.place / "elsewhere")
        outside = str(self.place / "elsewhere" / "global_step3").encode()
        for content in (
            b"../..",
            b"..",
            b".",
            b"../elsewhere/global_step3",
            outside,
            b"a//b",
            b"global_step3/..",
            b"global\0step3",
            b"\x1b[31mglobal_step3",
            b"\xff\xfe",
            b"x" * 256,
            b"x" * 5000,
            b"/",
            b"a\nb",
        ):
            with self.subTest(content=content[:40]):
                self.refused("digest", self.point(content))
                self.refused("inspect", self.point(content))

    def test_latest_that_is_no_file(self):
        for kind in ("folder", "fifo", "dangling", "loop"):
            with self.subTest(kind=kind):
                source, tag = self.copy()
                (source / "latest").unlink()
                place_special(source / "latest", kind)
                self.refused("digest", source)

    def test_tag_folder_that_is_a_file(self):
        source, tag = self.copy()
        shutil.rmtree(tag)
        tag.write_text("x")
        self.refused("digest", source)

    def test_hostile_tag_option(self):
        source, _ = self.copy()
        for tag in ("../source/global_step3", "/", "..", "nothing"):
            with self.subTest(tag=tag):
                self.refused("digest", source, "--tag", tag)


class Places(Case):
    """Something else where a file must be; nothing may hang."""

    def test_special_file_in_place_of_a_shard(self):
        for name in ("z1_bf16_dp2", "z3_bf16_dp2_frozen"):
            files = sorted(path.name for path in self.copy(name)[1].glob("*.pt"))
            for each in files:
                for kind in ("folder", "fifo", "dangling", "loop", "device", "socket", "empty"):
                    with self.subTest(recording=name, file=each, kind=kind):
                        source, tag = self.copy(name)
                        (tag / each).unlink()
                        place_special(tag / each, kind)
                        self.refused("digest", source, words=(each,))

    def test_special_source(self):
        for kind in ("fifo", "dangling", "loop", "device", "socket", "empty", "folder"):
            with self.subTest(kind=kind):
                path = self.place / f"pytorch_model-{kind}.bin"
                place_special(path, kind)
                self.refused("digest", path)

    def test_linked_shard_is_read(self):
        """Download caches are made of links to regular files."""
        source, tag = self.copy()
        expected = self.digest(source)
        for path in sorted(tag.glob("*.pt")):
            path.rename(self.place / path.name)
            path.symlink_to(self.place / path.name)
        self.assertEqual(self.digest(source), expected)

    def test_files_of_another_kind(self):
        contents = {
            "text": b"hello\n",
            "gzip": b"\x1f\x8b\x08" + b"\0" * 50,
            "legacy": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
            "zeros": bytes(8192),
            "end only": b"PK\5\6" + bytes(18),
            "html": b"<html>" + b"x" * 300,
        }
        for kind, content in contents.items():
            with self.subTest(kind=kind):
                path = self.place / "pytorch_model.bin"
                path.write_bytes(content)
                self.refused("digest", path)


class Published(Case):
    """Folders that isoshard wrote: their manifest has a hash of every file."""

    def test_any_changed_file_is_seen(self):
        if not CONFIG.has_verify:
            self.skipTest("this program has no verb `verify`")
        source = self.recorded()
        for arguments in (
            ["--to", "universal"],
            ["--to", "fp32"],
            ["--to", "fp32", "--format", "bin"],
        ):
            out = self.place / "out"
            self.done("convert", source, out / "it", *arguments, "--quiet", "--overwrite")
            self.done("verify", out / "it")
            files = [
                path for path in sorted(out.rglob("*")) if path.is_file() and path.parent != out
            ]
            for path in files[:: max(1, len(files) // 12)]:
                data = path.read_bytes()
                for at in sorted({0, 7, len(data) // 3, len(data) // 2, len(data) - 1}):
                    with self.subTest(file=str(path.relative_to(out)), at=at):
                        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
                        self.not_verified(out / "it")
                with self.subTest(file=str(path.relative_to(out)), removed=True):
                    path.unlink()
                    self.not_verified(out / "it")
                path.write_bytes(data)
            with self.subTest(arguments, further=True):
                (out / "it" / "stowaway.pt").write_bytes(b"x")
                self.not_verified(out / "it")
                (out / "it" / "stowaway.pt").unlink()
            self.done("verify", out / "it")


class Targets(Case):
    """Targets that must not be touched."""

    def test_target_is_around_or_inside_the_source(self):
        source, tag = self.copy()
        link = self.place / "link"
        link.symlink_to(source)
        for target in (
            source,
            tag,
            tag / "inside",
            source / "new",
            self.place,
            link,
            link / "new",
            source / ".." / "source" / "x",
        ):
            with self.subTest(target=target):
                self.refused("convert", source, target, "--to", "universal")
                self.refused("convert", source, target, "--to", "universal", "--overwrite")
                self.refused("reshard", source, target, "--to", "dp=3", "--overwrite")

    def test_existing_target(self):
        source, _ = self.copy()
        target = self.place / "target"
        for kind in ("file", "folder", "full folder", "dangling", "fifo"):
            with self.subTest(kind):
                if kind == "file":
                    target.write_text("mine")
                elif kind == "full folder":
                    target.mkdir()
                    (target / "mine").write_text("mine")
                else:
                    place_special(target, kind)
                self.refused("convert", source, target, "--to", "universal", words=("target",))
                if kind in ("file", "fifo", "dangling"):
                    self.refused("convert", source, target, "--to", "universal", "--overwrite")
                shutil.rmtree(target) if target.is_dir() else target.unlink()

    def test_parent_of_the_target_is_a_file(self):
        source, _ = self.copy()
        (self.place / "file").write_text("mine")
        self.refused("convert", source, self.place / "file" / "target", "--to", "universal")


def find_verify():
    CONFIG.has_verify = (
        b"not expected"
        not in subprocess.run([CONFIG.program, "verify", "/nowhere"], capture_output=True).stderr
    )


def main():
    outcome, seconds = run_tests(__doc__, find_verify)
    for text in sorted(set(UNHELPFUL))[: int(os.environ.get("ISOSHARD_SHOW", "0"))]:
        print("unhelpful:", text)
    print(
        f"{len(UNHELPFUL)} messages lack file, entry/expected/found or next "
        "(ISOSHARD_SHOW=N shows N of them)"
    )
    print(
        f"damage.py: {FIGURES['refused']} cases refused, "
        f"{FIGURES['refused by verify']} by verify, {FIGURES['fine']} fine, "
        f"slowest refusal {FIGURES['seconds']:.2f} s, largest {FIGURES['kilobytes'] // 1024} MiB, "
        f"{len(outcome.skipped)} skipped, {seconds:.0f} s"
    )
    return 0 if outcome.wasSuccessful() and FIGURES["refused"] else 1


if __name__ == "__main__":
    sys.exit(main())
