#!/usr/bin/env python3
"""tests/uneven_experts.py PROGRAM TRACES: an ep that does not divide the experts. Only with
--beyond-deepspeed; remainder first (8 experts on 3 ranks lie 3, 3, 2), as the files' placement
says; the state stays the same at every stage, in the universal form, and on the way back.

Not verified here: that DeepSpeed converts the stage-3 form (scripts/peer.py --parallel does).
"""

import re
import sys

import hostile as h
from program_case import ProgramCase, run_tests

sys.path.insert(0, str(h.Path(__file__).resolve().parent.parent / "scripts"))
import compare_torch  # noqa: E402

SOURCES = ("autoep_z0_ep2_dp4", "autoep_z1_ep2_dp2", "autoep_z3_ep2_dp4")
MEMO = rb"(?:q.|r....)"  # BINPUT, LONG_BINPUT
HELD = [[0, 1, 2], [3, 4, 5], [6, 7]]
STACK = "model.layers.1.mlp.experts.w2"  # [8, 16, 24]
BEYOND = "--beyond-deepspeed"


class UnevenExperts(ProgramCase):
    def digest(self, path):
        return self.run_program(0, "digest", path).stdout

    def same(self, expected, found, ignored=()):
        compared = compare_torch.compare_paths(str(expected), str(found), ignored)
        self.assertEqual(compared.differences, [])

    def uneven(self, source, stage):
        """The source at ep 3, dp 6, and the folder of its tag."""
        target = self.place / f"uneven{stage}"
        self.run_program(0, "reshard", source, target, "--to", f"ep=3,dp=6,stage={stage}", BEYOND)
        return target, target / "global_step3"

    def test_the_same_state_everywhere(self):
        for case in SOURCES:
            source, expected = self.recorded(case), self.digest(self.recorded(case))
            for stage in range(4):
                with self.subTest(f"{case} to stage {stage}"):
                    target, _ = self.uneven(source, stage)
                    self.assertEqual(self.digest(target), expected)
                    self.run_program(0, "verify", target)
                    self.run_program(0, "convert", target, self.place / "form", "--to",
                                     "universal")
                    self.assertEqual(self.digest(self.place / "form"), expected)
                    # Back at an ep that divides, the files are those of the direct way.
                    to = f"ep=4,dp=4,stage={stage}"
                    self.run_program(0, "reshard", target, self.place / "back", "--to", to)
                    self.run_program(0, "reshard", source, self.place / "direct", "--to", to)
                    self.same(self.place / "direct", self.place / "back")
                self.doCleanups()
                self.setUp()

    def test_every_rank_holds_what_its_place_says(self):
        """By definition: rank r's flat experts are rows of the whole stack, in the order HELD."""
        source = self.recorded("autoep_z1_ep2_dp2")
        self.run_program(0, "convert", source, self.place / "whole", "--to", "universal")
        whole = compare_torch.load(str(self.place / "whole" / "zero" / STACK / "exp_avg.pt"))
        rows = whole["param"].bits()
        size = len(rows) // 8
        _, folder = self.uneven(source, 1)
        found = {0: [], 1: [], 2: []}
        for rank in range(6):  # experts before data: rank r is expert-parallel rank r % 3
            file = next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
            held = compare_torch.load(str(file))["optimizer_state_dict"]
            group = held["param_slice_mappings"][1]
            if STACK not in group:
                continue
            start, count = (group[STACK].state[key] for key in ("start", "numel"))
            state = held["base_optimizer_state"]["state"][1]["exp_avg"]
            found[rank % 3].append(bytes(state.bits())[4 * start : 4 * (start + count)])
        for rank, ids in enumerate(HELD):
            expected = b"".join(bytes(rows[i * size : (i + 1) * size]) for i in ids)
            self.assertEqual(b"".join(found[rank]), expected, rank)

    def test_the_metadata(self):
        _, folder = self.uneven(self.recorded("autoep_z3_ep2_dp4"), 3)
        for rank in range(6):
            model = compare_torch.load(
                str(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"))
            held = HELD[rank % 3]
            for layer in model["ds_autoep_layers"]:
                self.assertEqual(layer["num_local_experts"], len(held))
                self.assertEqual([entry["experts"] for entry in layer["expert_placement"]["ranks"]],
                                 HELD)
                self.assertEqual((layer["ep_rank"], layer["global_expert_start"],
                                  layer["global_expert_end"]), (rank % 3, held[0], held[-1] + 1))
            shapes = {name: shape for group in model["param_shapes"]
                      for name, shape in group.items()}
            self.assertEqual(tuple(shapes[STACK]), (len(held), 16, 24))

    def test_a_universal_form_that_deepspeed_loads(self):
        """Stages 0 to 2: as from a run at ep=1, for the short metadata cannot say more."""
        source = self.recorded("autoep_z1_ep2_dp2")
        for stage in (0, 1, 2):
            target, _ = self.uneven(source, stage)
            one = self.place / f"one{stage}"
            self.run_program(0, "reshard", source, one, "--to", f"ep=1,dp=6,stage={stage}")
            forms = []
            for folder in (target, one):
                forms.append(self.place / f"form{stage}{len(forms)}")
                self.run_program(0, "convert", folder, forms[-1], "--to", "universal")
            self.same(*(form / "zero" for form in forms), [re.compile(r"\['name'\]$")])
            model = compare_torch.load(str(forms[0] / "mp_rank_00_model_states.pt"))
            for layer in model["ds_autoep_layers"]:
                self.assertEqual((layer["ep_size"], layer["num_local_experts"]), (1, 8))

    def test_weights_without_the_optimizer(self):
        """export and --to fp32 of stages 1 and 2 read the experts' own files."""
        source, config = self.recorded("autoep_z1_ep2_dp2"), self.place / "config"
        config.mkdir()
        (config / "config.json").write_text('{"model_type": "mixtral"}')
        expected = self.place / "expected"
        self.run_program(0, "export", source, expected, "--config", config)
        for stage in (0, 1, 2, 3):
            target, _ = self.uneven(source, stage)
            self.run_program(0, "export", target, self.place / f"hf{stage}", "--config", config)
            self.same(expected, self.place / f"hf{stage}")

    def test_it_is_asked_for_and_told(self):
        source = self.recorded("autoep_z1_ep2_dp2")
        target = self.place / "target"
        text = self.run_program(2, "reshard", source, target, "--to", "ep=3,dp=3").stderr
        for words in ("ValueError", "8 experts", "--beyond-deepspeed", "3 3 2"):
            self.assertIn(words, text)
        for to in ("ep=9,dp=9", "ep=3,dp=4"):
            self.run_program(2, "reshard", source, target, "--to", to, BEYOND)
        self.run_program(2, "reshard", self.recorded("moe_z1_ep2_dp4"), target, "--to",
                         "ep=3,dp=3", BEYOND)
        self.assertFalse(target.exists())
        result = self.run_program(0, "reshard", source, target, "--to", "ep=3,dp=3", BEYOND)
        self.assertIn("notice: beyond DeepSpeed: ep=3 does not divide", result.stderr)
        self.assertIn("3 3 2", self.certificate(target)["beyond_deepspeed"][0])
        even = self.place / "even"
        self.run_program(0, "reshard", source, even, "--to", "ep=4,dp=4", BEYOND)
        self.assertNotIn("beyond_deepspeed", self.certificate(even))

    def test_a_count_that_is_not_the_ranks_own(self):
        target, _ = self.uneven(self.recorded("autoep_z1_ep2_dp2"), 1)
        folder, hits = h.ZeroFolder(target), 0
        for inside, (_, records) in folder.files.items():
            if inside.endswith("/mp_rank_00_model_states.pt"):
                records["data.pkl"], hits = re.subn(
                    rb"(num_local_experts" + MEMO + rb")K\x03", rb"\1K" + b"\x02",
                    records["data.pkl"], count=1, flags=re.DOTALL)
        self.assertEqual(hits, 1)
        text = self.run_program(2, "digest", folder.write(self.place / "source")).stderr
        self.assertIn("2 experts on rank 0", text)
        self.assertIn("RuntimeError", text)


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
