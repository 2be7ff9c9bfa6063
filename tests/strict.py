#!/usr/bin/env python3
"""tests/strict.py PROGRAM TRACES: what a checkpoint says of its split must speak of what it holds.

  patterns   one that matches no name makes the source SUSPECT, unless --no-strict
  alias      ds_to_universal asks for --inject_missing_state where DeepSpeed does
  targets    what no file could say is refused before a byte is written
  universal  a folder that lacks a state, or whose stacks count other experts, is refused
  run        whether the degrees and stage of a DeepSpeed config are the checkpoint's

Recorded checkpoints with one edit each. Not verified here: that DeepSpeed raises what is named.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import hostile as h
from program_case import CONFIG, ProgramCase, run_tests

ROWS = b"parameter_with_row_parallelism_patterns"


def edit_pickle(path, edit):
    """Puts the pickle of a torch file through edit(bytes); the other records stay."""
    with zipfile.ZipFile(path) as archive:
        items = [(item.filename, archive.read(item)) for item in archive.infolist()]
    path.write_bytes(h.torch_zip(
        [(name, edit(data) if name.endswith("data.pkl") else data) for name, data in items]))


class Strict(ProgramCase):
    def renamed(self, key=ROWS, name=b"o_proj"):
        """A tensor-parallel checkpoint in which a pattern of that list has a wrong name."""
        folder, hits = h.ZeroFolder(self.recorded("autotp_z1_tp2_dp2")), 0
        for inside, (_, records) in folder.files.items():
            if "model_states" not in inside:
                continue
            data = records["data.pkl"]
            at = data.index(name, data.index(key))
            records["data.pkl"] = data[:at] + b"z" + data[at + 1 :]
            hits += 1
        self.assertEqual(hits, 2)
        return folder.write(self.place / "renamed")

    def test_a_pattern_for_nothing(self):
        source, target = self.renamed(), self.place / "universal" / "step"
        told = self.run_program(1, "verify", source)
        self.assertIn("SUSPECT", told.stdout)
        self.assertIn("z_proj", told.stdout)
        for arguments in (
            ["convert", source, target, "--to", "universal"],
            ["reshard", source, self.place / "out", "--to", "tp=1"],
            ["ds_to_universal", "--input_folder", source / "global_step3",
             "--output_folder", target],
        ):
            told = self.run_program(2, *arguments)
            self.assertIn("unused patterns", told.stderr)
            self.assertEqual(told.stderr.count("notice: doubtful"), 2)
            flag = "--no_strict" if arguments[0] == "ds_to_universal" else "--no-strict"
            self.assertIn(flag + " goes on", told.stderr)
        self.assertFalse(target.exists())
        self.run_program(0, "convert", source, target, "--to", "universal", "--no-strict")
        certificate = json.loads((target / "certificate.json").read_text())
        self.assertIn("match no parameter's name", json.dumps(certificate["inferred"]))
        self.run_program(0, "ds_to_universal", "--input_folder", source / "global_step3",
                         "--output_folder", self.place / "other" / "step", "--no_strict")

    def test_doubts_of_the_checkpoint_that_says_how_to_cut(self):
        like = self.renamed(b"vocabulary_parameter", b"lm_head")
        told = self.run_program(2, "reshard", self.recorded("autotp_tp2_to_tp1_dp2"),
                                self.place / "two", "--to", "tp=2", "--num-kv-heads", "2",
                                "--split-like", like)
        self.assertIn("renamed\" (--split-like): universal_checkpoint_info has", told.stderr)
        self.assertFalse((self.place / "two").exists())

    def test_mp_ranks_that_disagree_on_their_degrees(self):
        folder = h.ZeroFolder(self.recorded("autotp_z1_tp2_dp2"))
        records = folder.files["global_step3/mp_rank_01_model_states.pt"][1]
        records["data.pkl"], hits = re.subn(
            rb"(tp_degree(?:q.|r....)K)\x02", lambda found: found[1] + b"\x04", records["data.pkl"],
            flags=re.DOTALL,
        )
        self.assertGreater(hits, 0)
        told = self.run_program(2, "digest", folder.write(self.place / "degrees"))
        self.assertIn("disagree on their degrees (DeepSpeed: RuntimeError)", told.stderr)

    def test_strictness_changes_no_byte(self):
        source = self.recorded("autotp_uneven_tp3")
        for name, flags in (("strict", []), ("not", ["--no-strict"])):
            self.run_program(0, "convert", source, self.place / name / "step", "--to", "universal",
                             *flags)
        files = sorted((self.place / "strict").rglob("*"))
        self.assertGreater(len(files), 50)
        for path in files:
            if path.is_file():
                other = self.place / "not" / path.relative_to(self.place / "strict")
                self.assertEqual(path.read_bytes(), other.read_bytes(), path)

    def test_the_alias_asks_where_deepspeed_asks(self):
        for case, status in (("autotp_z1_tp2_dp2", 0), ("edited_lists_tp3", 0), ("z1_bf16_dp2", 2)):
            source = self.recorded(case)
            tag = (source / "latest").read_text()
            told = self.run_program(status, "ds_to_universal", "--input_folder", source / tag,
                                    "--output_folder", self.place / case / "step")
            if status:
                self.assertIn("Required universal_checkpoint_info state is missing", told.stderr)

    def test_the_alias_refuses_weights_alone(self):
        source = self.recorded("z1_bf16_dp2").parent / "fp32"
        self.run_program(2, "ds_to_universal", "--input_folder", source, "--output_folder",
                         self.place / "weights" / "step")


class Targets(ProgramCase):
    def refused(self, case, to, words, *flags):
        for verb in (["plan", "reshard"], ["reshard"]):
            told = self.run_program(2, *verb, self.recorded(case), self.place / "out", "--to", to,
                                    *flags)
            self.assertIn(words, told.stderr)
        self.assertFalse((self.place / "out").exists())

    def kept(self, case):
        source, target = self.recorded(case), self.place / "four"
        self.run_program(0, "reshard", source, target, "--to", "tp=4", "--num-kv-heads", "0")
        self.assertEqual(self.run_program(0, "digest", source).stdout,
                         self.run_program(0, "digest", target).stdout)

    def test_means_that_are_not_exact(self):
        self.refused("edited_average_tp2", "tp=3", "the mean over the ranks counts",
                     "--num-kv-heads", "0")
        self.kept("edited_average_tp2")

    def test_shares_that_an_older_entry_cannot_say(self):
        self.refused("edited_count_tp2", "tp=3", "no place for unequal widths",
                     "--num-kv-heads", "0")
        self.kept("edited_count_tp2")

    def test_autoep_at_stage_3_has_no_sequence_ranks(self):
        self.refused("autoep_z3_ep2_dp4", "dp=2,sp=2", "sequence parallelism at stage 3")
        self.refused("autoep_z1_ep2_dp2", "dp=1,sp=2,stage=3", "sequence parallelism at stage 3")


class Universal(ProgramCase):
    def folder(self):
        target = self.place / "universal"
        shutil.copytree(self.recorded("autoep_z1_ep2_dp2").parent / "universal", target)
        return target

    def stack(self, folder, state):
        return next(folder.rglob(f"model.layers.0.mlp.experts.w1/{state}.pt"))

    def test_a_moment_is_missing(self):
        folder = self.folder()
        self.stack(folder, "exp_avg").unlink()
        self.assertIn("INCOMPLETE", self.run_program(1, "verify", folder).stdout)
        told = self.run_program(2, "reshard", folder, self.place / "out", "--to", "ep=1")
        self.assertIn("experts.w1/exp_avg.pt", told.stderr)

    def test_a_step_is_missing(self):
        folder = self.folder()
        self.stack(folder, "step").unlink()
        self.assertIn("INCOMPLETE", self.run_program(1, "verify", folder).stdout)
        told = self.run_program(2, "digest", folder)
        self.assertIn("experts.w1/step.pt", told.stderr)
        (folder / "certificate.json").write_text("{}")  # excuses nothing
        self.run_program(2, "digest", folder)
        (folder / "certificate.json").unlink()
        for arguments in (["inspect", folder], ["show", folder, "lm_head.weight"],
                          ["convert", folder, self.place / "fp32", "--to", "fp32"]):
            self.assertIn("step.pt\" is missing", self.run_program(0, *arguments).stderr)

    def test_a_folder_of_ours_lacks_a_file(self):
        target = self.place / "made" / "step"
        self.run_program(0, "convert", self.recorded("autoep_z1_ep2_dp2"), target, "--to",
                         "universal")
        self.stack(target, "step").unlink()
        self.assertIn("INCOMPLETE", self.run_program(1, "verify", target).stdout)
        self.assertIn("step.pt", self.run_program(2, "digest", target).stderr)

    def test_a_stack_counts_other_experts(self):
        folder = self.folder()

        def other_count(data):
            at = data.index(b"K\x08", data.index(b"ep_num_experts"))
            return data[: at + 1] + b"\x04" + data[at + 2 :]

        edit_pickle(self.stack(folder, "fp32"), other_count)
        told = self.run_program(2, "reshard", folder, self.place / "out", "--to", "ep=1")
        self.assertIn("DeepSpeed: AssertionError", told.stderr)
        self.assertIn("8 experts", told.stderr)
        self.assertIn("CORRUPT", self.run_program(1, "verify", folder).stdout)


class Run(ProgramCase):
    def config(self, **keys):
        path = self.place / "ds_config.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True},
                                    **keys}))
        return path

    def experts(self, size):
        return {"expert_parallel": {"enabled": True, "autoep_size": size}}

    def answer(self, source, world, *flags, **keys):
        """What inspect says of a regular load in a run of that config."""
        command = [CONFIG.program, "inspect", source, "--json", "--quiet", "--to-config",
                   self.config(**keys), "--world", world, *flags]
        told = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        answer = json.loads(told.stdout.splitlines()[-1])
        self.assertEqual(answer["kind"], "regular_load")
        self.assertEqual(told.returncode, 0 if answer["fits"] else 1)
        return answer

    def differs(self, words, *arguments, **keys):
        answer = self.answer(*arguments, **keys)
        self.assertFalse(answer["fits"])
        self.assertIn(words, " ".join(answer["differs"]))
        return answer

    def test_a_regular_load(self):
        source = self.recorded("autoep_z2_ep4_dp4")
        answer = self.answer(source, 4, **self.experts(4))
        self.assertTrue(answer["fits"])
        self.assertIn("optimizer and its parameter groups", answer["not_compared"])
        answer = self.differs("ep (autoep_size) 4 in the checkpoint, 2 in the run", source, 4,
                              **self.experts(2))
        self.assertIn("--to dp=4,ep=2,stage=2", answer["command"])
        self.differs("ZeRORuntimeException", source, 8, **self.experts(4))
        self.run_program(2, "inspect", source.parent / "universal", "--to-config",
                         self.config(), "--world", 4)

    def test_the_command_can_be_run(self):
        """As a shell reads it, from a folder with a blank in its name."""
        source = self.place / "it's saved here"
        shutil.copytree(self.recorded("autoep_z1_ep2_dp2"), source)
        answer = self.answer(source, 4, zero_optimization={"stage": 3}, **self.experts(4))
        words = shlex.split(answer["command"])
        self.assertEqual(words[:3], ["isoshard", "reshard", str(source)])
        out = self.place / "out"
        self.run_program(0, *[str(out) if word == "TARGET" else word for word in words[1:]])
        self.assertTrue(self.answer(out, 4, zero_optimization={"stage": 3},
                                    **self.experts(4))["fits"])

    def test_what_stands_in_the_way_of_a_reshard_is_said(self):
        answer = self.differs("tp 2 in the checkpoint, 4", self.recorded("autotp_z1_tp2_dp2"), 4,
                              tensor_parallel={"autotp_size": 4})
        self.assertEqual(answer["command"], "")
        self.assertIn("--num-kv-heads", answer["next"])
        self.assertIn("is refused as it stands", answer["next"])
        source = self.recorded("autotp_z1_tp2_dp2")
        for flag in ("--no-strict", "--allow-renamed"):
            self.assertIn(flag, self.answer(source, 2, flag)["command"])

    def test_stages_of_one_form(self):
        for stage, fits in ((2, True), (1, True), (0, False), (3, False)):
            answer = self.answer(self.recorded("z2_bf16_dp4"), 4,
                                 zero_optimization={"stage": stage})
            self.assertEqual(answer["fits"], fits)

    def test_what_no_reshard_mends(self):
        zero = {"zero_optimization": {"stage": 1}}
        for case, world, words, keys in (
            ("autoep_z2_ep4_dp4", 4, "AutoEP in the checkpoint, not enabled", {}),
            ("z2_bf16_dp4", 4, "AutoEP enabled in the run", self.experts(1)),
            ("autoep_z2_ep4_dp4", 3, "does not divide the experts", self.experts(3)),
            ("z2_bf16_dp4", 4, "bfloat16 in the checkpoint, float32", {"bf16": {"enabled": False}}),
            ("z2_bf16_dp4", 4, "BF16_Optimizer",
             {**zero, "data_types": {"grad_accum_dtype": "fp32"}}),
            ("z2_bf16_dp4", 4, "round_robin_gradients 0 in the checkpoint, 1",
             {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}),
            ("z3_bf16_dp3", 3, "sub_group_size",
             {"zero_optimization": {"stage": 3, "sub_group_size": 100}}),
            ("pipe_bf16_pp3_dp2", 6, "a pipeline at stage 2", {}),
            ("pipe_z0_bf16_pp2_dp2", 4, "KeyError", {"zero_optimization": {"stage": 0}}),
        ):
            answer = self.differs(words, self.recorded(case), world, **keys)
            self.assertEqual(answer["command"], "")
            self.assertIn("change the config", answer["next"])

    def test_spellings_of_a_config(self):
        one, two = self.recorded("z1_bf16opt_dp2"), self.recorded("z1_bf16_dp2")
        for summed in ("fp32", "float32", "float", "torch.float32"):
            for device in (None, {"device": "none"}, {"device": "nvme"}, {"device": "cpu"}):
                keys = {"zero_optimization": {"stage": 1, "offload_optimizer": device},
                        "data_types": {"grad_accum_dtype": summed}}
                on = not device or device["device"] != "cpu"
                self.assertEqual(self.answer(one, 2, **keys)["fits"], on, keys)
                self.assertEqual(self.answer(two, 2, **keys)["fits"], not on, keys)
        self.differs("float32 in the checkpoint, float16", self.recorded("z0_fp32_dp2"), 2,
                     zero_optimization={"stage": 0}, bf16={}, fp16={"enabled": True})
        for odd in ("auto", {"enabled": "auto"}):
            self.assertIn("bf16 and fp16", " ".join(self.answer(two, 2, bf16=odd)["not_compared"]))
        answer = self.answer(self.recorded("z3_bf16_dp3"), 3,
                             zero_optimization={"stage": 3, "sub_group_size": 1e300})
        self.assertIn("sub_group_size", answer["not_compared"])

    def test_configs_and_worlds_beyond_measure(self):
        source = self.recorded("z2_bf16_dp4")
        deep = self.place / "deep.json"
        deep.write_text('{"zero_optimization":' + "[" * 200_000 + "]" * 200_000 + "}")
        told = self.run_program(2, "inspect", source, "--to-config", deep, "--world", 4)
        self.assertIn("nested too deeply", told.stderr)
        self.run_program(2, "inspect", source, "--to-config", self.config(), "--world", 2**31 - 1)
        answer = self.answer(source, 1_000_000)
        self.assertIn("not planned here", answer["next"])

    def test_a_missing_file_of_experts_does_not_fit(self):
        source = self.place / "lost"
        shutil.copytree(self.recorded("moe_z0_ep2_dp4"), source)
        next(source.rglob("expp_rank_1_*")).unlink()
        self.run_program(2, "inspect", source, "--world", 4, "--to-config",
                         self.config(zero_optimization={"stage": 0}))

    def test_tensor_parallel_ranks_of_a_pipeline_stay(self):
        source, zero = self.recorded("pipe_tp2_pp2_dp2"), {"zero_optimization": {"stage": 1}}
        self.assertTrue(self.answer(source, 8, **zero)["fits"])
        out = self.place / "out"
        self.run_program(0, "reshard", source, out, "--to-config", self.config(**zero), "--world",
                         4)
        self.assertIn("tp=2,pp=2", json.loads(
            self.run_program(0, "inspect", out, "--json").stdout.splitlines()[0])["to"])

    def test_configs_that_leave_the_run_in_doubt(self):
        source = self.recorded("autoep_z2_ep4_dp4")
        for entry, keys in (
            ("expert_parallel.enabled", {"expert_parallel": {"enabled": "true"}}),
            ("expert_parallel", {"expert_parallel": [1]}),
            ("tensor_parallel", {"tensor_parallel": 4}),
            ("pipeline", {"pipeline": "auto"}),
        ):
            told = self.run_program(2, "inspect", source, "--to-config", self.config(**keys),
                                    "--world", 4)
            self.assertIn(f"entry:    {entry}\n", told.stderr)
            self.assertEqual(told.stdout, "")
        self.run_program(2, "inspect", source, "--world", 4)
        told = self.run_program(2, "inspect", source, "--to-config", self.config())
        self.assertIn("--world N", told.stderr)

    def test_autoep_of_the_config_counts(self):
        source = self.recorded("autoep_z1_ep2_dp2")
        out = self.place / "out"
        self.run_program(0, "reshard", source, out, "--to-config", self.config(**self.experts(4)),
                         "--world", 4)
        told = self.run_program(0, "inspect", out, "--json")
        self.assertIn("ep=4", json.loads(told.stdout.splitlines()[0])["to"])
        told = self.run_program(2, "reshard", source, self.place / "three", "--to-config",
                                self.config(**self.experts(3)), "--world", 6)
        self.assertIn("8 experts", told.stderr)
        told = self.run_program(2, "reshard", self.recorded("moe_z1_ep2_dp4"),
                                self.place / "native", "--to-config",
                                self.config(**self.experts(4)), "--world", 4)
        self.assertIn("isoshard migrate", told.stderr)


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
