#!/usr/bin/env python3
"""tests/expert_groups.py PROGRAM TRACES: experts that fill several groups of the optimizer.

`moe2_groups_*` are DeepSpeed's, with max_group_size 330; smaller sizes stand for large models. That
DeepSpeed loads what is written: scripts/peer.py --parallel, "in groups".
"""

import json
import re
import shutil
import struct
import sys

import hostile as h
from program_case import ProgramCase, run_tests

NATIVE, AUTOEP, GATED = "moe2_groups_z1_ep2_dp4", "autoep_z1_ep2_dp2", "moe_gated_z1_ep2_dp2"
SIZE = "--moe-max-group-size"


class Groups(ProgramCase):
    def reshard(self, source, to, *flags):
        target = self.place / f"{source.name} to {to}"
        self.run_program(0, "reshard", source, target, "--to", to, *flags)
        self.assertEqual(self.digest(source), self.digest(target))
        return target

    def digest(self, source):
        return self.run_program(0, "digest", source).stdout

    def sizes(self, source):
        """Parameters by group of experts, in order."""
        lines = self.run_program(0, "inspect", source, "--json").stdout.splitlines()[1:]
        groups = [row["group"] for row in map(json.loads, lines) if "experts" in row["name"]]
        return [groups.count(group) for group in sorted(set(groups))]

    def migrated(self, *flags):
        target = self.place / "migrated" / "step"
        names = h.Path(__file__).resolve().parent.parent / "traces" / "names" / "moe_gated.json"
        self.run_program(0, "migrate", self.recorded(GATED), target, "--to", "autoep", "--names",
                         names, *flags)
        return target

    def test_the_rule_must_give_the_sources_groups(self):
        for flags in ([], [SIZE, "500"]):
            told = self.run_program(2, "reshard", self.recorded(NATIVE), self.place / "out", "--to",
                                    "ep=4", *flags)
            self.assertIn(SIZE, told.stderr)
        self.assertFalse((self.place / "out").exists())

    def test_a_universal_form_of_native_experts_does_not_say_its_degree(self):
        universal = self.place / "universal" / "step"
        self.run_program(0, "convert", self.recorded(NATIVE), universal, "--to", "universal")
        for to in ("ep=1", "dp=2"):
            told = self.run_program(2, "reshard", universal, self.place / "out", "--to", to)
            self.assertIn(SIZE, told.stderr)
        one = self.reshard(universal, "ep=1", SIZE, "330")
        self.assertEqual(self.sizes(one)[:2], [6, 6])

    def test_an_ep_that_no_experts_divide_is_named_first(self):
        told = self.run_program(2, "reshard", self.recorded(NATIVE), self.place / "out", "--to",
                                "ep=3,dp=3")
        self.assertIn("cannot be shared evenly", told.stderr)

    def test_every_degree_has_its_own(self):
        source = self.recorded(NATIVE)
        one = self.reshard(source, "ep=1", SIZE, "330")
        self.assertEqual(self.sizes(one)[:2], [6, 6])
        two = self.reshard(one, "ep=2", SIZE, "330")
        self.assertEqual(self.sizes(two), self.sizes(source))
        # a rank's 2 · 2 tensors of an expert fill a group amid the second expert
        self.assertEqual(self.sizes(source), [12, 12, 8])

    def test_a_large_single_group_is_split_where_a_rank_holds_more(self):
        one = self.reshard(self.recorded(AUTOEP), "ep=1", SIZE, "10000")
        self.assertEqual(self.sizes(one), [3, 3])
        self.assertEqual(self.sizes(self.reshard(one, "ep=4,dp=4", SIZE, "10000")), [6])

    def test_what_migrate_writes_goes_to_every_degree(self):
        source = self.migrated(SIZE, "5000")
        self.assertEqual(self.sizes(source), [1] * 6)
        for to, sizes in (("ep=1", [1] * 6), ("ep=2,dp=2", [3, 3]), ("ep=4,dp=4", [6])):
            self.assertEqual(self.sizes(self.reshard(source, to, SIZE, "5000")), sizes)

    def test_shares_that_do_not_divide(self):
        three = self.reshard(self.recorded(AUTOEP), "ep=3,dp=3", "--beyond-deepspeed")
        one = self.reshard(three, "ep=1,dp=1", SIZE, "5000")
        self.assertEqual(self.sizes(one), [1] * 6)
        told = self.run_program(2, "reshard", one, self.place / "out", "--to", "ep=3,dp=3",
                                "--beyond-deepspeed")
        self.assertIn("several optimizer groups", told.stderr)

    def test_settings_that_differ_between_experts(self):
        folder = h.ZeroFolder(self.recorded("moe2_groups_ep2_to_ep1_dp2"))
        old, new = b"G" + struct.pack(">d", 0.01), b"G" + struct.pack(">d", 0.02)
        for inside, (_, records) in folder.files.items():
            if "optim_states" in inside:
                data = records["data.pkl"]
                at = [found.start() for found in re.finditer(re.escape(old), data)][4]
                records["data.pkl"] = data[:at] + new + data[at + len(new) :]
        source = folder.write(self.place / "source")
        told = self.run_program(2, "reshard", source, self.place / "out", "--to", "ep=2,dp=2",
                                SIZE, "330")
        self.assertIn("different settings", told.stderr)

    def test_a_scheduler_that_counts_groups(self):
        folder = h.ZeroFolder(self.recorded(NATIVE))
        rates = b"}" + h.text("base_lrs") + b"](" + b"K\x01" * 4 + b"es"
        for inside, (_, records) in folder.files.items():
            if inside.endswith("/mp_rank_00_model_states.pt"):
                records["data.pkl"], hits = re.subn(
                    rb"(lr_scheduler(?:q.|r....))N", lambda found: found[1] + rates,
                    records["data.pkl"], flags=re.DOTALL)
                self.assertEqual(hits, 1)
        source = folder.write(self.place / "source")
        told = self.run_program(2, "reshard", source, self.place / "out", "--to", "ep=1", SIZE,
                                "330")
        self.assertIn('lr_scheduler "base_lrs"', told.stderr)
        self.run_program(0, "reshard", source, self.place / "same", "--to", "dp=2")

    def test_convert_says_where_deepspeed_leaves_experts_out(self):
        for size, words in (("10000", "up to 3 optimizer groups, this form has 2"), ("20000", "")):
            told = self.run_program(0, "convert", self.recorded(AUTOEP), self.place / size / "step",
                                    "--to", "universal", SIZE, size).stderr
            self.assertEqual(words in told and bool(words), bool(words), told)
            self.assertEqual("optimizer groups" in told, bool(words))

    def test_a_state_of_the_only_stack_of_a_group(self):
        folder = self.place / "copy"
        shutil.copytree(self.migrated(SIZE, "5000"), folder)
        for name in ("MANIFEST.json", "certificate.json"):
            (folder / name).unlink()
        self.assertIn("COMPLETE", self.run_program(0, "verify", folder).stdout)
        (folder / "zero" / "model.layers.0.mlp.experts.w1" / "exp_avg.pt").unlink()
        self.assertIn("INCOMPLETE", self.run_program(1, "verify", folder).stdout)


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
