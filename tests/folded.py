#!/usr/bin/env python3
"""tests/folded.py PROGRAM TRACES: AutoEP folded with AutoTP, which DeepSpeed cannot convert.

autoep_folded_tp2_ep2_dp2 is read, verified, written again at its own topology (the very files), and
brought to tp=1 at every ep and stage, and to the
universal form under --beyond-deepspeed, with one digest. What each expert and each tensor-parallel
shard is, the test works out by itself, from the expert files and the ranks' modules.
"""

import sys

import hostile as h
from program_case import ProgramCase, run_tests

sys.path.insert(0, str(h.Path(__file__).resolve().parent.parent / "scripts"))
import compare_torch  # noqa: E402

SOURCE = "autoep_folded_tp2_ep2_dp2"
OPTIM = "bf16_zero_pp_rank_{}_mp_rank_0{}_optim_states.pt"


class Folded(ProgramCase):
    def digest(self, path):
        return self.run_program(0, "digest", path).stdout.splitlines()[0].split()[0]

    def universal(self):
        target = self.place / "out" / "universal"
        self.run_program(0, "convert", self.recorded(SOURCE), target, "--to", "universal",
                         "--beyond-deepspeed")
        return target

    def test_it_is_read_whole(self):
        text = self.run_program(0, "inspect", self.recorded(SOURCE)).stdout
        self.assertIn("dp2.tp2.ep2", text)
        text = self.run_program(0, "verify", self.recorded(SOURCE)).stdout
        self.assertIn("23 masters, 2 tied names, 38 replicas", text)
        self.assertIn("all agree", text)

    def test_the_universal_form_is_beyond_deepspeed(self):
        text = self.run_program(2, "convert", self.recorded(SOURCE), self.place / "u", "--to",
                                "universal").stderr
        self.assertIn("NotImplementedError", text)
        target = self.universal()
        self.assertEqual(self.digest(target), self.digest(self.recorded(SOURCE)))
        self.assertTrue(self.certificate(target)["beyond_deepspeed"])

    def test_every_expert_and_shard_is_its_own(self):
        zero = self.universal() / "zero"
        tag = self.recorded(SOURCE) / "global_step3"
        masters = {}

        def master(name):
            if name not in masters:
                held = compare_torch.load(str(zero / name / "fp32.pt"))["param"]
                masters[name] = (h.bfloat16_of(bytes(held.bits())), held.shape)
            return masters[name]

        compared = 0
        for path in sorted(tag.glob("layer_*_expert_*")):
            for key, tensor in compare_torch.load(str(path)).items():
                if key == "folding":
                    continue
                name, number = key.rsplit(".", 1)
                bits, shape = master(name)
                size = len(bits) // shape[0]
                self.assertEqual(bytes(tensor.bits()),
                                 bits[int(number) * size:(int(number) + 1) * size], key)
                compared += 1
        self.assertEqual(compared, 2 * 8 * 3)
        modules = [compare_torch.load(str(tag / f"mp_rank_0{rank}_model_states.pt"))["module"]
                   for rank in range(2)]
        for name in modules[0]:
            if name.endswith("gate.gate.weight"):
                continue
            bits, shape = master(name)
            parts = [bytes(module[name].bits()) for module in modules]
            if name.endswith("o_proj.weight"):  # columns: half of every row on each rank
                row = 2 * shape[1] // 2
                parts = [b"".join(part[at:at + row] for part in parts)
                         for at in range(0, len(parts[0]), row)]
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                self.assertEqual(2 * modules[0][name].shape[0], shape[0])
            else:
                self.assertEqual(parts[0], parts[1], name)
                parts = parts[:1]
            self.assertEqual(b"".join(parts), bits, name)
            compared += 1
        self.assertEqual(compared, 48 + 17)

    def test_one_tensor_parallel_rank_at_every_ep_and_stage(self):
        digest = self.digest(self.recorded(SOURCE))
        universal = self.universal()
        for expert, stage in ((1, 1), (2, 1), (4, 2), (8, 3), (2, 3)):
            found = []
            for number, source in enumerate((self.recorded(SOURCE), universal)):
                target = self.place / f"{expert}{stage}{number}"
                spec = f"tp=1,ep={expert},dp={2 * expert},stage={stage}"
                self.run_program(0, "reshard", source, target, "--to", spec, "--tag-out", "t")
                self.assertEqual(self.digest(target), digest)
                self.assertTrue(self.run_program(0, "verify", target).stdout.startswith("VERIFIED"))
                found.append(str(target / "t"))
            wrong = compare_torch.compare_paths(*found, [], []).differences
            wrong = [each for each in wrong if "json" not in str(each)]
            self.assertEqual(wrong, [])
        model = compare_torch.load(str(self.place / "210" / "t" / "mp_rank_00_model_states.pt"))
        self.assertNotIn("folding", model)
        self.assertEqual(set(model["universal_checkpoint_info"]),
                         {"universal_checkpoint_version", "expert_parameter_patterns",
                          "ds_autoep_layers"})

    def test_its_own_topology_gives_its_own_files(self):
        for to, ignored in (("dp=2", []), ("stage=2", [r"\['zero_stage'\]", r"\['stage'\]",
                                                r"\['frozen_param_(shapes|fragments)'\]"])):
            target = self.place / to
            self.run_program(0, "reshard", self.recorded(SOURCE), target, "--to", to)
            self.assertTrue(self.run_program(0, "verify", target).stdout.startswith("VERIFIED"))
            self.assertEqual(self.digest(target), self.digest(self.recorded(SOURCE)))
            wrong = compare_torch.compare_paths(str(self.recorded(SOURCE)), str(target),
                                                ignored, []).differences
            self.assertEqual([each for each in wrong if "json" not in str(each)], [])

    def test_another_folded_target_is_refused(self):
        text = self.run_program(2, "reshard", self.recorded(SOURCE), self.place / "t", "--to",
                                "dp=4").stderr
        self.assertIn("tensor-parallel ranks", text)

    def test_files_of_another_place_are_refused(self):
        folder = h.ZeroFolder(self.recorded(SOURCE))
        one, two = (f"global_step3/{OPTIM.format(0, rank)}" for rank in range(2))
        prefixes = folder.files[one][0], folder.files[two][0]
        folder.files[one], folder.files[two] = ((prefixes[0], folder.files[two][1]),
                                                (prefixes[1], folder.files[one][1]))
        text = self.run_program(2, "digest", folder.write(self.place / "source")).stderr
        self.assertIn("tp_rank", text)

    def test_a_missing_expert_file_is_named(self):
        folder = h.ZeroFolder(self.recorded(SOURCE))
        del folder.files["global_step3/layer_1_expert_6_mp_rank_01_model_states.pt"]
        text = self.run_program(2, "digest", folder.write(self.place / "source")).stderr
        self.assertIn("FileNotFoundError", text)
        self.assertIn("experts.w1.6", text)


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
