#!/usr/bin/env python3
"""tests/field.py PROGRAM TRACES: checkpoint folders as they lie in the field.

A Trainer's folder with its own files, folders of Lightning and Accelerate, one level down, and
stage-3 folders whose model files of ranks above 0 are missing.
"""

import os
import shutil
import sys

from program_case import ProgramCase, run_tests


class Field(ProgramCase):
    def copy(self, name, folder):
        return shutil.copytree(self.recorded(name), self.place / folder)

    def digest(self, source, **how):
        return self.run_program(0, "digest", source, **how).stdout

    def lose(self, source, words):
        for path in source.rglob("*"):
            if words in path.name:
                path.unlink()
        return source

    def test_a_trainer_keeps_its_files(self):
        source, out = self.recorded("trainer_z2_dp2"), self.place / "checkpoint-3"
        result = self.run_program(0, "reshard", source, out, "--to", "dp=4,stage=3")
        self.assertIn("1 files, the target has 4 ranks", result.stderr)
        names = {n for n in os.listdir(source) if (source / n).is_file()} - {"latest"}
        self.assertEqual(set(os.listdir(out)), names | {"latest", "global_step3"})
        for name in names:
            self.assertEqual((out / name).read_bytes(), (source / name).read_bytes(), name)
        certificate = self.certificate(out)
        self.assertEqual(set(certificate["carried"]), names)
        self.assertEqual(len(certificate["not_fitting"]), 1)
        self.assertEqual(self.digest(out), self.digest(source))
        # Again into the same folder under another tag: the same files are no obstacle, others are.
        self.run_program(0, "reshard", source, out, "--to", "dp=2", "--tag-out", "again")
        (out / "trainer_state.json").write_text("{}")
        more = ["reshard", source, out, "--to", "dp=2", "--tag-out", "third"]
        result = self.run_program(2, *more)
        self.assertIn("trainer_state.json", result.stderr)
        self.assertFalse((out / "third").exists())
        self.run_program(0, *more, "--no-side-files")
        self.assertEqual((out / "trainer_state.json").read_text(), "{}")
        self.run_program(0, *more, "--overwrite")
        self.assertEqual(
            (out / "trainer_state.json").read_bytes(), (source / "trainer_state.json").read_bytes()
        )

    def test_random_states_that_fit(self):
        source = self.copy("trainer_z2_dp2", "source")
        (source / "rng_state.pth").unlink()
        for rank in range(4):
            (source / f"rng_state_{rank}.pth").write_text(str(rank))
        result = self.run_program(0, "reshard", source, self.place / "out", "--to", "dp=4")
        self.assertEqual(result.stderr, "")
        self.assertNotIn("not_fitting", self.certificate(self.place / "out"))

    def test_other_folders_get_nothing(self):
        source = self.copy("z1_bf16_dp2", "source")
        (source / "notes.txt").write_text("mine")
        self.run_program(0, "reshard", source, self.place / "out", "--to", "dp=4")
        self.assertEqual(set(os.listdir(self.place / "out")), {"latest", "global_step3"})

    def test_one_level_down(self):
        expected = self.digest(self.recorded("z1_bf16_dp2"))
        self.copy("z1_bf16_dp2", "runs/epoch=0-step=3.ckpt")
        result = self.run_program(0, "digest", self.place / "runs")
        self.assertEqual(result.stdout, expected)
        self.assertIn("one level down", result.stderr)
        self.copy("z1_bf16_dp2", "runs/epoch=1-step=6.ckpt")
        result = self.run_program(2, "digest", self.place / "runs")
        self.assertIn("epoch=0-step=3.ckpt", result.stderr)
        self.assertIn("epoch=1-step=6.ckpt", result.stderr)
        # Accelerate: the tag is called pytorch_model, its own files lie beside it.
        folder = self.copy("z1_bf16_dp2", "accelerate/checkpoint_0")
        (folder / "global_step3").rename(folder / "pytorch_model")
        (folder / "latest").write_text("pytorch_model")
        for name in ("random_states_0.pkl", "random_states_1.pkl", "scheduler.bin"):
            (folder / name).write_text(name)
        self.assertEqual(self.digest(self.place / "accelerate"), expected)
        out = self.place / "out"
        self.run_program(0, "reshard", self.place / "accelerate", out, "--to", "dp=3")
        self.assertEqual((out / "scheduler.bin").read_text(), "scheduler.bin")
        self.assertIn("2 files, the target has 3", self.certificate(out)["not_fitting"][0])

    def test_model_files_of_stage_3(self):
        whole = self.recorded("z3_bf16_dp3")
        source = self.lose(self.copy("z3_bf16_dp3", "source"), "zero_pp_rank_1_mp_rank_00_model")
        self.lose(source, "zero_pp_rank_2_mp_rank_00_model")
        self.assertEqual(self.digest(source), self.digest(whole))
        ours, theirs = self.place / "ours", self.place / "theirs"
        result = self.run_program(0, "reshard", source, ours, "--to", "dp=3")
        self.assertIn("ranks 1, 2", result.stderr)
        self.assertIn("ranks 1, 2", self.certificate(ours)["skipped"][0])
        self.run_program(0, "reshard", whole, theirs, "--to", "dp=3")
        for path in theirs.rglob("*.pt"):
            self.assertEqual(path.read_bytes(), (ours / path.relative_to(theirs)).read_bytes())
        self.run_program(0, "convert", source, self.place / "fp32", "--to", "fp32")
        result = self.run_program(2, "convert", source, self.place / "u", "--to", "universal")
        self.assertIn("makes them anew", result.stderr)
        self.assertIn("INCOMPLETE", self.run_program(1, "verify", source).stdout)

    def test_model_files_that_are_needed(self):
        for name, lost in (
            ("z3_bf16_dp2_frozen", "zero_pp_rank_1_mp_rank_00_model"),
            ("autoep_z3_ep2_dp4", "zero_pp_rank_3_mp_rank_00_model"),
            ("z3_bf16_dp3", "zero_pp_rank_0_mp_rank_00_model"),
        ):
            source = self.lose(self.copy(name, name), lost)
            self.assertIn("ncomplete", self.run_program(2, "digest", source).stderr)
        source = self.lose(self.copy("z3_bf16_dp3", "both"), "zero_pp_rank_1_mp_rank_00_model")
        self.lose(source, "bf16_zero_pp_rank_2")
        self.assertIn("ncomplete", self.run_program(2, "digest", source).stderr)


    def test_shards_of_several_nodes(self):
        whole = self.recorded("z3_bf16_dp3")
        nodes = []
        for rank in range(3):
            node = self.copy("z3_bf16_dp3", f"node{rank}")
            for other in {0, 1, 2} - {rank}:
                self.lose(node, f"pp_rank_{other}_")
            nodes.append(node)
        flags = ["--also", nodes[1], "--also", nodes[2]]
        for verb in ("digest", "inspect"):
            found = self.run_program(0, verb, nodes[0], *flags).stdout
            expected = self.run_program(0, verb, whole).stdout
            self.assertEqual(found.replace(str(nodes[0]), str(whole)), expected)
        self.assertIn("COMPLETE", self.run_program(0, "verify", nodes[0], *flags).stdout)
        tags = [next(node.glob("global_step*")) for node in nodes]
        parts = ["--also", tags[1], "--also", tags[2]]
        self.assertEqual(self.digest(whole), self.run_program(0, "digest", tags[0], *parts).stdout)
        ours, theirs = self.place / "ours", self.place / "theirs"
        self.run_program(0, "reshard", nodes[0], ours, "--to", "dp=2", *flags)
        self.run_program(0, "reshard", whole, theirs, "--to", "dp=2")
        for path in theirs.rglob("*.pt"):
            self.assertEqual(path.read_bytes(), (ours / path.relative_to(theirs)).read_bytes())
        self.run_program(2, "digest", nodes[0], *flags[:2])
        self.run_program(2, "digest", nodes[0], "--also", self.place / "nowhere")
        result = self.run_program(2, "reshard", nodes[0], nodes[2] / "x", "--to", "dp=2", *flags)
        self.assertIn("inside it", result.stderr)
        # A file that lies on two nodes is one file, or two saves are mixed.
        name = "zero_pp_rank_0_mp_rank_00_model_states.pt"
        shutil.copy(tags[0] / name, tags[1] / name)
        self.assertEqual(self.digest(whole), self.run_program(0, "digest", nodes[0], *flags).stdout)
        data = bytearray((tags[1] / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tags[1] / name).write_bytes(data)
        result = self.run_program(2, "digest", nodes[0], *flags)
        self.assertIn("Two folders hold different files", result.stderr)


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
