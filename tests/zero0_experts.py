#!/usr/bin/env python3
"""tests/zero0_experts.py PROGRAM TRACES: experts of stage 0, which DeepSpeed cannot convert.

Each slot of each expert-parallel rank's optimizer file is one the test names by itself; the
universal form must hold its bits. An optimizer file that is missing costs masters and moments of
experts alone, and the certificate says so; files that disagree are refused or found by verify.
"""

import re
import shutil
import struct
import sys

import hostile as h
from program_case import ProgramCase, run_tests

sys.path.insert(0, str(h.Path(__file__).resolve().parent.parent / "scripts"))
import compare_torch  # noqa: E402

AUTOEP, NATIVE, ONE_GROUP = "autoep_z0_ep2_dp4", "moe_z0_ep2_dp4", "moe_z0_one_group"
OPTIM = "expp_rank_{}_mp_rank_00_optim_states.pt"
GATE = "moe.deepspeed_moe.gate.wg.weight"
EXPERT = "moe.deepspeed_moe.experts.deepspeed_experts.{}.{}"
ENDS = ("0.weight", "0.bias", "2.weight", "2.bias")


def native_slots(rank):
    dense = ["embed.weight", GATE, "head.weight", "head.bias"]
    return dense + [EXPERT.format(number, end) for number in (2 * rank, 2 * rank + 1)
                    for end in ENDS]


def autoep_slots(_):
    """AutoEP puts the routers behind all that the caller listed before them."""
    layers = [f"model.layers.{i}." for i in (0, 1)]
    ends = [f"self_attn.{x}_proj" for x in "qkvo"] + ["input_layernorm", "post_attention_layernorm"]
    dense = [f"{layer}{end}.weight" for layer in layers for end in ends]
    return (["model.embed_tokens.weight", *dense, "model.norm.weight", "lm_head.weight"]
            + [layer + "mlp.router.gate.weight" for layer in layers]
            + [f"{layer}mlp.experts.w{i}" for layer in layers for i in (1, 2, 3)])


class Zero0Experts(ProgramCase):
    def digest(self, path):
        return self.run_program(0, "digest", path).stdout.splitlines()[-1].split()[0]

    def copy(self, case):
        return shutil.copytree(self.recorded(case), self.place / "source")

    def universal(self, source, name="universal"):
        self.run_program(0, "convert", source, self.place / name, "--to", "universal")
        return self.place / name / "zero"

    def bits(self, zero, name, state):
        held = compare_torch.load(str(zero / name / f"{state}.pt"))
        return bytes((held["param"] if isinstance(held, dict) else held).bits())

    def test_every_slot_has_its_name(self):
        for case, slots in ((NATIVE, native_slots), (AUTOEP, autoep_slots)):
            zero, compared = self.universal(self.recorded(case), case), 0
            for rank in (0, 1):
                path = self.recorded(case) / "global_step3" / OPTIM.format(rank)
                optimizer = compare_torch.load(str(path))["optimizer"]
                masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
                states = optimizer["optimizer_state_dict"]["state"]
                self.assertEqual(len(masters), len(slots(rank)))
                for number, name in enumerate(slots(rank)):
                    found = {"fp32": masters[number], "exp_avg": states[number]["exp_avg"],
                             "exp_avg_sq": states[number]["exp_avg_sq"]}
                    for state, tensor in found.items():
                        ours, theirs = self.bits(zero, name, state), bytes(tensor.bits())
                        if ".experts.w" in name:  # rank 0 has the first half of the stack
                            self.assertEqual(len(ours), 2 * len(theirs))
                            ours = ours[rank * len(theirs) : (rank + 1) * len(theirs)]
                        self.assertEqual(ours, theirs, (case, rank, name, state))
                        compared += 1
            self.assertGreater(compared, 60)

    def test_all_is_verified(self):
        for case, words in ((NATIVE, "20 masters, 48 replicas"), (ONE_GROUP, "20 masters"),
                            (AUTOEP, "2 tied names")):
            text = self.run_program(0, "verify", self.recorded(case)).stdout
            self.assertIn(words, text)
            self.assertIn("all agree", text)

    def test_a_lost_optimizer_file(self):
        for case, slots, expert in ((NATIVE, native_slots, EXPERT.format(2, ENDS[0])),
                                    (AUTOEP, autoep_slots, "model.layers.0.mlp.experts.w1")):
            with self.subTest(case):
                source = self.copy(case)
                whole = self.universal(source, case)
                (source / "global_step3" / OPTIM.format(1)).unlink()
                self.assertIn(OPTIM.format(1), self.run_program(1, "verify", source).stdout)
                for command in (("digest", source),
                                ("reshard", source, self.place / "none", "--to", "ep=1")):
                    text = self.run_program(2, *command).stderr
                    self.assertIn(OPTIM.format(1), text)
                    self.assertIn("FileNotFoundError", text)
                result = self.run_program(0, "convert", source, self.place / "lost", "--to",
                                          "universal")
                self.assertIn(f"notice: {OPTIM.format(1)} is missing", result.stderr)
                skipped = self.certificate(self.place / "lost")["skipped"]
                self.assertTrue(any(OPTIM.format(1) in text for text in skipped), skipped)
                zero, lost = self.place / "lost" / "zero", {expert}
                if case == NATIVE:
                    lost = {name for name in slots(1) if "experts" in name}
                for name in sorted(set(slots(0)) | set(slots(1))):
                    if name in lost:
                        files = [path.name for path in (zero / name).iterdir()]
                        self.assertEqual(files, ["fp32.pt"])
                        master = h.bfloat16_of(self.bits(whole, name, "fp32"))
                        self.assertEqual(self.bits(zero, name, "fp32"), master)
                    elif ".experts.w" not in name:
                        for state in ("fp32", "exp_avg", "exp_avg_sq"):
                            self.assertEqual(self.bits(zero, name, state),
                                             self.bits(whole, name, state))
                self.run_program(0, "verify", self.place / "lost")
                self.run_program(0, "convert", source, self.place / "fp32", "--to", "fp32")
                for folder in (source, self.place / "lost", self.place / "fp32"):
                    shutil.rmtree(folder)

    def test_the_first_file_stands_in_the_model_file_too(self):
        source = self.copy(NATIVE)
        (source / "global_step3" / OPTIM.format(0)).unlink()
        result = self.run_program(0, "digest", source)
        self.assertIn("the model file holds the same", result.stderr)
        self.assertEqual(self.digest(source), self.digest(self.recorded(NATIVE)))

    def test_files_that_disagree(self):
        folder = h.ZeroFolder(self.recorded(NATIVE))
        inside = f"global_step3/{OPTIM.format(1)}"
        storages = {key: data for key, data in folder.files[inside][1].items() if "data/" in key}
        key = next(key for key, data in storages.items() if len(data) == 352)  # of embed or head
        changed = bytearray(storages[key])
        changed[17] ^= 1
        folder.files[inside][1][key] = bytes(changed)
        source = folder.write(self.place / "changed")
        text = self.run_program(1, "verify", source).stdout
        self.assertIn("SUSPECT", text)
        self.assertIn("ep rank 1", text)

    def test_another_run_s_file_is_refused(self):
        source = self.copy(NATIVE)
        shutil.copy(self.recorded("moe_z0_fp32_ep2_dp4") / "global_step3" / OPTIM.format(1),
                    source / "global_step3" / OPTIM.format(1))
        self.run_program(2, "digest", source)
        source = shutil.copytree(self.recorded(NATIVE), self.place / "more")
        name = OPTIM.format(1)
        prefix, records = h.ZeroFolder(source).files[f"global_step3/{name}"]
        folder = h.ZeroFolder(source)
        folder.files[f"global_step3/{OPTIM.format(2)}"] = (prefix.replace("_1_", "_2_"), records)
        text = self.run_program(2, "digest", folder.write(self.place / "three")).stderr
        self.assertIn("two saves are mixed", text)

    def test_exchanged_files_are_found(self):
        for case in (NATIVE, AUTOEP):
            folder = h.ZeroFolder(self.recorded(case))
            first, second = (f"global_step3/{OPTIM.format(rank)}" for rank in (0, 1))
            (a, records), (b, others) = folder.files[first], folder.files[second]
            folder.files[first], folder.files[second] = (a, others), (b, records)
            source = folder.write(self.place / case)
            self.assertIn("SUSPECT", self.run_program(1, "verify", source).stdout)
            self.run_program(2, "convert", source, self.place / "none", "--to", "universal")

    def test_other_hyper_parameters_are_refused(self):
        folder = h.ZeroFolder(self.recorded(NATIVE))
        folder.replace(b"G" + struct.pack(">d", 0.01), b"G" + struct.pack(">d", 0.5),
                       "expp_rank_1", 1)
        text = self.run_program(2, "digest", folder.write(self.place / "source")).stderr
        self.assertIn("param_groups or loss scaler, ep rank 1", text)

    def test_missing_and_surplus_expert_files(self):
        source = self.copy(NATIVE)
        for path in (source / "global_step3").glob("layer_*"):
            path.unlink()
        text = self.run_program(1, "verify", source).stdout
        self.assertIn("experts of every layer (DeepSpeed: FileNotFoundError)", text)
        for command in (("digest", source), ("export", source, self.place / "hf", "--to", "hf",
                                             "--no-config")):
            self.assertIn("1 layers", self.run_program(2, *command).stderr)
        folder = h.ZeroFolder(self.recorded(AUTOEP))
        inside = "global_step3/layer_1_expert_7_mp_rank_00_model_states.pt"
        prefix, records = folder.files[inside]
        records = {key: data.replace(b".w1.7", b".w1.9").replace(b".w2.7", b".w2.9")
                   .replace(b".w3.7", b".w3.9") if key == "data.pkl" else data
                   for key, data in records.items()}
        folder.files[inside.replace("_7_", "_9_")] = (prefix.replace("_7_", "_9_"), records)
        text = self.run_program(2, "digest", folder.write(self.place / "more")).stderr
        self.assertIn("no layer of experts has", text)

    def test_slots_and_experts_must_be_as_many(self):
        folder = h.ZeroFolder(self.recorded(NATIVE))
        for number in (2, 3):
            del folder.files[f"global_step3/layer_0_expert_{number}_mp_rank_00_model_states.pt"]
        records = folder.files["global_step3/mp_rank_00_model_states.pt"][1]
        records["data.pkl"], hits = re.subn(
            b"(num_experts(?:q.|r....)\\](?:q.|r....))K\x04", b"\\1K\x02", records["data.pkl"],
            flags=re.DOTALL)
        self.assertEqual(hits, 1)
        text = self.run_program(2, "digest", folder.write(self.place / "source")).stderr
        self.assertIn("8 on all ranks", text)
        self.assertIn("8 on each of 2", text)

    def test_one_group_of_all_parameters(self):
        """Stage 0 alone allows it: weights come out, no other stage can hold it."""
        source = self.recorded(ONE_GROUP)
        self.run_program(0, "convert", source, self.place / "fp32", "--to", "fp32")
        header, data = self.safetensors(self.place / "fp32")
        for rank in (0, 1):
            truth = compare_torch.load(str(self.recorded(ONE_GROUP, "truth") / f"rank{rank}.pt"))
            for name, states in truth.items():
                if "deepspeed_experts" in name:
                    front, _, back = name.partition("deepspeed_experts.")
                    number, _, back = back.partition(".")
                    name = f"{front}deepspeed_experts.{int(number) + 2 * rank}.{back}"
                begin, end = header[name]["data_offsets"]
                self.assertEqual(h.bfloat16_of(data[begin:end]), bytes(states["param"].bits()))
        for command in (("reshard", "stage=1"), ("convert", "universal")):
            text = self.run_program(2, command[0], source, self.place / "none", "--to",
                                    command[1]).stderr
            self.assertIn("holds experts and other parameters", text)

    def test_the_order_may_be_said(self):
        order = self.place / "order"
        local = [name.replace("deepspeed_experts.2.", "deepspeed_experts.0.") for name in
                 native_slots(0)]
        order.write_text("\n".join(local[:4] + [""] + local[4:]) + "\n")
        self.run_program(0, "digest", self.recorded(NATIVE), "--param-order", order)
        local[4], local[8] = local[8], local[4]
        order.write_text("\n".join(local[:4] + [""] + local[4:]) + "\n")
        text = self.run_program(2, "digest", self.recorded(NATIVE), "--param-order", order).stderr
        self.assertIn("does not agree with the module", text)

    def test_weights_without_the_optimizer(self):
        source = self.copy(NATIVE)
        for rank in (0, 1):
            (source / "global_step3" / OPTIM.format(rank)).write_bytes(b"not opened")
        self.run_program(0, "export", source, self.place / "hf", "--to", "hf", "--no-config")
        header, data = self.safetensors(self.place / "hf")
        self.assertEqual(len(header) - ("__metadata__" in header), 20)
        begin, end = header[EXPERT.format(3, ENDS[0])]["data_offsets"]
        name = "layer_0_expert_3_mp_rank_00_model_states.pt"
        expert = compare_torch.load(str(source / "global_step3" / name))
        self.assertEqual(data[begin:end], bytes(expert[EXPERT.format(3, ENDS[0])].bits()))


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
