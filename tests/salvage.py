#!/usr/bin/env python3
"""salvage.py PROGRAM TRACES [unittest arguments]: what `isoshard salvage` takes and what it lists.

Real recordings are damaged (files deleted, cut, flipped, made hostile); which tensors are then
good, which elements are lost and what the good ones hold is derived in tests/salvage_truth.py from
the undamaged files. Python's standard library only. Not verified: disks that fail while reading.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hostile as h  # noqa: E402
from program_case import ASKED, CONFIG, ProgramCase, run_tests  # noqa: E402
from salvage_truth import Truth, as_float32, load, record_ends  # noqa: E402

FLAT = ("z1_bf16_dp2", "z2_bf16_dp4", "z2_rr_dp3", "z1_align_dp3", "z2_rmsprop_groups_dp2")
SLOTS = ("z3_bf16_dp2_frozen", "z3_bf16_dp3", "z3_fp32_dp2_subgroups")
OTHERS = ("z1_bf16opt_dp4", "z1_bf16opt_spill_dp4", "z1_adagrad_dp2", "z1_fp16_dp2", "sp2_z1_dp2")


class Salvage(ProgramCase):
    def damaged(self, name):
        """(copy of the recording, its tag folder, truth about the undamaged one)."""
        source, tag = self.damaged_files(name)
        return source, tag, Truth(tag)

    def tensors_of(self, folder):
        found = {}
        for path in sorted((self.out / folder).glob("*.safetensors")):
            found.update(load(str(path)))
        found.pop("__metadata__", None)
        return found

    def salvage(self, source, status, *flags):
        result = self.run_program(status, "salvage", source, self.out, "--quiet", *flags)
        self.assertEqual(result.stderr, "")
        return json.loads((self.out / "salvage.json").read_text())

    def check(self, source, truth, lost, *flags):
        """The report and every exported byte against the truth; `lost`: damaged places."""
        expected = truth.expected(lost)
        # Stage 3: rank 0's model file alone says which names are tied.
        first = truth.models[0]
        beheaded = len(truth.models) > 1 and truth.places(first) <= lost
        untied = truth.files[first].get("shared_params") or {} if beheaded else {}
        whole = all(status == "exported" for status, *_ in expected.values()) and not untied
        report = self.salvage(source, 0 if whole else 1, *flags)
        self.assertEqual(report["complete"], whole)
        found = {(t["name"], t["state"]): t for t in report["tensors"]}
        for name in untied:  # what else it could be is not known
            self.assertEqual(found.pop((name, "weight"))["status"], "lost")
        self.assertEqual(found.keys(), expected.keys())
        folders = {}
        for key, (status, bad, good) in expected.items():
            entry = found[key]
            self.assertEqual(entry["status"], status, (key, entry))
            self.assertEqual(entry["shape"], truth.entries[key][1])
            self.assertEqual([[r["begin"], r["count"]] for r in joined(entry)], bad, (key, entry))
            if bad:
                self.assertEqual([[r["begin"], r["count"]] for r in entry["kept"]], good)
                self.assertTrue(all(r["file"] and r["why"] for r in entry["lost"]))
            folder = entry.get("in")
            if status in ("partial", "lost"):
                self.assertIsNone(folder)
                continue
            folders.setdefault(folder, set()).add(key[0])
            self.compare(key, status, folder, truth)
        for folder, names in folders.items():
            self.assertEqual(set(self.tensors_of(folder)), names)
        return report

    def compare(self, key, status, folder, truth):
        dtype, _, _, data, copy = truth.entries[key]
        tensor = self.tensors_of(folder)[key[0]]
        if status == "copy":
            self.assertEqual(folder, "copies")
            self.assertEqual((tensor.dtype, bytes(tensor.bits())), copy[1:], key)
            return
        self.assertEqual(folder, {"buffer": "weights", "weight": "weights"}.get(key[1], key[1]))
        is_float = "float" in dtype and folder == "weights"
        self.assertEqual(bytes(tensor.bits()), as_float32(dtype, data) if is_float else data, key)

    def test_clean_is_what_convert_gives(self):
        for name in FLAT + SLOTS + OTHERS:
            with self.subTest(name):
                source, _, truth = self.damaged(name)
                report = self.check(source, truth, set())
                self.assertTrue(all(file["health"] == "whole" for file in report["files"]))
                fp32 = self.place / "fp32"
                shutil.rmtree(fp32, ignore_errors=True)
                self.run_program(0, "convert", source, fp32, "--to", "fp32", "--quiet")
                self.assertEqual(
                    (fp32 / "model.safetensors").read_bytes(),
                    (self.out / "weights" / "model.safetensors").read_bytes(),
                )

    def test_a_missing_file(self):
        for name in FLAT + SLOTS + OTHERS:
            for each in self.damaged(name)[2].files:
                source, tag, truth = self.damaged(name)
                if len(truth.models) == 1 and each in truth.models:
                    continue  # names and shapes are gone
                with self.subTest(name, missing=each):
                    (tag / each).unlink()
                    report = self.check(source, truth, truth.places(each))
                    health = {file["name"]: file["health"] for file in report["files"]}
                    self.assertEqual(health[each], "missing")

    def test_one_flipped_byte_of_each_storage(self):
        """A program that does not look at CRCs exports the wrong bytes here."""
        for name in ("z1_bf16_dp2", "z3_bf16_dp2_frozen"):
            for each in self.damaged(name)[2].files:
                for record, (begin, end, _) in record_ends(self.damaged(name)[1] / each).items():
                    if not record.startswith("data/") or begin == end:
                        continue
                    source, tag, truth = self.damaged(name)
                    with self.subTest(name, file=each, record=record):
                        flip(tag / each, end - 1)
                        place = each, record[5:]
                        expected = truth.expected({place})
                        if all(status == "exported" for status, *_ in expected.values()):
                            # A copy beside a good master, or a step: the tensors are all there.
                            step = each == truth.optims[0]
                            report = self.salvage(source, 1 if step else 0)
                            self.assertEqual(report["counts"]["exported"], len(expected))
                            self.assertEqual(all(n["proven"] for n in report["numbers"]), not step)
                            continue
                        report = self.check(source, truth, {place})
                        reasons = [t.get("reason", "") for t in report["tensors"]]
                        self.assertTrue(any(f"CRC wrong at record {record}:" in r for r in reasons))

    def test_truncated_at_every_record(self):
        for name in ("z1_bf16_dp2", "z2_rr_dp3", "z3_bf16_dp3"):
            source, tag, truth = self.damaged(name)
            for each in truth.optims[-1], truth.models[-1]:
                ends = record_ends(tag / each)
                cuts = {at for record in ends.values() for at in (record[0], record[1], record[2])}
                for cut in sorted(cuts | {0, 1, 30, (tag / each).stat().st_size - 1}):
                    source, tag, truth = self.damaged(name)
                    places = truth.places(each)
                    lost = {p for p in places if ends[f"data/{p[1]}"][2] > cut}
                    beheaded = ends["data.pkl"][2] > cut
                    if beheaded:
                        if len(truth.models) == 1 and each in truth.models:
                            continue
                        lost = places
                    with self.subTest(name, file=each, cut=cut):
                        with open(tag / each, "r+b") as file:
                            file.truncate(cut)
                        report = self.check(source, truth, lost)
                        health = {f["name"]: f["health"] for f in report["files"]}[each]
                        self.assertEqual(health, "lost" if beheaded else "torn")

    def test_random_damage_never_exports_a_wrong_byte(self):
        """A flipped byte anywhere, a local name's digit made another, or an older save's bytes from
        some place on; and cuts; ISOSHARD_CASES of them."""
        random = Random(1)
        truths = {name: self.damaged(name)[2] for name in FLAT + SLOTS}
        for case in range(2000 if ASKED == "all" else int(ASKED)):
            name = random.choice(FLAT + SLOTS)
            (source, tag), truth = self.damaged_files(name), truths[name]
            for each in random.sample(sorted(truth.files), random.choice((1, 1, 2))):
                path = tag / each
                if harm(path, random) and random.random() < 0.3:
                    os.truncate(path, random.randrange(path.stat().st_size))
            result = subprocess.run(
                [CONFIG.program, "salvage", source, self.out, "--quiet"],
                capture_output=True,
                text=True,
                check=False,
            )
            with self.subTest(name, case=case):
                self.assertIn(result.returncode, (0, 1, 2), result)
                self.assertEqual(self.out.exists(), result.returncode != 2, result)
                if result.returncode == 2:
                    self.assertIn("next:", result.stderr)
                    continue
                for tensor in json.loads((self.out / "salvage.json").read_text())["tensors"]:
                    key = tensor["name"], tensor["state"]
                    if tensor["status"] in ("exported", "copy"):
                        self.compare(key, tensor["status"], tensor["in"], truth)

    def test_an_interrupted_save_over_an_older_one(self):
        """FastFileWriter does not cut off the file that it opens: what is behind is older."""
        for name in ("z1_bf16_dp2", "z3_bf16_dp3"):
            _, tag, truth = self.damaged(name)
            each = truth.optims[-1]
            ends, data = record_ends(tag / each), (tag / each).read_bytes()
            first, older = first_storage(tag / each), older_save(tag / each)
            last = max(ends[f"data/{key}"][1] for _, key in truth.places(each))
            for begin, end, behind in ends.values():
                for at in {begin, (begin + end) // 2, end, behind, behind + 20}:
                    if not first <= at <= last:
                        continue
                    source, tag = self.damaged_files(name)
                    (tag / each).write_bytes(data[:at] + older[at:])
                    lost = {p for p in truth.places(each) if ends[f"data/{p[1]}"][1] > at}
                    with self.subTest(name, at=at):
                        report = self.salvage(source, 1)
                        for tensor in report["tensors"]:
                            key = tensor["name"], tensor["state"]
                            held = {run[2] for run in truth.entries[key][2]}
                            if tensor["status"] == "exported":
                                self.assertFalse(held & lost, key)
                                self.compare(key, "exported", tensor["in"], truth)

    def test_a_name_of_another_record(self):
        """The directory still says what the record is: nothing is lost, and none is hostile."""
        source, tag, truth = self.damaged("z1_bf16_dp2")
        each = truth.optims[0]
        begin = record_ends(tag / each)["data/1"][0]
        at = (tag / each).read_bytes().rfind(b"data/1", 0, begin) + 5
        flip(tag / each, at, ord("1") ^ ord("0"))
        report = self.check(source, truth, set())
        self.assertEqual({f["name"]: f["health"] for f in report["files"]}[each], "torn")

    def test_a_header_that_does_not_hold(self):
        for name in ("z1_bf16_dp2", "z3_bf16_dp2_frozen"):
            source, tag, truth = self.damaged(name)
            each = truth.optims[0]
            begin, end, _ = record_ends(tag / each)["data.pkl"]
            for at in begin, (begin + end) // 2, end - 1:
                source, tag, truth = self.damaged(name)
                with self.subTest(name, at=at):
                    flip(tag / each, at)
                    report = self.check(source, truth, truth.places(each))
                    health = {f["name"]: f["health"] for f in report["files"]}[each]
                    self.assertEqual(health, "lost")

    def test_a_directory_that_does_not_hold(self):
        """The records are found by their own headers: nothing is lost."""
        source, tag, truth = self.damaged("z2_bf16_dp4")
        for each in truth.files:
            flip(tag / each, (tag / each).stat().st_size - 30)
        report = self.check(source, truth, set())
        self.assertEqual({file["health"] for file in report["files"]}, {"torn"})

    def test_every_record_of_every_rank(self):
        source, tag, truth = self.damaged("sp2_z1_dp2")
        lost = set()
        for each in truth.files:
            for record, (begin, end, _) in record_ends(tag / each).items():
                if record.startswith("data/") and begin < end:
                    flip(tag / each, begin)
                    lost.add((each, record[5:]))
        expected = truth.expected(lost)
        left = [key for key in expected if expected[key][0] == "exported"]
        if left:
            self.check(source, truth, lost)
        else:
            result = self.run_program(2, "salvage", source, self.out)
            self.assertIn("no tensor is whole", result.stderr)
            self.assertFalse(self.out.exists())
        listing = self.run_program(1, "salvage", source, self.place / "none", "--dry-run").stdout
        self.assertIn("CRC wrong at record data/0", listing)

    def test_both_of_two_copies(self):
        source, tag, truth = self.damaged("z1_bf16_dp2")
        lost = set()
        for key in ("head.weight", "weight"), ("blocks.0.norm.weight", "weight"):
            if key not in truth.entries:
                continue
            _, _, runs, _, copy = truth.entries[key]
            lost |= {runs[0][2], copy[0]}
        self.assertTrue(lost)
        for file, key in lost:
            flip(tag / file, record_ends(tag / file)[f"data/{key}"][0])
        report = self.check(source, truth, lost)
        # The model's copies are views of one storage, so that all of them are gone.
        self.assertEqual(report["counts"]["copy"], 0)
        self.assertGreater(report["counts"]["partial"] + report["counts"]["lost"], 0)

    def test_no_optimizer_file(self):
        """The model's own copies are all there is, and are called so."""
        source, tag, truth = self.damaged("z1_bf16_dp2")
        for each in truth.optims:
            (tag / each).unlink()
        report = self.salvage(source, 1)
        for tensor in report["tensors"]:
            key = tensor["name"], tensor["state"]
            trained = truth.entries[key][4] is not None
            self.assertEqual(tensor["status"], "copy" if trained else "exported")
            self.compare(key, tensor["status"], tensor["in"], truth)

    def test_partial_is_nan_where_it_is_lost(self):
        for name in ("z2_bf16_dp4", "z2_rr_dp3", "z3_bf16_dp2_frozen"):
            source, tag, truth = self.damaged(name)
            (tag / truth.optims[-1]).unlink()
            report = self.check(source, truth, truth.places(truth.optims[-1]), "--partial")
            partial = [t for t in report["tensors"] if t.get("partial_in")]
            self.assertTrue(partial)
            for tensor in partial:
                dtype, _, _, data, _ = truth.entries[tensor["name"], tensor["state"]]
                self.assertEqual(dtype, "float32")
                found = bytes(self.tensors_of(tensor["partial_in"])[tensor["name"]].bits())
                expected = bytearray(data)
                for lost in joined(tensor):
                    begin, end = 4 * lost["begin"], 4 * (lost["begin"] + lost["count"])
                    expected[begin:end] = struct.pack("<I", 0x7FC00000) * lost["count"]
                self.assertEqual(found, bytes(expected))

    def test_a_hostile_file(self):
        for name, kind in (("z1_bf16_dp2", "optims"), ("z3_bf16_dp3", "models")):
            for cut in (0, 30):
                source, tag, truth = self.damaged(name)
                each, canary = getattr(truth, kind)[-1], self.place / "canary"
                stem = each.rsplit(".", 1)[0]
                content = h.torch_file(
                    h.evil_pickle(f"touch {canary}"), [h.floats(4)], prefix=stem
                )
                (tag / each).write_bytes(content[: len(content) - cut])
                with self.subTest(name, cut=cut):
                    report = self.check(source, truth, truth.places(each))
                    file = {f["name"]: f for f in report["files"]}[each]
                    self.assertEqual(file["health"], "hostile", file)
                    self.assertFalse(canary.exists())

    def test_a_file_of_another_rank(self):
        source, tag, truth = self.damaged("z3_bf16_dp3")
        shutil.copy(tag / truth.optims[0], tag / truth.optims[1])
        report = self.check(source, truth, truth.places(truth.optims[1]))
        self.assertIn("another name", json.dumps(report["files"]))

    def test_tensor_parallel_ranks(self):
        """Against what salvage takes of the undamaged checkpoint."""
        for name in ("autotp_z1_tp2_dp2", "autotp_uneven_tp3", "autotp_qwen2_bias_tp2_dp2_z2"):
            source, tag = self.damaged_files(name)
            clean = self.salvage(source, 0)
            folders = {t["in"] for t in clean["tensors"]}
            truth = {folder: self.tensors_of(folder) for folder in folders}
            fp32 = self.place / "fp32"
            shutil.rmtree(fp32, ignore_errors=True)
            self.run_program(0, "convert", source, fp32, "--to", "fp32", "--quiet")
            self.assertEqual(
                (fp32 / "model.safetensors").read_bytes(),
                (self.out / "weights" / "model.safetensors").read_bytes(),
            )
            for each in sorted(path.name for path in tag.glob("*.pt")):
                source, tag = self.damaged_files(name)
                with self.subTest(name, missing=each):
                    (tag / each).unlink()
                    if (name, each) == ("autotp_uneven_tp3", "mp_rank_02_model_states.pt"):
                        result = self.run_program(2, "salvage", source, self.out)
                        self.assertIn("its shapes are not those of another rank", result.stderr)
                        continue
                    self.check_ranks(source, truth, masters="_model_" in each)

    def check_ranks(self, source, truth, masters):
        report = self.salvage(source, 0 if masters else 1)
        self.assertGreater(report["counts"]["exported"], 0)
        self.assertEqual(report["counts"]["exported"] == len(report["tensors"]), masters)
        for tensor in report["tensors"]:
            if tensor["status"] != "exported":
                continue
            found = self.tensors_of(tensor["in"])[tensor["name"]]
            expected = truth[tensor["in"]][tensor["name"]]
            self.assertEqual(bytes(found.bits()), bytes(expected.bits()), tensor)

    def damaged_files(self, name):
        source, self.out = self.place / "source", self.place / "out"
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.recorded(name), source)
        return source, source / (source / "latest").read_text().strip()

    def test_what_it_cannot(self):
        """Status 2, one message with what to do next, and no target."""
        for name, lose, words in (
            ("z1_bf16_dp2", "*model*", "model file"),
            ("z3_bf16_dp3", "*optim*", "optimizer file"),
            ("moe_z1_ep2_dp4", "*zero_pp_rank_1_*", "no other stands for"),
            ("pipe_z1_pp2_dp1", "layer_01*", "layer"),
        ):
            source, tag = self.damaged_files(name)
            for path in tag.glob(lose):
                path.unlink()
            with self.subTest(name, lose=lose):
                result = self.run_program(2, "salvage", source, self.out)
                self.assertIn(words, result.stderr)
                self.assertIn("next:", result.stderr)
                self.assertFalse(self.out.exists())

    def test_papers_and_flags(self):
        source, tag, truth = self.damaged("z1_bf16_dp2")
        (tag / truth.optims[1]).unlink()
        before = contents(source)
        self.run_program(1, "salvage", source, self.out, "--dry-run")
        self.assertFalse(self.out.exists())
        result = self.run_program(1, "salvage", source, self.out)
        self.assertIn("the file is missing", result.stdout)
        files = contents(self.out)
        listed = {f["path"] for f in json.loads(files[Path("MANIFEST.json")])["files"]}
        self.assertEqual(listed | {"MANIFEST.json"}, set(map(str, files)))
        self.assertTrue(json.loads(files[Path("certificate.json")])["lossy"])
        self.run_program(2, "salvage", source, self.out)  # it is there
        self.run_program(1, "salvage", source, self.out, "--overwrite", "--max-shard-size", "2KB")
        self.assertGreater(len(list((self.out / "weights").glob("*.safetensors"))), 1)
        self.run_program(1, "salvage", source, self.out, "--overwrite", "--workers", "1")
        self.assertEqual(files, contents(self.out))
        self.assertEqual(before, contents(source))


def joined(entry):
    """The lost ranges, neighbours of different files joined."""
    result = []
    for r in entry.get("lost", []):
        if result and result[-1]["begin"] + result[-1]["count"] == r["begin"]:
            result[-1]["count"] += r["count"]
        else:
            result.append(dict(r))
    return result


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path, offset, mask=0x10):
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def harm(path, random):
    """Whether a cut behind the harm leaves something that tells of it. An older save's bytes from
    between two payloads on do not, where the directory is gone too (docs/KNOWN_GAPS.md)."""
    data = path.read_bytes()
    kind = random.randrange(3)
    if kind == 0:
        flip(path, random.randrange(len(data)), random.randrange(1, 256))
    elif kind == 1:
        ends = record_ends(path)
        digits = [data.rfind(record.encode(), 0, begin) + len(record) - 1
                  for record, (begin, _, _) in ends.items() if record.startswith("data/")]
        at = random.choice(digits)
        flip(path, at, data[at] ^ random.choice([d for d in b"0123456789" if d != data[at]]))
    else:
        at = random.randrange(first_storage(path), len(data))
        path.write_bytes(data[:at] + older_save(path)[at:])
        return any(begin < at < end for begin, end, _ in record_ends(path).values())
    return True


def first_storage(path):
    """Where one storage is all of the newer save. Before that, where data.pkl does not differ, the
    file is the older one with one damaged record, and nothing in it says otherwise."""
    ends = record_ends(path).items()
    return min(behind for name, (begin, end, behind) in ends
               if name.startswith("data/") and begin < end)


def older_save(path):
    """Of the same shapes, with other bytes in every storage, under right CRCs."""
    prefix, records = h.split_zip(path)
    return h.join_zip(prefix, {name: bytes(byte ^ 0x5A for byte in data)
                               if name.startswith("data/") else data
                               for name, data in records.items()})


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
