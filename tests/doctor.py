#!/usr/bin/env python3
"""doctor.py PROGRAM TRACES [unittest arguments]: `isoshard doctor` and `doctor --clean`.

Each known fault is put into a copy of a real recording and must be found by its own rule; every
recording as it is must give no finding, but for the universal forms in which DeepSpeed itself
swapped parameters. The default mode is held to a number of bytes read. The last line says how many
cases ran. Python's standard library only.

Not verified: faults that no file shows (the rank order at stage 3 without archive names).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import doctor_faults as faults  # noqa: E402
import hostile as h  # noqa: E402
from doctor_case import FIGURES, Case  # noqa: E402
from doctor_clean import Sweep  # noqa: E402, F401
from doctor_split import Split  # noqa: E402, F401
from doctor_tags import Tags  # noqa: E402, F401
from program_case import CONFIG, run_tests  # noqa: E402

# DeepSpeed's own converter swapped parameters in these (errata 1).
SWAPPED = {"z2_rr_dp3", "z2_rr_groups_dp2"}


class Clean(Case):
    def test_no_recording_raises_an_alarm(self):
        for case in sorted(CONFIG.traces.iterdir()):
            for inside in ("ckpt", "universal", "fp32"):
                if not (case / inside).is_dir():
                    continue
                with self.subTest(recording=case.name, inside=inside):
                    self.well(case / inside)
                    if inside == "universal" and case.name in SWAPPED:
                        self.ill("round-robin", case / inside, "--payload")
                    else:
                        self.well(case / inside, "--payload")

    def test_what_isoshard_writes_raises_no_alarm(self):
        for name in ("z1_bf16_dp2", "z2_rr_dp3", "z3_bf16_dp3"):
            out = self.place / name
            self.run_program(0, "reshard", self.recorded(name), out, "--to", "dp=12", "--quiet")
            self.well(out, "--payload")
            universal = self.place / f"{name}_universal"
            self.run_program(0, "convert", out, universal, "--to", "universal", "--quiet")
            self.well(universal, "--payload")

    def test_side_files_and_scripts_of_a_save_folder_are_fine(self):
        source, tag = self.copy()
        (source / "zero_to_fp32.py").write_text("print()\n")
        (source / "modeling_mine.py").write_text("print()\n")
        (tag / "zero_to_fp32.py").write_text("print()\n")
        scheduler = h.program(h.call("operator", "itemgetter", h.integer(1)))
        (source / "scheduler.pt").write_bytes(h.torch_file(scheduler))
        (source / "notes.bin").write_bytes(b"of another program")
        not_looked = "\n".join(self.well(source)["not_looked"])
        for name in ("scheduler.pt", "notes.bin"):
            self.assertIn(name, not_looked)

    def test_usage(self):
        self.run_program(2, "doctor", self.place / "nowhere")
        self.run_program(2, "doctor", self.recorded(), "--dry-run")
        text = self.run_program(0, "doctor", self.recorded()).stdout
        self.assertTrue(text.startswith("no known fault"), text)


class Ranks(Case):
    def test_files_renamed_in_the_order_of_digits(self):
        for name, patterns in (
            ("z1_bf16_dp2", ["*optim*"]),
            ("z2_bf16_dp4", ["*optim*"]),
            ("z3_bf16_dp3", ["*optim*"]),
            ("z3_bf16_dp3", ["*optim*", "*model*"]),
        ):
            with self.subTest(recording=name, patterns=patterns):
                source, tag = self.resharded(name)
                for pattern in patterns:
                    faults.rename_by_text(tag, pattern)
                self.ill("rank-order", source, words=("rank_10", "saved"))

    def test_names_of_two_digits_go_wrong_from_a_hundred_ranks_on(self):
        source, tag = self.resharded("z1_bf16_dp2", "dp=101")
        faults.rename_by_text(tag, "*optim*", key=lambda rank: f"{rank:02}")
        self.ill("rank-order", source, words=("rank_100",))

    def test_files_written_anew_in_the_order_of_digits(self):
        """Their archives agree with the wrong names: the slice maps tell."""
        source, tag = self.resharded("z1_bf16_dp2")
        for path in faults.rename_by_text(tag, "*optim*").values():
            faults.write(path, path.stem, faults.read(path)[1])
        self.ill("rank-order", source, words=("slice maps",))

    def test_another_order_is_not_called_so(self):
        source, tag = self.resharded("z1_bf16_dp2")
        files = sorted(tag.glob("*optim*"))
        files[0].rename(tag / "aside")
        files[3].rename(files[0])
        (tag / "aside").rename(files[3])
        self.ill("unexplained", source, grade="SUSPECT")

    def test_fragments_joined_in_the_order_of_digits(self):
        for name in ("z1_bf16_dp2", "z2_bf16_dp4"):
            with self.subTest(recording=name):
                source, _ = self.resharded(name)
                universal = self.place / "universal"
                shutil.rmtree(universal, ignore_errors=True)
                self.run_program(0, "convert", source, universal, "--to", "universal", "--quiet")
                for paper in ("MANIFEST.json", "certificate.json"):
                    (universal / paper).unlink()
                told = self.run_program(0, "inspect", universal, "--json").stdout.splitlines()
                shapes = {}
                for line in map(json.loads, told):
                    if line["kind"] == "parameter" and line["group"] >= 0:
                        numel = 1
                        for side in line["shape"]:
                            numel *= side
                        shapes.setdefault(line["group"], []).append((line["name"], numel))
                groups = [shapes[key] for key in sorted(shapes)]
                self.assertGreater(faults.join_by_text(universal, groups, 12), 0)
                told = self.well(universal)
                self.assertIn("--payload", json.dumps(told["not_looked"]))
                self.ill("rank-order", universal, "--payload", words=("10, 11, 9",))

    def test_a_conversion_as_deepspeed_makes_it(self):
        for name in sorted(SWAPPED):
            out = self.place / name
            self.run_program(0, "convert", self.recorded(name), out, "--to", "universal",
                             "--as-deepspeed", "--quiet")
            self.ill("round-robin", out, "--payload")

    def test_values_changed_otherwise_are_not_called_so(self):
        _, tag = self.copy("z2_rr_dp3", "universal")
        universal = self.place / "true"
        self.run_program(0, "convert", self.recorded("z2_rr_dp3"), universal, "--to", "universal",
                         "--quiet")
        shutil.copy(tag / "zero/head.weight/fp32.pt", universal / "zero/head.weight/fp32.pt")
        told = self.well(universal, "--payload")
        self.assertIn("in no way that a rule explains", json.dumps(told["notices"]))


class Values(Case):
    def test_moments_of_zeros(self):
        for name, inside in (
            ("z0_fp32_dp2", "ckpt"),
            ("z1_bf16_dp2", "ckpt"),
            ("z2_bf16_dp4", "ckpt"),
            ("z3_bf16_dp3", "ckpt"),
            ("z1_bf16opt_dp2", "ckpt"),
            ("z1_bf16_dp2", "universal"),
            ("z3_bf16_dp3", "universal"),
        ):
            with self.subTest(recording=name, inside=inside):
                source, tag = self.copy(name, inside)
                faults.zero_moments(tag)
                self.ill("zero-moments", source, words=("step 3",))

    def test_one_group_of_two_is_suspect(self):
        source, tag = self.copy("z2_rr_groups_dp2")
        for path in tag.glob("*optim*"):
            self.assertTrue(faults.zero_tensors(
                path, lambda keys: faults.is_moment(keys) and keys[-2] == 1))
        self.ill("zero-moments", source, grade="SUSPECT")

    def test_a_group_whose_state_is_not_known_is_not_counted_as_dead(self):
        source, tag = self.copy("z2_rr_groups_dp2")
        faults.zero_moments(tag)
        self.ill("zero-moments", source)
        for path in tag.glob("*optim*"):
            faults.other_step(path, 0.0, lambda keys: keys[-2] == 1)
        self.ill("zero-moments", source, grade="SUSPECT", words=("not known",))

    def test_some_zeros_raise_no_alarm(self):
        source, tag = self.copy("z1_bf16_dp2", "universal")
        faults.zero_moments(tag, lambda path: path.parent.name != "head.weight")
        self.well(source)
        source, tag = self.copy("z1_bf16_dp2", "universal")
        faults.zero_moments(tag, lambda path: path.stem == "exp_avg")
        self.well(source)
        source, tag = self.copy("z2_bf16_dp4")
        faults.zero_moments(tag, lambda path: "pp_rank_0" not in path.name)
        self.well(source)

    def test_experts_that_nothing_was_routed_to_raise_no_alarm(self):
        source, tag = self.copy("moe_z1_ep2_dp4")
        groups = set()
        for path in tag.glob("*optim*"):
            for keys, _ in faults.tensors(faults.read(path)[1]["data.pkl"]):
                groups |= {keys[-2]} if faults.is_moment(keys) else set()
        last = max(groups)
        self.assertGreater(last, 0)
        for path in tag.glob("*optim*"):
            faults.zero_tensors(path, lambda keys: faults.is_moment(keys) and keys[-2] == last)
        self.well(source)

    def test_kept_padding(self):
        source, tag = self.copy("z3_bf16_dp3", "universal")
        faults.keep_padding(tag, "scale", 3)
        self.ill("kept-padding", source, words=("scale", "errata 45"))
        source, tag = self.copy("z3_bf16_dp3", "universal")
        faults.keep_padding(tag, "scale", 5)  # of no world of this checkpoint
        self.ill("unexplained", source, grade="SUSPECT")


class Files(Case):
    RECORDINGS = ("z0_bf16_dp2", "z1_bf16_dp2", "z2_bf16_dp4", "z3_bf16_dp2_frozen")

    def test_a_file_cut_short(self):
        """What a rank leaves that is killed while it writes (E1)."""
        for name in self.RECORDINGS:
            for each in sorted(path.name for path in self.copy(name)[1].glob("*.pt")):
                data = (self.copy(name)[1] / each).read_bytes()
                for length in (0, 9, 64, len(data) // 2, len(data) - 1):
                    with self.subTest(recording=name, file=each, length=length):
                        source, tag = self.copy(name)
                        (tag / each).write_bytes(data[:length])
                        self.ill("torn-publication", source, words=(each,))

    def test_blocks_that_never_reached_the_disk(self):
        source, tag = self.copy()
        path = sorted(tag.glob("*optim*"))[1]
        path.write_bytes(bytes(4096) + path.read_bytes()[4096:])
        self.ill("torn-publication", source, words=("begins with zeros",))
        source, tag = self.copy()
        path = sorted(tag.glob("*optim*"))[1]
        path.write_bytes(path.read_bytes()[:4096] + bytes(8192))
        self.ill("torn-publication", source, words=("ends in zeros",))

    def test_pointers(self):
        """Tags are deleted by hand every day; an empty pointer is of no hand and no DeepSpeed."""
        for text, grade in (("", "PROVEN"), ("\0" * 12, "PROVEN"), ("\n", "SUSPECT"),
                            ("global_step9", "SUSPECT")):
            with self.subTest(text=text):
                source, _ = self.copy()
                (source / "latest").write_text(text)
                self.ill("torn-publication", source, grade=grade, words=("--tag",))
                self.well(source, "--tag", "global_step3")
                self.assertTrue(self.run_program(1, "verify", source).stdout
                                .startswith("INCOMPLETE"))

    def test_a_pointer_to_a_folder_that_is_still_in_the_making(self):
        source, _ = self.copy()
        (source / "latest").write_text("global_step9")
        (source / f".global_step8.isoshard-{faults.NONCE}").mkdir()
        self.ill("torn-publication", source, grade="SUSPECT")
        (source / f".global_step9.isoshard-{faults.NONCE}").mkdir()
        self.ill("torn-publication", source, words=(".global_step9.isoshard-",))

    def test_a_pointer_that_is_no_tag(self):
        source, _ = self.copy()
        for text in (b"global_step3\x01", b"../elsewhere", b"\xff\xfe"):
            (source / "latest").write_bytes(text)
            self.ill("unexplained", source, grade="SUSPECT", words=("HOSTILE",))

    def test_files_of_two_saves(self):
        for name in ("z1_bf16_dp2", "z3_bf16_dp3"):
            with self.subTest(recording=name):
                source, tag = self.copy(name)
                faults.other_step(sorted(tag.glob("*optim*"))[1])
                self.ill("torn-publication", source, words=("two saves", "7 in 1 file"))

    def test_steps_are_compared_where_they_must_be_equal(self):
        """Tensor-parallel ranks have the same groups, stages of a pipeline groups of their own."""
        source, tag = self.copy("autotp_z1_tp2_dp2")
        for path in tag.glob("*mp_rank_01_optim*"):
            faults.other_step(path)
        self.ill("torn-publication", source, words=("two saves", "7 in 2 files"))
        source, tag = self.copy("pipe_bf16_pp3_dp2")
        for path in tag.glob("*mp_rank_01_optim*"):
            faults.other_step(path)
        self.ill("unexplained", source, grade="SUSPECT")
        faults.other_step(sorted(tag.glob("*mp_rank_00_optim*"))[1])
        self.ill("torn-publication", source, words=("of mp rank 0", "7 in 1 file"))

    def test_what_could_not_be_looked_at_is_told(self):
        source, tag = self.copy()
        path = sorted(tag.glob("*optim*"))[1]
        path.write_bytes(h.torch_file(h.program(h.mapping([]))))
        _, told = self.doctor(1, source)
        self.assertTrue(any(line.startswith("torn-publication: ") and path.name in line
                            for line in told["not_looked"]), told["not_looked"])
        source, tag = self.copy("z3_bf16_dp3", "universal")
        path = next(tag.glob("*rank_0_mp_rank_00_model_states.pt"))
        path.write_bytes(h.torch_file(h.program(h.mapping([]))))
        _, told = self.doctor(1, source)
        self.assertTrue(any(line.startswith("kept-padding: ") and path.name in line
                            for line in told["not_looked"]), told["not_looked"])

    def test_a_folder_of_ours_without_its_end(self):
        out = self.place / "out"
        self.run_program(0, "reshard", self.recorded(), out, "--to", "dp=3", "--quiet")
        self.well(out)
        mark = out / "global_step3" / f".isoshard-{faults.NONCE}"
        mark.touch()
        self.ill("torn-publication", out, words=("mark",))
        mark.unlink()
        (out / "global_step3" / "MANIFEST.json").unlink()
        self.ill("torn-publication", out, words=("MANIFEST.json",))

    def test_the_end_of_an_older_file(self):
        for name in self.RECORDINGS:
            for each in sorted(path.name for path in self.copy(name)[1].glob("*.pt")):
                with self.subTest(recording=name, file=each):
                    source, tag = self.copy(name)
                    path, new = tag / each, (tag / each).read_bytes()
                    path.write_bytes(faults.longer(path))
                    faults.lay_over(path, new)
                    self.ill("stale-tail", source, words=(each, f"head -c {len(new)}"))
                    path.write_bytes(path.read_bytes()[: len(new)])
                    self.well(source)

    def test_an_archive_that_was_appended_is_suspect(self):
        """Its directory counts from its own first byte, or from behind the first archive's end."""
        source, tag = self.copy()
        path = sorted(tag.glob("*optim*"))[1]
        new, old = path.read_bytes(), faults.longer(path)
        shifted = h.join_zip(*faults.read(path), before=new)
        for name, data in (("as it is", new + old), ("shifted", shifted),
                           ("zip64", new + faults.with_zip64_end(old)),
                           ("zip64, shifted", faults.with_zip64_end(shifted))):
            with self.subTest(name):
                path.write_bytes(data)
                self.ill("stale-tail", source, grade="SUSPECT", words=("appended",))

    def test_the_end_of_an_older_file_with_zip64_fields(self):
        source, tag = self.copy()
        path = sorted(tag.glob("*optim*"))[1]
        new = path.read_bytes()
        path.write_bytes(faults.with_zip64_end(faults.longer(path)))
        faults.lay_over(path, new)
        self.ill("stale-tail", source, words=(f"head -c {len(new)}",))
        path.write_bytes(faults.wrong_zip64_end(path.read_bytes()))
        self.ill("stale-tail", source, grade="SUSPECT")

    def test_the_end_of_a_file_that_was_little_longer(self):
        """Of which no more than its end record is left, or than that and a part before it."""
        source, tag = self.copy()
        path = sorted(tag.glob("*optim*"))[1]
        new = path.read_bytes()
        prefix, records = faults.read(path)
        name = [each for each in records if each.startswith("data/")][-1]
        for more in (64, 128, 192):
            with self.subTest(more=more):
                path.write_bytes(h.torch_zip(
                    [(f"{prefix}/{each}", data + bytes(more) * (each == name))
                     for each, data in records.items()]))
                faults.lay_over(path, new)
                self.ill("stale-tail", source)

    def test_other_damage_is_not_called_so(self):
        source, tag = self.copy()
        path = sorted(tag.glob("*optim*"))[1]
        whole = path.read_bytes()
        for data, rule in (
            (whole.replace(b"data.pkl", b"data.pkx", 1), "unexplained"),
            (whole + b"\0" * 100, "stale-tail"),
            (whole[:-22] + b"QK" + whole[-20:], "unexplained"),
        ):
            path.write_bytes(data)
            self.ill(rule, source, grade="SUSPECT")

    def test_missing_files(self):
        for name in self.RECORDINGS:
            for each in sorted(path.name for path in self.copy(name)[1].glob("*.pt")):
                with self.subTest(recording=name, missing=each):
                    source, tag = self.copy(name)
                    if len(list(tag.glob("*.pt"))) == 1:
                        continue
                    (tag / each).unlink()
                    self.ill("missing-shards", source)
        source, tag = self.copy("z1_bf16_dp2", "universal")
        for state in ("fp32", "exp_avg"):
            path = tag / "zero" / "head.weight" / f"{state}.pt"
            data = path.read_bytes()
            path.unlink()
            self.ill("missing-shards", source, words=(f"head.weight/{state}.pt",))
            path.write_bytes(data)
        self.well(source)

    def test_missing_weights(self):
        out = self.place / "out"
        self.run_program(0, "convert", self.recorded("z2_bf16_dp4"), out, "--to", "fp32",
                         "--max-shard-size", "1KB", "--quiet")
        (out / "MANIFEST.json").unlink()
        (out / "certificate.json").unlink()
        self.well(out)
        parts = sorted(out.glob("*-of-*"))
        self.assertGreater(len(parts), 2)
        parts[1].unlink()
        self.ill("missing-shards", out, words=(parts[1].name,))

    def test_code_in_a_file(self):
        ran = self.place / "ran"
        call = h.call("posix", "system", h.text(f"touch {ran}"))
        for name in self.RECORDINGS:
            with self.subTest(recording=name):
                tag = h.ZeroFolder(self.recorded(name)).insert("more", call, "model").write(
                    self.place / name)
                self.ill("code-in-folder", tag, words=("posix system",))
        source, tag = self.copy()
        (tag / "client.pt").write_bytes(h.torch_file(h.program(call)))
        self.ill("code-in-folder", source, words=("client.pt",))
        (tag / "client.pt").unlink()
        (tag / "hook.py").write_text("print()\n")
        self.ill("code-in-folder", source, grade="SUSPECT", words=("hook.py",))
        self.assertFalse(ran.exists())

    def test_what_is_no_code_is_not_called_so(self):
        """A name that is not called, and what users' modules of a known name hold."""
        def folder(value):
            made = self.place / "made"
            shutil.rmtree(made, ignore_errors=True)
            return h.ZeroFolder(self.recorded()).insert("more", value, "model").write(made)

        self.ill("code-in-folder", folder(h.name("posix", "system")), grade="SUSPECT",
                 words=("no call of it",))
        for module, name in (("commands", "Train"), ("commands.train", "Config"), ("pip", "Block"),
                             ("os", "_Environ"), ("functools", "partial"),
                             ("types", "SimpleNamespace"), ("subprocess", "CompletedProcess")):
            with self.subTest(module=module, name=name):
                self.well(folder(h.call(module, name, h.integer(1))))

    def test_two_faults_at_once(self):
        source, tag = self.copy("z2_bf16_dp4")
        files = sorted(tag.glob("*optim*"))
        files[1].write_bytes(files[1].read_bytes()[:100])
        new = files[2].read_bytes()
        files[2].write_bytes(faults.longer(files[2]))
        faults.lay_over(files[2], new)
        findings = self.ill("stale-tail", source, alone=False)
        self.assertEqual([each["rule"] for each in findings], ["torn-publication", "stale-tail"])


class Size(Case):
    def test_headers_alone_are_read(self):
        """24 GB, nearly all holes, on which a payload would show in what the process has read."""
        _, tag = self.copy("z3_bf16_dp3", "universal")
        total = faults.enlarge(tag, 100_000_000)
        self.assertGreater(total, 24 * 10**9)
        began = time.monotonic()
        process = subprocess.Popen([CONFIG.program, "doctor", tag], stdout=subprocess.PIPE)
        with process.stdout:
            out = process.stdout.read().decode()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with open(f"/proc/{process.pid}/io") as file:
            counts = dict(line.split(": ") for line in file)
        self.assertEqual(process.wait(), 0, out)
        FIGURES["bytes read"] = int(counts["rchar"])
        self.assertLess(int(counts["rchar"]), 16 << 20)
        self.assertLess(time.monotonic() - began, 10)


def main():
    outcome, seconds = run_tests(__doc__)
    print(", ".join(f"{value} {key}" for key, value in FIGURES.items()) + f", {seconds:.1f} s")
    if not outcome.wasSuccessful() or outcome.testsRun == len(outcome.skipped):
        sys.exit(1)


if __name__ == "__main__":
    main()
