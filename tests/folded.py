#!/usr/bin/env python3
"""tests/folded.py PROGRAM TRACES: AutoEP folded with AutoTP, which DeepSpeed cannot convert.

Every autoep_folded_* (more, as many and fewer expert- than tensor-parallel ranks; stages 1 and 2)
is read, verified, written again at its own topology (the very files), and brought to tp=1 at every
ep and stage, and to the universal form under --beyond-deepspeed, with one digest. What each expert
and each tensor-parallel shard is, the test works out by itself, from the expert files and the
ranks' modules. What simulated ranks of these topologies write has the recordings' files, and says
in them of every rank's place what DeepSpeed's say.
"""

import json
import sys

import hostile as h
from program_case import ProgramCase, run_tests

sys.path.insert(0, str(h.Path(__file__).resolve().parent.parent / "scripts"))
import compare_torch  # noqa: E402

SOURCE = "autoep_folded_tp2_ep2_dp2"
# recording → what inspect says, layers, tensor-parallel ranks, copies of an expert
SOURCES = {
    SOURCE: ("dp2.tp2.ep2", 2, 2, 1),
    "autoep_folded_tp2_ep4_dp2": ("dp2.tp2.ep4", 1, 2, 1),
    "autoep_folded_tp4_ep2_dp1": ("dp1.tp4.ep2", 1, 4, 2),
    "autoep_folded_z2_tp2_ep2_dp1": ("dp1.tp2.ep2", 1, 2, 1),
}
OPTIM = "bf16_zero_pp_rank_{}_mp_rank_0{}_optim_states.pt"
STAGE2 = [r"\['zero_stage'\]", r"\['stage'\]", r"\['frozen_param_(shapes|fragments)'\]"]


def folding(file, layers):
    """What a file says of its place, as far as it does not hang on a race of ranks, on layers that
    the recorded model has not, or on its number of heads."""
    place = dict(file["folding"])
    if place["family"] == "routed_expert":
        del place["zero_partition_rank"]  # that of the rank which came last with this name
    families = place.pop("param_families", {})
    dropped = tuple(f"model.layers.{number}." for number in range(layers, 9))
    place["families"] = [(name, family) for name, family in families.items()
                         if not name.startswith(dropped) and ".self_attn." not in name]
    return place


class Folded(ProgramCase):
    def digest(self, path):
        return self.run_program(0, "digest", path).stdout.splitlines()[0].split()[0]

    def universal(self, case=SOURCE):
        target = self.place / "out" / case
        self.run_program(0, "convert", self.recorded(case), target, "--to", "universal",
                         "--beyond-deepspeed")
        return target

    def test_it_is_read_whole(self):
        for case, (topology, *_) in SOURCES.items():
            with self.subTest(case):
                text = self.run_program(0, "inspect", self.recorded(case)).stdout
                self.assertIn(f"topology     {topology} ", text)
                text = self.run_program(0, "verify", self.recorded(case)).stdout
                self.assertIn("all agree", text)
        self.assertIn("23 masters, 2 tied names, 38 replicas",
                      self.run_program(0, "verify", self.recorded(SOURCE)).stdout)

    def test_the_universal_form_is_beyond_deepspeed(self):
        text = self.run_program(2, "convert", self.recorded(SOURCE), self.place / "u", "--to",
                                "universal").stderr
        self.assertIn("NotImplementedError", text)
        for case in SOURCES:
            target = self.universal(case)
            self.assertEqual(self.digest(target), self.digest(self.recorded(case)))
            self.assertTrue(json.loads((target / "certificate.json").read_text())
                            ["beyond_deepspeed"])

    def test_every_expert_and_shard_is_its_own(self):
        for case, (_, layers, ranks, copies) in SOURCES.items():
            with self.subTest(case):
                self.check_values(case, layers, ranks, copies)

    def check_values(self, case, layers, ranks, copies):
        zero = self.universal(case) / "zero"
        [tag] = self.recorded(case).glob("global_step*")
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
        self.assertEqual(compared, layers * 8 * 3 * copies)
        modules = [compare_torch.load(str(tag / f"mp_rank_0{rank}_model_states.pt"))["module"]
                   for rank in range(ranks)]
        compared = 0
        for name in modules[0]:
            if name.endswith("gate.gate.weight"):
                continue
            bits, shape = master(name)
            parts = [bytes(module[name].bits()) for module in modules]
            if name.endswith("o_proj.weight"):  # columns: a share of every row on each rank
                row = 2 * shape[1] // ranks
                parts = [b"".join(part[at:at + row] for part in parts)
                         for at in range(0, len(parts[0]), row)]
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                self.assertEqual(ranks * modules[0][name].shape[0], shape[0])
            else:
                self.assertEqual(len(set(parts)), 1, name)
                parts = parts[:1]
            self.assertEqual(b"".join(parts), bits, name)
            compared += 1
        self.assertEqual(compared, 3 + 7 * layers)

    def test_one_tensor_parallel_rank_at_every_ep_and_stage(self):
        for case in SOURCES:
            self.check_targets(case)
        model = compare_torch.load(str(self.place / SOURCE / "210" / "t"
                                       / "mp_rank_00_model_states.pt"))
        self.assertNotIn("folding", model)
        self.assertEqual(set(model["universal_checkpoint_info"]),
                         {"universal_checkpoint_version", "expert_parameter_patterns",
                          "ds_autoep_layers"})

    def check_targets(self, case):
        digest = self.digest(self.recorded(case))
        universal = self.universal(case)
        for expert, stage in ((1, 1), (2, 1), (4, 2), (8, 3), (2, 3)):
            found = []
            for number, source in enumerate((self.recorded(case), universal)):
                target = self.place / case / f"{expert}{stage}{number}"
                spec = f"tp=1,ep={expert},dp={2 * expert},stage={stage}"
                self.run_program(0, "reshard", source, target, "--to", spec, "--tag-out", "t")
                self.assertEqual(self.digest(target), digest)
                self.assertTrue(self.run_program(0, "verify", target).stdout.startswith("VERIFIED"))
                found.append(str(target / "t"))
            wrong = compare_torch.compare_paths(*found, [], []).differences
            wrong = [each for each in wrong if "json" not in str(each)]
            self.assertEqual(wrong, [])

    def test_its_own_topology_gives_its_own_files(self):
        for case in SOURCES:
            other = "stage=1" if "_z2_" in case else "stage=2"
            for to, ignored in ((self.own(case), []), (other, STAGE2)):
                target = self.place / case / to
                self.run_program(0, "reshard", self.recorded(case), target, "--to", to)
                self.assertTrue(self.run_program(0, "verify", target).stdout.startswith("VERIFIED"))
                self.assertEqual(self.digest(target), self.digest(self.recorded(case)))
                wrong = compare_torch.compare_paths(str(self.recorded(case)), str(target),
                                                    ignored, []).differences
                self.assertEqual([each for each in wrong if "json" not in str(each)], [])

    def test_simulated_ranks_say_the_same_of_their_place(self):
        for case in SOURCES:
            with self.subTest(case):
                made = self.place / ("golden_" + case)
                self.run_program(0, "golden", "--topology", self.own(case), "--model",
                                 "mixtral", "--out", made, "--quiet")
                [ours] = (made / "ckpt").glob("global_step*")
                [theirs] = self.recorded(case).glob("global_step*")
                layers = SOURCES[case][1]
                compared = 0
                for path in sorted(theirs.glob("*.pt")):
                    real = compare_torch.load(str(path))
                    found = compare_torch.load(str(ours / path.name))
                    self.assertEqual(*(folding(each, layers) for each in (real, found)), path.name)
                    compared += 1
                self.assertGreater(compared, 10)
                self.assertEqual(*({path.name for path in folder.glob("*.pt")
                                    if not path.name.startswith("layer_")}
                                   for folder in (theirs, ours)))
                for path in ours.glob("layer_*"):
                    number = int(path.name.split("_")[1])
                    self.assertTrue(number >= layers or (theirs / path.name).exists(), path.name)

    def own(self, case):
        text = self.run_program(0, "inspect", self.recorded(case), "--json").stdout
        return json.loads(text.splitlines()[0])["to"]

    def test_a_replica_that_differs_is_told(self):
        folder = h.ZeroFolder(self.recorded("autoep_folded_tp4_ep2_dp1"))
        _, records = folder.files["global_step2/layer_0_expert_5_mp_rank_03_model_states.pt"]
        records["data/0"] = bytes([records["data/0"][0] ^ 1]) + records["data/0"][1:]
        source = folder.write(self.place / "source")
        self.assertIn("SUSPECT", self.run_program(1, "verify", source).stdout)
        self.run_program(2, "reshard", source, self.place / "out", "--to", "tp=1")

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
