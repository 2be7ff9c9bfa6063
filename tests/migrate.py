#!/usr/bin/env python3
"""tests/migrate.py PROGRAM TRACES: native MoE to AutoEP by a map of names.

What the real DeepSpeed, with AutoEP on, loaded of our migration of moe_gated_z1_ep2_dp2 and saved
at once is recorded (autoep_migrated_ep2_dp2): our reshard of the migration equals it. Every weight
and moment of an expert in the stacks equals that of the same expert in the source, by its name and
by what the live engine held. Names that do not meet the map are refused, both ways.
"""

import json
import re
import shutil
import sys

import hostile as h
from program_case import CONFIG, ProgramCase, run_tests

sys.path.insert(0, str(h.Path(__file__).resolve().parent.parent / "scripts"))
import compare_torch  # noqa: E402

SOURCE = "moe_gated_z1_ep2_dp2"
NATIVE = re.compile(r"(.+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(w[123])\.weight")
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def param(path):
    held = compare_torch.load(str(path))
    return held["param"] if isinstance(held, dict) else held


class Migrate(ProgramCase):
    def setUp(self):
        super().setUp()
        self.names = CONFIG.traces.parent / "names" / "moe_gated.json"
        self.target = self.place / "out" / "global_step3_universal"

    def migrate(self, status=0, source=SOURCE, names=None):
        return self.run_program(
            status, "migrate", self.recorded(source), self.target, "--to", "autoep", "--names",
            names or self.names,
        )

    def changed(self, edit):
        """The bundled map with one edit."""
        rules = json.loads(self.names.read_text())
        edit(rules)
        path = self.place / "names.json"
        path.write_text(json.dumps(rules))
        return path

    def test_what_deepspeed_loaded_and_saved(self):
        self.migrate()
        out, found = self.place / "out", self.place / "found"
        self.run_program(0, "verify", out)
        self.run_program(0, "reshard", out, found, "--to", "dp=2", "--tag-out", "global_step3")
        wrong = compare_torch.compare_paths(
            str(self.recorded("autoep_migrated_ep2_dp2")), str(found), [r"\['ds_config'\]"], []
        ).differences
        self.assertEqual(wrong, [])
        certificate = self.certificate(self.target)
        self.assertEqual(len(certificate["renamed"]), 2 * (8 * 3 + 1))
        self.assertIn(
            '"model.layers.1.mlp.experts.w3"[7]: "model.layers.1.mlp.deepspeed_moe.experts.'
            'deepspeed_experts.7.w3.weight"',
            certificate["renamed"],
        )

    def test_every_expert_is_its_own(self):
        self.migrate()
        whole = self.place / "native"
        self.run_program(0, "convert", self.recorded(SOURCE), whole, "--to", "universal")
        compared = 0
        for folder in (whole / "zero").glob("*deepspeed_experts*"):
            prefix, number, matrix = NATIVE.fullmatch(folder.name).groups()
            for state in STATES:
                one = bytes(param(folder / f"{state}.pt").bits())
                stack = param(self.target / "zero" / f"{prefix}.experts.{matrix}" / f"{state}.pt")
                self.assertEqual(stack.shape[0], 8)
                begin = int(number) * len(one)
                self.assertEqual(bytes(stack.bits())[begin : begin + len(one)], one, folder.name)
                compared += 1
        self.assertEqual(compared, 2 * 8 * 3 * 3)
        for rank in range(2):  # experts 4 r … 4 r + 3 on rank r
            path = CONFIG.traces / SOURCE / "truth" / f"rank{rank}.pt"
            for name, states in compare_torch.load(str(path)).items():
                native = NATIVE.fullmatch(name)
                if native is None or "fp32" not in states:
                    continue
                prefix, number, matrix = native.groups()
                stack = param(self.target / "zero" / f"{prefix}.experts.{matrix}" / "fp32.pt")
                one = bytes(states["fp32"].bits())
                begin = (4 * rank + int(number)) * len(one)
                self.assertEqual(bytes(stack.bits())[begin : begin + len(one)], one, name)
                compared += 1
        self.assertGreater(compared, 2 * 8 * 3 * 3)

    def test_ranks_may_list_their_states_in_another_order(self):
        self.migrate()
        other = self.place / "other" / "global_step3_universal"
        self.run_program(0, "migrate", self.recorded("edited_order_ep2"), other, "--to", "autoep",
                         "--names", self.names)
        self.run_program(0, "diff", self.target, other)

    def test_names_that_do_not_meet(self):
        def no_gate(rules):
            del rules["experts"][0]

        def misspelt(rules):
            rules["experts"][1]["from"] = rules["experts"][1]["from"].replace("w2", "down")

        def idle(rules):
            rules["names"][0]["from"] = "(.+)\\.deepspeed_moe\\.gate\\.wq\\.weight"

        def swapped(rules):
            rules["experts"][0]["to"] = "\\1.experts.w2"
            rules["experts"][1]["to"] = "\\1.experts.w1"

        def one_place(rules):
            rules["experts"][0]["to"] = "\\1.experts.w2"

        def elsewhere(rules):
            rules["experts"][0]["to"] = "\\1.expert.w1"

        def taken(rules):
            rules["names"][0]["to"] = "lm_head.weight"

        def no_number(rules):
            rules["experts"][0]["from"] = "a"

        def two(rules):
            rules["names"].append(rules["names"][0])

        def broken(rules):
            rules["names"][0]["from"] = "("

        def no_group(rules):
            rules["names"][0]["to"] = "\\2"

        def unknown(rules):
            rules["renames"] = []

        for edit, words in (
            (no_gate, "no rule for"), (misspelt, "nearest:"), (idle, "for none of"),
            (swapped, "do not belong together"), (one_place, "one place"),
            (elsewhere, "called experts"), (taken, "one name"), (no_number, "{expert}"),
            (two, "one rule that fits"), (broken, "missing )"), (no_group, "names.json"),
            (unknown, "renames"),
        ):
            result = self.migrate(2, names=self.changed(edit))
            self.assertIn(words, result.stderr, edit.__name__)
            self.assertFalse(self.target.exists())
        result = self.migrate(2, names=self.changed(misspelt))
        self.assertIn('deepspeed_experts.0.w2.weight" (nearest:', result.stderr)
        self.assertIn('down\\\\.weight" (nearest: "model.layers.', result.stderr)

    def test_maps_that_mean_nothing(self):
        native = "(.+)\\.deepspeed_moe\\.experts\\.deepspeed_experts\\."

        def other_number(rules):  # the layer's number for the expert's
            rules["experts"][0]["from"] = (
                "model\\.layers\\.{expert}\\.mlp\\.deepspeed_moe\\.experts\\."
                "deepspeed_experts\\.([0-9])\\.w1\\.weight")
            rules["experts"][0]["to"] = "model.layers.\\2.mlp.experts.w1"

        def no_router(rules):
            rules["names"] = []

        def to_a_stack(rules):
            rules["names"][0]["to"] = "\\1.experts.w1"

        def second_elsewhere(rules):
            rules["names"][0]["also"] = ["\\1.elsewhere.weight"]

        def two_seconds(rules):
            rules["names"][0]["also"] *= 2

        def second_of_experts(rules):
            rules["experts"][0]["also"] = ["a"]

        def own_group(rules):
            rules["names"][0]["from"] = "(.+)\\.deepspeed_moe\\.gate\\.(?P<expert>wg)\\.weight"

        def ten_groups(rules):
            rules["experts"][0]["from"] = 9 * "()" + native + "{expert}\\.w1\\.weight"

        def no_part(rules):
            rules["experts"][0]["from"] = native + "([0-9]+)\\.w1\\.weight|{expert}"

        def slash(rules):
            rules["names"][0]["to"] = "a/b"

        def long(rules):
            rules["names"][0]["from"] = "(" + "x" * 100_000 + ")"

        for edit, words in (
            (other_number, "another number for an expert's"), (no_router, "no router"),
            (to_a_stack, "one name"), (second_elsewhere, "none that AutoEP gives"),
            (two_seconds, "at most one name"), (second_of_experts, "none in a rule for experts"),
            (own_group, "called expert"), (ten_groups, "nine groups"), (no_part, "a number for"),
            (slash, "with a '/'"), (long, "for none of"),
        ):
            result = self.migrate(2, names=self.changed(edit))
            self.assertIn(words, result.stderr, edit.__name__)
            self.assertLess(len(result.stderr), 4000)
            self.assertFalse(self.target.exists())
        path = self.place / "raw.json"
        for text, words in (
            ('{"names": [], "names": []}', "twice in one object"),
            ('{"names": ' + "[" * 100_000, "nested deeper"), ('{"names": 5}', "a list of rules"),
            ('{"names": [{"from": "a", "to": "b", "also": 5}]}', "at most one name"),
        ):
            path.write_text(text)
            self.assertIn(words, self.migrate(2, names=path).stderr)

    def test_experts_that_autoep_does_not_have(self):
        """Two matrices with biases, as moe_* has them: no gate, and no place for a bias."""
        result = self.migrate(2, "moe_z1_ep2_dp4")
        self.assertIn("deepspeed_experts.0.0.bias", result.stderr)
        front = "(.+)\\.deepspeed_moe\\.experts\\.deepspeed_experts\\.{expert}\\."
        names = self.place / "names.json"
        rules = [{"from": front + f"{n}\\.{kind}", "to": f"\\1.experts.{to}"} for n, kind, to in (
            ("0", "weight", "w1"), ("2", "weight", "w2"), ("0", "bias", "b1"), ("2", "bias", "b2"))]
        names.write_text(json.dumps({"experts": rules}))
        result = self.migrate(2, "moe_z1_ep2_dp4", names)
        self.assertIn("an expert without a gate, or with biases", result.stderr)

    def test_other_sources(self):
        for source in ("autoep_z1_ep2_dp2", "z1_bf16_dp2", "z3_bf16_dp3"):
            self.assertIn("Only native MoE", self.migrate(2, source).stderr)
        lost = shutil.copytree(self.recorded(SOURCE), self.place / "lost")
        next(lost.rglob("layer_1_expert_5_*")).unlink()
        result = self.run_program(2, "migrate", lost, self.target, "--names", self.names)
        self.assertIn("FileNotFoundError", result.stderr)


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
