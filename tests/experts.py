#!/usr/bin/env python3
"""tests/experts.py PROGRAM TRACES: metadata of experts that does not hold is refused by name, with
the error that DeepSpeed raises there. Recorded AutoEP checkpoints with one edit each.

Not verified here: that DeepSpeed raises it.
"""

import re
import sys

import hostile as h
from program_case import ProgramCase, run_tests

MEMO = rb"(?:q.|r....)"  # BINPUT, LONG_BINPUT
Z1, Z3 = "autoep_z1_ep2_dp2", "autoep_z3_ep2_dp4"
MODEL, OPTIM = "model_states", "optim_states"
# what, recording, files, pattern, what follows its group instead, words of the message
EDITS = [
    ("no metadata", Z1, MODEL, b"ds_autoep_layers", b"ds_autoep_layerz", "RuntimeError"),
    ("a field missing", Z1, MODEL, b"num_local_experts", b"num_local_expertz",
     "lacks a field (DeepSpeed: RuntimeError)"),
    ("no module path", Z1, MODEL, b"module_path", b"module_patz", "RuntimeError"),
    ("no experts", Z1, MODEL, b"(num_local_experts" + MEMO + b")K.", b"K\x00", "RuntimeError"),
    ("counts that differ", Z1, MODEL, b"(num_local_experts" + MEMO + b")K.", b"K\x03",
     "RuntimeError"),
    ("another size", Z1, MODEL, b"(\\x07\\x00\\x00\\x00ep_size" + MEMO + b")K.", b"K\x04",
     "RuntimeError"),
    ("a placement of version 2", Z1, MODEL, b"(version" + MEMO + b")K.", b"K\x02",
     "placement of experts is invalid (DeepSpeed: RuntimeError)"),
    ("an expert twice", Z1, MODEL, b"(experts" + MEMO + b"]" + MEMO + b"\\()K\\x00K\\x01",
     b"K\x01K\x01", "each expert below 8 once"),
    ("an expert out of range", Z1, MODEL, b"(experts" + MEMO + b"]" + MEMO + b"\\()K\\x00",
     b"K\x09", "each expert below 8 once"),
    ("a rank out of range", Z1, MODEL, b"(rank" + MEMO + b")K\\x00", b"K\x02",
     "each rank below 2 once"),
    ("a layer twice", Z1, MODEL, b"(moe_layer_id" + MEMO + b")K\\x00", b"K\x01",
     "stands twice (DeepSpeed: RuntimeError)"),
    ("another partition count", Z1, OPTIM, b"(partition_count" + MEMO + b"]" + MEMO + b"\\(K.)K.",
     b"K\x02", "partition group does not fit"),
    ("stage 3: another expert rank", Z3, "pp_rank_1_mp_rank_00_model", b"(ep_rank" + MEMO + b")K.",
     b"K\x00", "place among the ranks (DeepSpeed: RuntimeError)"),
    ("stage 3: a placement of its own", Z3, "pp_rank_2_mp_rank_00_model",
     b"(experts" + MEMO + b"]" + MEMO + b"\\()K\\x00K\\x01", b"K\x01K\x00",
     "Ranks disagree on the layers of experts"),
    ("stage 3: another replica", Z3, "pp_rank_2_mp_rank_00_model",
     b"(expert_data_parallel_rank" + MEMO + b")K.", b"K\x00", "place among the ranks"),
    ("stage 3: another format", Z3, "pp_rank_0_mp_rank_00_model", b"zero3_partitioned",
     b"zero3_partitionez", "NotImplementedError"),
    ("stage 3: another format version", Z3, "pp_rank_0_mp_rank_00_model",
     b"(checkpoint_format_version" + MEMO + b")K.", b"K\x02", "NotImplementedError"),
    ("stage 3: other ranks", Z3, "pp_rank_0_mp_rank_00_optim",
     b"(partition_ranks" + MEMO + b"]" + MEMO + b"\\(K\\x00K\\x01K\\x02)K\\x03", b"K\x02",
     "The ranks that share a sub-group"),
    ("stage 3: no partition groups", Z3, OPTIM, b"ds_zero_partition_groups",
     b"ds_zero_partition_groupz", "partition group does not fit"),
    ("stage 3: another count", Z3, "pp_rank_3_mp_rank_00_optim",
     b"(partition_count" + MEMO + b")K\\x04", b"K\x03", "partition count"),
]


class Experts(ProgramCase):
    def test_metadata(self):
        for number, (what, case, only, pattern, new, words) in enumerate(EDITS):
            with self.subTest(what):
                folder, hits = h.ZeroFolder(self.recorded(case)), 0
                for inside, (_, records) in folder.files.items():
                    if only not in inside or "_expert_" in inside:
                        continue
                    records["data.pkl"], count = re.subn(
                        pattern,
                        lambda found: b"".join(found.groups()) + new,
                        records["data.pkl"],
                        count=1,
                        flags=re.DOTALL,
                    )
                    hits += count
                self.assertGreater(hits, 0)
                source = folder.write(self.place / f"source{number}")
                target = self.place / "target"
                self.assertIn(words, self.run_program(2, "digest", source).stderr)
                self.run_program(2, "convert", source, target, "--to", "universal")
                self.run_program(2, "reshard", source, target, "--to", "ep=1")
                self.assertFalse(target.exists())

    def test_the_place_of_a_folded_rank(self):
        for key in ("tp_size", "tp_rank", "ep_size", "ep_rank", "etp_size", "etp_rank",
                    "zero_partition_rank", "zero_partition_count"):
            with self.subTest(key):
                folder, inside = h.ZeroFolder(self.recorded("autoep_folded_tp2_ep2_dp2")), OPTIM
                records = next(r for name, (_, r) in folder.files.items() if inside in name)
                records["data.pkl"], hits = re.subn(
                    rb"(folding.*?" + key.encode() + MEMO + rb"K).",
                    lambda found: found[1] + b"\x07",
                    records["data.pkl"],
                    count=1,
                    flags=re.DOTALL,
                )
                self.assertEqual(hits, 1)
                source = folder.write(self.place / key)
                told = self.run_program(2, "digest", source).stderr
                self.assertIn(key, told)

    def test_the_family_of_a_folded_file(self):
        for old, new in ((b"zero_optimizer_state", b"zero_optimizer_statf"),
                         (b"route_full_partition_dispatch", b"route_full_partition_dispatck"),
                         (b"tp_sharded", b"tp_shardee"), (b"per_family", b"per_famile")):
            with self.subTest(old):
                folder = h.ZeroFolder(self.recorded("autoep_folded_tp2_ep2_dp2"))
                folder.replace(old, new, "pp_rank_0_mp_rank_00_optim", 1)
                told = self.run_program(2, "digest", folder.write(self.place / new.decode()))
                self.assertIn(new.decode(), told.stderr)

    def test_another_format_of_stage_3_beyond_deepspeed(self):
        """All but the format's name says who holds what: the same bits as under its own name."""
        folder = h.ZeroFolder(self.recorded(Z3))
        folder.replace(b"zero3_partitioned", b"zero3_partitionez", "pp_rank_", 4)
        source = folder.write(self.place / "source")
        for name, path in (("theirs", self.recorded(Z3)), ("ours", source)):
            self.run_program(0, "reshard", path, self.place / name, "--to", "ep=4",
                             "--beyond-deepspeed")
            self.run_program(0, "convert", path, self.place / (name + " universal") / "step",
                             "--to", "universal", "--beyond-deepspeed")
        for kind in ("", " universal"):
            theirs, ours = (sorted((self.place / (name + kind)).rglob("*.pt"))
                            for name in ("theirs", "ours"))
            self.assertGreater(len(theirs), 7)
            for one, other in zip(theirs, ours, strict=True):
                if kind == "" or "model_states" not in one.name:  # those are copies of the source's
                    self.assertEqual(one.read_bytes(), other.read_bytes(), other)

    def test_a_list_that_is_none(self):
        folder = h.ZeroFolder(self.recorded(Z1))
        folder.replace(b"ds_autoep_layers", b"ds_autoep_layerz", "mp_rank_00_model_states", 1)
        folder.insert("autoep_layers", b"K\x01", "/mp_rank_00_model_states")
        result = self.run_program(2, "digest", folder.write(self.place / "source"))
        self.assertIn("not a list (DeepSpeed: RuntimeError)", result.stderr)

    def test_two_files_of_one_expert(self):
        folder = h.ZeroFolder(self.recorded(Z1))
        name = "global_step3/layer_0_expert_3_mp_rank_0{}_model_states.pt"
        prefix, records = folder.files[name.format(0)]
        folder.files[name.format(1)] = (prefix.replace("rank_00", "rank_01"), records)
        result = self.run_program(2, "digest", folder.write(self.place / "source"))
        self.assertIn("NotImplementedError", result.stderr)
        self.assertIn("layer_0_expert_3_mp_rank_01", result.stderr)

    def test_expert_files_at_stage_3_are_told(self):
        folder = h.ZeroFolder(self.recorded(Z3))
        model = folder.files["global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt"]
        name = "layer_0_expert_0_mp_rank_00_model_states"
        folder.files[f"global_step3/{name}.pt"] = (name, model[1])
        result = self.run_program(0, "digest", folder.write(self.place / "source"))
        self.assertIn("not read at stage 3", result.stderr)
        expected = self.run_program(0, "digest", self.recorded(Z3))
        self.assertEqual(result.stdout, expected.stdout)


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
