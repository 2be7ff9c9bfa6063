#!/usr/bin/env python3
"""tests/errata.py PROGRAM TRACES: what isoshard does where docs/deepspeed_errata.md says that
DeepSpeed's source does otherwise and no recorded checkpoint shows it. Tests are named by row.

Recorded checkpoints with one edit each. Not verified here: what DeepSpeed does.
"""

import json
import sys

import hostile as h
from program_case import ProgramCase, run_tests


class Errata(ProgramCase):
    def edited(self, name, edit, only):
        """A recorded checkpoint whose files with `only` in their paths have a changed pickle."""
        folder = h.ZeroFolder(self.recorded(name))
        hits = 0
        for inside, (_, records) in folder.files.items():
            if only in inside:
                before, records["data.pkl"] = records["data.pkl"], edit(records["data.pkl"])
                hits += before != records["data.pkl"]
        self.assertGreater(hits, 0)
        return folder.write(self.place / "source")

    def tensors(self, folder):
        header, data = self.safetensors(folder)
        return {
            name: data[slice(*entry["data_offsets"])]
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def test_row_3_frozen_parameters_of_stage_1(self):
        source, stage1 = self.recorded("z3_bf16_dp2_frozen"), self.place / "stage1"
        self.run_program(0, "reshard", source, stage1, "--to", "dp=2,stage=1")
        self.run_program(0, "convert", source, self.place / "a", "--to", "fp32")
        self.run_program(0, "convert", stage1, self.place / "b", "--to", "fp32")
        expected = self.tensors(self.place / "a")
        self.assertIn("blocks.0.norm.weight", expected)
        self.assertEqual(self.tensors(self.place / "b"), expected)

    def smaller_shape(self, data):
        """The first torch.Size behind param_shapes loses an element of its last dimension."""
        at = data.index(b"Size", data.index(b"param_shapes"))
        while not (data[at : at + 1] == b"K" and data[at + 1] > 1):
            at += 1
        end = at
        while data[end : end + 1] == b"K":
            end += 2
        return data[: end - 1] + bytes([data[end - 1] - 1]) + data[end:]

    def test_row_10_shapes_that_are_too_small_at_stage_3(self):
        source = self.edited("z3_fp32_dp2_subgroups", self.smaller_shape, "model_states")
        refused = self.run_program(2, "digest", source).stderr
        self.assertIn("A partition has the wrong length", refused)

    def test_row_11_a_shortfall_below_twice_the_ranks(self):
        source = self.edited("z1_bf16_dp2", self.smaller_shape, "model_states")
        refused = self.run_program(2, "digest", source).stderr
        self.assertIn("A partition has the wrong length", refused)

    def test_row_20_elastic_checkpoints(self):
        def edit(data):
            key = h.text("base_optimizer_state")
            at = data.index(key) + len(key)
            at += 2 if data[at : at + 1] == b"q" else 5  # BINPUT or LONG_BINPUT
            return data[:at] + b"]" + h.text("the state as it was") + data[at:]

        refused = self.run_program(
            2, "digest", self.edited("z1_bf16_dp2", edit, "optim_states")
        ).stderr
        self.assertIn("elastic_checkpoint", refused)

    def test_row_25_a_slash_at_the_end_and_patterns_in_paths(self):
        odd = self.place / "a [b]*?{c}"
        odd.mkdir()
        source = str(h.ZeroFolder(self.recorded()).write(odd / "save")) + "/"
        target = str(odd / "out") + "/"
        self.run_program(0, "convert", source, target, "--to", "universal")
        self.assertEqual((odd / "latest_universal").read_text(), "out")
        self.assertFalse((odd / "out" / "latest_universal").exists())
        names = sorted(each.name for each in odd.iterdir())
        self.assertEqual(names, ["latest_universal", "out", "save"])

    def test_row_26_the_degree_that_nothing_records(self):
        source = self.recorded("z2_bf16_dp4")
        told = json.loads(
            self.run_program(0, "inspect", source, "--sp", "2", "--json").stdout.splitlines()[0]
        )
        self.assertEqual(told["topology"], "dp2.sp2")
        digests = [
            self.run_program(0, "digest", source, *flags).stdout for flags in ([], ["--sp", "2"])
        ]
        self.assertEqual(digests[0], digests[1])

    def test_row_53_stages_that_hold_different_values_of_a_tied_weight(self):
        folder = h.ZeroFolder(self.recorded("pipe_z1_pp2_dp2_tied"))
        [records] = [
            records
            for inside, (_, records) in folder.files.items()
            if inside.endswith("zero_pp_rank_0_mp_rank_01_optim_states.pt")
        ]
        for name, data in records.items():
            if name.startswith("data/") and len(data) > 1000:  # of the flat tensors, the first bits
                records[name] = bytes([data[0] ^ 1]) + data[1:]
        source = folder.write(self.place / "source")
        for command in (
            ["convert", source, self.place / "out", "--to", "universal"],
            ["reshard", source, self.place / "out", "--to", "pp=1"],
        ):
            text = self.run_program(2, *command).stderr
            self.assertIn("in 3 of 3 replicas", text)
            self.assertFalse((self.place / "out").exists())


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
