#!/usr/bin/env python3
"""tests/upstream.py PROGRAM TRACES: rows of DeepSpeed's own tests (docs/deepspeed_tests.md) that no
recording shows by itself. Recorded checkpoints with one edit each, and AutoEP of stage 3 at more
topologies.

Not verified here: that DeepSpeed raises what is named.
"""

import re
import sys

import hostile as h
from program_case import ProgramCase, run_tests

sys.path.insert(0, str(h.Path(__file__).resolve().parent.parent / "scripts"))
import compare_torch  # noqa: E402

MEMO = rb"(?:q.|r....)"  # BINPUT, LONG_BINPUT


class Upstream(ProgramCase):
    def digest(self, path):
        return self.run_program(0, "digest", path).stdout

    def refused(self, folder, words, *flags):
        source = folder.write(self.place / "source")
        for command in (["digest", source], ["reshard", source, self.place / "out", "--to", "dp=1"],
                        ["convert", source, self.place / "out" / "u", "--to", "universal"]):
            self.assertIn(words, self.run_program(2, *command, *flags).stderr)
        self.assertFalse((self.place / "out").exists())

    def test_inject_missing_state_allows_no_unsupported_layout(self):
        folder = h.ZeroFolder(self.recorded("autotp_z1_tp2_dp2"))
        key, reason = b"autotp_unsupported_parameter_patterns", h.text("of some unknown kind")
        for inside, (_, records) in folder.files.items():
            if "model_states" in inside:
                records["data.pkl"], hits = re.subn(
                    b"(" + key + MEMO + rb"\})(" + MEMO + b")",
                    lambda found: found[1] + found[2] + h.text("^model.norm.weight$") + reason
                    + b"s", records["data.pkl"], flags=re.DOTALL)
                self.assertEqual(hits, 1)
        source = folder.write(self.place / "source")
        for flags in ([], ["--inject_missing_state"]):
            told = self.run_program(2, "ds_to_universal", "--input_folder", source / "global_step3",
                                    "--output_folder", self.place / "out", *flags)
            self.assertIn("of some unknown kind", told.stderr)

    def test_stages_disagree_on_a_tied_shape(self):
        folder = h.ZeroFolder(self.recorded("pipe_z1_pp2_dp2_tied"))
        for inside, (_, records) in folder.files.items():
            if inside.endswith("mp_rank_01_model_states.pt"):
                data = records["data.pkl"]
                at = data.index(b"tied_modules.", data.index(b"param_shapes"))
                at = re.compile(rb"K.K.(?=\x86)", re.DOTALL).search(data, at).start()
                rows, columns = data[at + 1], data[at + 3]
                records["data.pkl"] = (data[:at] + b"K" + bytes([rows * columns]) + b"K\x01"
                                       + data[at + 4 :])
        self.refused(folder, "DeepSpeed: AssertionError")

    def test_a_pipeline_that_does_not_say_how_it_is_cut(self):
        folder = h.ZeroFolder(self.recorded("pipe_tp2_pp2_dp2"))
        folder.replace(b"universal_checkpoint_info", b"universal_checkpoint_infz", "mp_rank_")
        self.refused(folder, "universal_checkpoint_info")

    def test_two_model_files_without_degrees_are_tensor_parallel(self):
        folder = h.ZeroFolder(self.recorded("autotp_z1_tp2_dp2"))
        folder.replace(b"checkpoint_parallel_dimensions", b"checkpoint_parallel_dimensionz",
                       "mp_rank_", 2)
        # What is not the engine's is client state; without it the hyper section alone differs.
        found = self.digest(folder.write(self.place / "source")).splitlines()
        wanted = self.digest(self.recorded("autotp_z1_tp2_dp2")).splitlines()
        differ = {line.split()[1] for line, other in zip(found, wanted) if line != other}
        self.assertEqual(differ, {"root", "hyper"})

    def test_shards_that_lie_on_fewer_ranks_than_there_are(self):
        for old, new, words in (
            ("sub_group_size", "mics_shard_size", "MiCS"),
            ("sub_group_size", "zero_hpz_partition_size", "hpZ"),
        ):
            with self.subTest(new):
                folder = h.ZeroFolder(self.recorded("z3_fp32_dp2_subgroups"))
                folder.replace(h.text(old), h.text(new), "model_states", 2)
                self.refused(folder, words)

    def test_a_folded_rank_lacks_a_field(self):
        for key in (b"tp_rank", b"etp_rank", b"zero_partition_rank", b"family"):
            with self.subTest(key):
                folder = h.ZeroFolder(self.recorded("autoep_folded_tp2_ep2_dp2"))
                wrong = h.text(key[:-1] + b"z")
                name = "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
                records = folder.files[name]
                data = records[1]["data.pkl"]
                at = data.index(h.text(key), data.index(h.text("folding")))
                records[1]["data.pkl"] = data[:at] + wrong + data[at + len(wrong) :]
                self.refused(folder, key.decode())

    def test_experts_of_stage_3_on_other_ranks(self):
        """W4 ep 2 to W8 ep 2 and W4 ep 1; back the files are the recorded ones."""
        source = self.recorded("autoep_z3_ep2_dp4")
        for to in ("ep=2,dp=8", "ep=1,dp=4"):
            with self.subTest(to):
                there, back = self.place / to, self.place / (to + " back")
                self.run_program(0, "reshard", source, there, "--to", to)
                self.assertEqual(self.digest(there), self.digest(source))
                self.assertTrue(self.run_program(0, "verify", there).stdout.startswith("VERIFIED"))
                self.run_program(0, "reshard", there, back, "--to", "ep=2,dp=4")
                wrong = compare_torch.compare_paths(
                    str(source), str(back), [r"\['fp32_flat_groups'\]\[\d+\]$"], []).differences
                self.assertEqual([each for each in wrong if "json" not in str(each)], [])


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
