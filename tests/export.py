#!/usr/bin/env python3
"""tests/export.py PROGRAM TRACES: `export --to hf` of every recorded checkpoint.

The bits of every tensor equal what the live model held (truth/, where one rank holds it whole) and
the masters of `convert --to fp32` rounded here; a Trainer's own model.safetensors where there is
one. Stages 0 to 2 run on a copy without the optimizer's files. Not verified here: that transformers
loads the folder (scripts/peer.py --export).
"""

import json
import os
import shutil
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "scripts"))
import compare_torch  # noqa: E402
import hostile as h  # noqa: E402
from program_case import CONFIG, ProgramCase, run_tests  # noqa: E402

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8}


def as_dtype(data, dtype):
    """fp32 bytes as a lower dtype."""
    words = [data[i : i + 4] for i in range(0, len(data), 4)]
    if dtype == "BF16":
        return h.bfloat16_of(data)
    if dtype == "F16":
        return b"".join(struct.pack("<e", struct.unpack("<f", word)[0]) for word in words)
    return data


class Export(ProgramCase):
    def tensors(self, folder):
        """name → (dtype, shape, bytes), and the tied names."""
        header, data = self.safetensors(folder)
        ties = header.pop("__metadata__")
        found = {
            name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
            for name, e in header.items()
        }
        return found, {k[6:]: v for k, v in ties.items() if k.startswith("alias:")}

    def without_optimizer(self, source):
        copy = self.place / "model_files"
        shutil.copytree(
            source, copy, ignore=lambda _, names: [n for n in names if "optim_states" in n]
        )
        return copy

    def live(self, case):
        """name → bytes in the model's dtype, of cases whose ranks hold whole tensors."""
        names = sorted((CONFIG.traces / case / "truth").glob("rank*.pt"))
        whole = case.startswith(("z", "sp", "v"))
        return compare_torch.load(str(names[0])) if names and whole else {}

    def test_every_recording(self):
        checked = 0
        for case in sorted(os.listdir(CONFIG.traces)):
            if case.startswith(("autoep_", "pipe_", "edited_data_first", "edited_average")):
                continue  # refused, see below
            for folder in ("ours", "fp32", "model_files"):
                shutil.rmtree(self.place / folder, ignore_errors=True)
            source = self.recorded(case)
            with self.subTest(case):
                stage3 = any(source.rglob("zero_pp_rank_0_mp_rank_00_model*"))
                bare = source if stage3 else self.without_optimizer(source)
                excluded = ["--force"] if "nofrozen" in case else []
                ours, fp32 = self.place / "ours", self.place / "fp32"
                said = self.run_program(0, "export", bare, ours, "--no-config", *excluded).stdout
                self.assertIn("files opened", said)
                self.assertEqual(", 0 of the optimizer" in said, not stage3)
                self.run_program(0, "convert", source, fp32, "--to", "fp32")
                found, ties = self.tensors(ours)
                masters, same_ties = self.tensors(fp32)
                self.assertEqual(ties, same_ties)
                self.assertEqual(set(found), set(masters))
                for name, (dtype, shape, data) in found.items():
                    self.assertEqual((shape, data), (masters[name][1], as_dtype(
                        masters[name][2], dtype) if masters[name][0] == "F32" else
                        masters[name][2]), (case, name))
                for name, entry in self.live(case).items():
                    if name in found and hasattr(entry, "get") and entry.get("param") is not None:
                        self.assertEqual(entry["param"].bits(), found[name][2], (case, name))
                        checked += 1
        self.assertGreater(checked, 200)

    def test_a_trainer_folder(self):
        source = self.recorded("trainer_z2_dp2")
        self.run_program(0, "export", source, self.place / "hf", "--max-shard-size", "20KB")
        self.run_program(0, "export", source, self.place / "one")
        found, ties = self.tensors(self.place / "one")
        self.assertEqual(ties, {"lm_head.weight": "model.embed_tokens.weight"})
        data = (source / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__")
        theirs = {
            ties.get(name, name): data[slice(*(8 + size + at for at in entry["data_offsets"]))]
            for name, entry in header.items()  # the Trainer keeps the tied tensor's second name
        }
        self.assertEqual(theirs, {name: entry[2] for name, entry in found.items()})
        for name in ("config.json", "generation_config.json"):
            self.assertEqual((self.place / "hf" / name).read_bytes(), (source / name).read_bytes())
        index = json.loads((self.place / "hf" / "model.safetensors.index.json").read_text())
        self.assertEqual(set(index["weight_map"]), set(found))
        self.assertGreater(len(set(index["weight_map"].values())), 2)
        self.assertNotIn("trainer_state.json", os.listdir(self.place / "hf"))
        self.run_program(0, "verify", self.place / "hf")

    def test_config_from_elsewhere(self):
        config = self.place / "model"
        config.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer.model", "modeling_x.py", "a.txt"):
            (config / name).write_text('{"auto_map": {}, "torch_dtype": "bfloat16"}')
        source = self.recorded("z1_bf16_dp2")
        result = self.run_program(
            0, "export", source, self.place / "hf", "--config", config, "--dtype", "fp32"
        )
        self.assertIn("torch_dtype", result.stderr)
        self.assertEqual(
            sorted(os.listdir(self.place / "hf")),
            ["MANIFEST.json", "certificate.json", "config.json", "model.safetensors",
             "modeling_x.py", "tokenizer.json", "tokenizer.model"],
        )
        self.run_program(0, "convert", source, self.place / "fp32", "--to", "fp32")
        self.assertEqual(self.tensors(self.place / "hf"), self.tensors(self.place / "fp32"))
        self.assertEqual(
            self.certificate(self.place / "hf")["carried"],
            ["config.json", "modeling_x.py", "tokenizer.json", "tokenizer.model"],
        )

    def test_experts_of_autoep(self):
        """One tensor an expert and matrix, as the per-expert files hold them."""
        for case in ("autoep_z1_ep2_dp2", "autoep_z2_ep4_dp4", "edited_data_first_ep2"):
            source, config = self.without_optimizer(self.recorded(case)), self.place / "model"
            config.mkdir()
            (config / "config.json").write_text('{"model_type": "mixtral"}')
            ours = self.place / "hf"
            self.run_program(0, "export", source, ours, "--config", config)
            found, ties = self.tensors(ours)
            self.assertEqual(ties, {})
            expected = {}
            for path in source.rglob("*_model_states.pt"):
                held = compare_torch.load(str(path))
                held = {n: t for n, t in held.get("module", held).items() if ".gate.gate." not in n}
                for name, tensor in held.items():
                    name = name.replace(".mlp.router.", ".mlp.")
                    if ".mlp." in name:
                        name = name.replace(".mlp.", ".block_sparse_moe.")
                        *front, matrix, number = name.split(".")
                        if matrix in ("w1", "w2", "w3"):
                            name = ".".join([*front, number, matrix, "weight"])
                    expected[name] = tensor.bits()
            self.assertEqual({n: t[2] for n, t in found.items()}, expected)
            self.assertEqual(len(found), 15 + 2 * (1 + 8 * 3))
            renamed = self.certificate(ours)["renamed"]
            self.assertIn(
                '"model.layers.1.block_sparse_moe.experts.7.w2.weight": '
                '"model.layers.1.mlp.experts.w2"[7]',
                renamed,
            )
            for folder in (source, ours, config):
                shutil.rmtree(folder)

    def test_refusals(self):
        target, tied = self.place / "t", self.recorded("trainer_z2_dp2")
        config = self.place / "model"
        config.mkdir()
        (config / "config.json").write_text("{}")
        for words, arguments in (
            ("There is no config.json", [self.recorded("z1_bf16_dp2")]),
            ("There is no config.json", [tied, "--config", self.place]),
            ("contradict", [tied, "--config", config, "--no-config"]),
            ("mixtral, qwen3_moe", [self.recorded("autoep_z1_ep2_dp2"), "--no-config"]),
            ("mixtral, qwen3_moe", [self.recorded("autoep_z1_ep2_dp2"), "--config", config]),
            ("mean of its ranks", [self.recorded("edited_average_tp2"), "--no-config"]),
            ("by layer number", [self.recorded("pipe_z1_pp2_dp1"), "--config", config]),
            ("native MoE", [self.recorded("moe_z1_ep2_dp4"), "--config", config]),
            ("exclude_frozen_parameters", [self.recorded("z2_bf16_dp4_nofrozen"), "--no-config"]),
        ):
            result = self.run_program(2, "export", arguments[0], target, *arguments[1:])
            self.assertIn(words, result.stderr)
            self.assertFalse(target.exists())
        (config / "config.json").write_text("[1]")
        self.run_program(2, "export", tied, target, "--config", config)

    def test_another_number_of_layers_is_told(self):
        source, config = self.recorded("trainer_z2_dp2"), self.place / "model"
        config.mkdir()
        said = json.loads((source / "config.json").read_text())
        for layers in (2, 3):
            said["num_hidden_layers"] = layers
            (config / "config.json").write_text(json.dumps(said))
            target = self.place / f"hf{layers}"
            result = self.run_program(0, "export", source, target, "--config", config)
            self.assertEqual("the checkpoint has 2 layers" in result.stderr, layers == 3)

    def test_ties_that_the_config_does_not_make(self):
        """Such a name gets bytes of its own: from_pretrained would leave it at random."""
        source, config = self.recorded("trainer_z2_dp2"), self.place / "model"
        config.mkdir()
        for text in ("{}", '{"tie_word_embeddings": false}', '{"text_config": {}}'):
            (config / "config.json").write_text(text)
            for dtype in ("model", "fp32"):
                target = self.place / f"hf{len(text)}{dtype}"
                said = self.run_program(
                    0, "export", source, target, "--config", config, "--dtype", dtype
                )
                self.assertIn("bytes of its own", said.stderr)
                found, ties = self.tensors(target)
                self.assertEqual(ties, {})
                self.assertEqual(found["lm_head.weight"], found["model.embed_tokens.weight"])
        (config / "config.json").write_text('{"text_config": {"tie_word_embeddings": true}}')
        self.run_program(0, "export", source, self.place / "tied", "--config", config)
        self.assertNotIn("lm_head.weight", self.tensors(self.place / "tied")[0])

    def test_files_that_do_not_fit(self):
        """What the optimizer's files would tell is told without them."""
        def folder(case):
            return h.ZeroFolder(self.recorded(case))

        def expert(name, number):
            path = f"global_step3/layer_0_expert_{number}_mp_rank_00_model_states.pt"
            return name.files[path][1]

        shape = folder("autoep_z1_ep2_dp2")
        records = expert(shape, 1)
        # w2 [16, 24] with strides (24, 1) becomes [24, 16] with strides (16, 1).
        records["data.pkl"] = records["data.pkl"].replace(
            b"K\x10K\x18\x86", b"K\x18K\x10\x86", 1).replace(
            b"K\x18K\x01\x86", b"K\x10K\x01\x86", 1)
        half = self.without_optimizer(self.recorded("moe_z1_ep2_dp4"))
        for number in (2, 3):
            next(half.rglob(f"layer_0_expert_{number}_*")).unlink()
        config = self.place / "model"
        config.mkdir()
        (config / "config.json").write_text('{"model_type": "mixtral"}')
        for source, words in (
            (shape.write(self.place / "shape"), "another shape than its master"),
            (half, "FileNotFoundError"),
        ):
            target = self.place / "t"
            result = self.run_program(2, "export", source, target, "--config", config, "--force")
            self.assertIn(words, result.stderr)

    def test_a_missing_expert(self):
        source = self.without_optimizer(self.recorded("moe_z1_ep2_dp4"))
        self.run_program(0, "export", source, self.place / "whole", "--no-config")
        for number in (0, 2, 3):
            name = f"layer_0_expert_{number}_mp_rank_00_model_states.pt"
            lost = next(source.rglob(name))
            lost.rename(self.place / name)
            result = self.run_program(2, "export", source, self.place / "t", "--no-config")
            self.assertIn("FileNotFoundError", result.stderr)
            (self.place / name).rename(lost)


if __name__ == "__main__":
    sys.exit(not run_tests(__doc__)[0].wasSuccessful())
