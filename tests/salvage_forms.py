#!/usr/bin/env python3
"""salvage_forms.py PROGRAM TRACES [unittest arguments]: `isoshard salvage` of experts, pipelines
and universal folders.

What must be lost is not computed from any layout: a record is given other bytes under a right CRC,
and those tensors whose bytes change are the ones that it holds. The same record with a wrong CRC
must then cost these tensors and no other. Python's standard library only. Not verified: the names
and shapes, which are those of `convert --to fp32` on the undamaged checkpoint.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hostile as h  # noqa: E402
from crash_case import spread  # noqa: E402
from program_case import ASKED, ProgramCase, run_tests  # noqa: E402
from salvage_truth import load, record_ends  # noqa: E402

MOST = 10**9 if ASKED == "all" else min(60, max(12, int(ASKED) // 5))  # records of a recording
EXPERTS = ("autoep_folded_z2_tp2_ep2_dp1", "autoep_z0_ep2_dp4", "autoep_z1_ep2_dp2",
           "autoep_z3_ep2_dp4", "moe_z0_ep2_dp4", "moe_z1_ep2_dp4",
           "moe2_groups_z1_ep2_dp4")  # fmt: skip
PIPELINES = ("pipe_bf16_pp3_dp2", "pipe_frozen_pp2_dp2", "pipe_tp2_pp2_dp2",
             "pipe_z0_bf16_pp2_dp2", "pipe_z1_pp2_dp2_tied")  # fmt: skip

UNIVERSAL = ("z1_bf16_dp2", "z3_bf16_dp3", "autotp_z1_tp2_dp2", "z2_bf16_dp4",
             "z3_bf16_dp2_frozen")  # fmt: skip
ALL = EXPERTS + PIPELINES + tuple(f"{name}/universal" for name in UNIVERSAL)


class Harness(ProgramCase):
    def setUp(self):
        super().setUp()
        self.source, self.out = self.place / "source", self.place / "out"

    def copied(self, name):
        """(tag folder of a copy, the names of its files below that)."""
        name, _, inside = name.partition("/")
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(self.recorded(name, inside or "ckpt"), self.source)
        latest = self.source / ("latest_universal" if inside else "latest")
        tag = self.source / latest.read_text().strip()
        return tag, sorted(str(path.relative_to(tag)) for path in tag.rglob("*.pt"))

    def salvage(self, status):
        """(report, {(name, state): bits of what is exported}); None where it is refused."""
        shutil.rmtree(self.out, ignore_errors=True)
        result = self.run_program(None, "salvage", self.source, self.out, "--quiet")
        self.assertIn(result.returncode, status, result)
        if result.returncode == 2:
            self.assertIn("next:", result.stderr)
            self.assertFalse(self.out.exists())
            return None
        report = json.loads((self.out / "salvage.json").read_text())
        folders = {}
        for path in sorted(self.out.rglob("*.safetensors")):
            folders.setdefault(path.parent.name, {}).update(load(str(path)))
        found = {}
        for tensor in report["tensors"]:
            if tensor["status"] == "exported":
                bits = folders[tensor["in"]][tensor["name"]].bits()
                found[tensor["name"], tensor["state"]] = bytes(bits)
        return report, found


class Forms(Harness):
    def test_clean_is_what_convert_gives(self):
        for name in ALL:
            with self.subTest(name):
                self.copied(name)
                report, _ = self.salvage((0,))
                self.assertTrue(report["complete"])
                fp32 = self.place / "fp32"
                shutil.rmtree(fp32, ignore_errors=True)
                self.run_program(0, "convert", self.source, fp32, "--to", "fp32", "--quiet")
                self.assertEqual((fp32 / "model.safetensors").read_bytes(),
                                 (self.out / "weights" / "model.safetensors").read_bytes())

    def test_a_record_costs_what_it_holds_and_no_more(self):
        for name in ALL:
            tag, files = self.copied(name)
            _, clean = self.salvage((0,))
            ends = {file: payloads(tag / file) for file in files}
            records = [(file, record) for file, found in ends.items() for record in found]
            cost = 0
            for number in spread(len(records), MOST):
                file, record = records[number - 1]
                with self.subTest(name, file=file, record=record):
                    with kept(tag / file) as sound:
                        (tag / file).write_bytes(changed(tag / file, record))
                        other = self.salvage((0, 1, 2))
                        (tag / file).write_bytes(flipped(sound, {record: ends[file][record]}))
                        report, found = self.salvage((0, 1))
                    cost += self.judge(clean, other, report, found)
            self.assertGreater(cost, 0, name)

    def judge(self, clean, other, report, found):
        """How many tensors the record has cost."""
        self.assertEqual({(t["name"], t["state"]) for t in report["tensors"]}, clean.keys())
        for key, bits in found.items():
            self.assertEqual(bits, clean[key], key)
        elsewhere = {(t["name"], t["state"]) for t in report["tensors"] if t.get("from")}
        lost = clean.keys() - (found.keys() - elsewhere)
        if other is not None:
            self.assertEqual(lost, {key for key in clean if other[1].get(key) != clean[key]})
        return len(lost)

    def test_a_lost_file(self):
        """Of a pipeline's rank, and states of universal folders: as if each of its records were
        damaged. Others are refused, but what holds nothing of its own: a layer without tensors, at
        stage 0 a copy of rank 0's, in universal folders the models of other ranks."""
        for name in ALL:
            tag, files = self.copied(name)
            _, clean = self.salvage((0,))
            for number in spread(len(files), MOST):
                file = files[number - 1]
                stands = name in PIPELINES and "_optim_" in file and "_z0_" not in name
                stands = stands or file.count("/") > 1
                nothing = not payloads(tag / file) if "layer" in file else "expp_rank_0_" in file
                if file.count("/") > 1 and len(list((tag / file).parent.iterdir())) == 1:
                    stands, nothing = False, True  # frozen, or a buffer: the model file has it
                if name == "z3_bf16_dp3/universal" and "_model_" in file:
                    nothing = "rank_0_mp" not in file
                with self.subTest(name, file=file):
                    with kept(tag / file) as sound:
                        (tag / file).write_bytes(flipped(sound, payloads(tag / file)))
                        damaged = self.salvage((0, 1, 2))
                        (tag / file).unlink()
                        missing = self.salvage((1,) if stands else (0,) if nothing else (2,))
                    if stands:
                        self.assertEqual(missing[1].keys(), damaged[1].keys())
                        self.assertEqual({key: clean[key] for key in missing[1]}, missing[1])
                        if not file.endswith("step.pt"):  # a number, which is no tensor
                            self.assertLess(len(missing[1]), len(clean))

    def test_a_torn_file(self):
        """Cut within its payloads: its header is found, what lies before the cut is good."""
        for name in ALL:
            tag, files = self.copied(name)
            _, clean = self.salvage((0,))
            for number in spread(len(files), MOST):
                file = files[number - 1]
                ends = list(payloads(tag / file).values())
                if not ends:
                    continue
                with self.subTest(name, file=file):
                    with kept(tag / file) as sound:
                        (tag / file).write_bytes(sound[: ends[-1] + 1])
                        report, found = self.salvage((0, 1))
                    health = {f["name"]: f["health"] for f in report["files"]}[file]
                    self.assertEqual(health, "torn")
                    self.assertEqual({key: clean[key] for key in found}, found)


class Found(Harness):
    """What a hostile tester found: each case once exported, or ended, what it must not."""

    def setUp(self):
        super().setUp()
        self.tag, _ = self.copied("z1_bf16_dp2/universal")

    def state(self, parameter, name):
        return self.tag / "zero" / parameter / f"{name}.pt"

    def write(self, path, value, *storages):
        path.write_bytes(h.torch_file(h.program(value), list(storages), prefix=path.stem))

    def lost(self, parameter, *names):
        """Those files are lost, and cost the tensors of their names, which are not numbers."""
        report, _ = self.salvage((1,))
        bad = {f["name"] for f in report["files"] if f["health"] != "whole"}
        self.assertEqual(bad, {f"zero/{parameter}/{name}.pt" for name in names})
        named = {"weight" if name == "fp32" else name for name in names} - {"step"}
        self.assertEqual({(t["name"], t["state"]) for t in report["tensors"]
                          if t["status"] != "exported"}, {(parameter, each) for each in named})
        return report

    def test_a_weight_that_is_no_tensor(self):
        self.write(self.state("blocks.0.up.bias", "fp32"), h.NONE)
        self.lost("blocks.0.up.bias", "fp32")
        for verb in ("convert", self.source, self.out, "--to", "fp32"), ("inspect", self.source):
            shutil.rmtree(self.out, ignore_errors=True)
            result = self.run_program(2, *verb)
            self.assertIn("A weight is no tensor", result.stderr)

    def test_a_moment_that_is_a_number(self):
        self.write(self.state("scale", "exp_avg"), h.NONE)
        self.lost("scale", "exp_avg")

    def test_a_step_that_is_a_tensor(self):
        prefix, records = h.split_zip(self.state("scale", "exp_avg"))
        self.state("scale", "step").write_bytes(h.join_zip("step", records))
        report = self.lost("scale", "step")
        self.assertFalse(all(number["proven"] for number in report["numbers"]))

    def test_another_parameters_weight(self):
        shutil.copy(self.state("embed.weight", "fp32"), self.state("scale", "fp32"))
        self.lost("scale", "fp32")

    def test_a_link_to_itself_and_a_folder(self):
        self.state("scale", "fp32").unlink()
        self.state("scale", "fp32").symlink_to("fp32.pt")
        self.lost("scale", "fp32")
        tag, _ = self.copied("z2_bf16_dp4")
        file = next(tag.glob("*rank_1*optim*"))
        file.unlink()
        file.mkdir()
        self.salvage((1,))

    def test_a_manifest(self):
        """What it lists must be there; a damaged one lists nothing, and ends nothing."""
        written = self.place / "written"
        self.run_program(0, "convert", self.recorded(), written, "--to", "universal", "--quiet")
        for damage in False, True:
            shutil.rmtree(self.source)
            shutil.copytree(written, self.source)
            for path in self.source.glob("zero/*/exp_avg.pt"):
                if not damage or path.parent.name == "scale":
                    path.unlink()
            if damage:
                (self.source / "MANIFEST.json").write_bytes(b"")
            report, _ = self.salvage((1,))
            lost = {t["name"] for t in report["tensors"] if t["status"] == "lost"}
            self.assertEqual(len(lost), 1 if damage else 13)

    def test_names_that_salvage_takes_itself(self):
        for name in "weights", "weight", "buffer", "salvage.json", "MANIFEST.json":
            tag, _ = self.copied("z1_bf16_dp2/universal")
            for folder in (tag / "zero").iterdir():
                if (folder / "exp_avg.pt").exists():
                    prefix, records = h.split_zip(folder / "exp_avg.pt")
                    (folder / f"{name}.pt").write_bytes(h.join_zip("archive", records))
            with self.subTest(name):
                self.assertIsNone(self.salvage((2,)))

    def test_a_pipeline_without_optimizer_files(self):
        """Every stage's weights are then copies, and called so."""
        for name in PIPELINES:
            if "_z0_" in name:
                continue
            tag, files = self.copied(name)
            trained = set()
            for path in tag.glob("mp_rank_*"):
                trained |= {each for group in load(str(path))["param_shapes"] for each in group}
            for path in tag.glob("*_optim_*"):
                path.unlink()
            report, _ = self.salvage((1,))
            with self.subTest(name):
                for tensor in report["tensors"]:
                    self.assertEqual(tensor["status"] == "copy", tensor["name"] in trained, tensor)

    def test_a_stage_without_optimizer_files(self):
        tag, _ = self.copied("pipe_bf16_pp3_dp2")
        for path in tag.glob("*mp_rank_01_optim*"):
            path.unlink()
        self.assertIsNone(self.salvage((2,)))

    def test_experts_without_their_files(self):
        tag, _ = self.copied("moe_z1_ep2_dp4")
        for path in [*tag.glob("layer_*"), *tag.glob("*rank_1_mp*")]:
            path.unlink()
        self.assertIsNone(self.salvage((2,)))


@contextlib.contextmanager
def kept(path):
    """Its bytes, which it has again afterwards."""
    sound = path.read_bytes()
    try:
        yield sound
    finally:
        path.write_bytes(sound)


def payloads(path):
    """{record of a storage that is not empty: where its bytes begin}."""
    return {record: begin for record, (begin, end, _) in record_ends(path).items()
            if record.startswith("data/") and begin < end}


def changed(path, record):
    """The file with other bytes in one record, under right CRCs."""
    prefix, records = h.split_zip(path)
    records[record] = bytes(byte ^ 0x5A for byte in records[record])
    return h.join_zip(prefix, records)


def flipped(sound, places):
    content = bytearray(sound)
    for at in places.values():
        content[at] ^= 0x10
    return bytes(content)


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
