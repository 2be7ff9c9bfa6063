"""Whole DeepSpeed checkpoints with hostile values, and with odd and hostile parameter names.

Part of tests/damage.py, which runs it.
"""

import pickletools
import shutil
import struct
from pathlib import Path

import hostile as h
from damage_case import FIGURES, SECONDS, Case, Outcome
from program_case import ASKED


class Zero(Case):
    """Hostile values in whole DeepSpeed checkpoints."""

    def edited(self, edit, name="z1_bf16_dp2"):
        shutil.rmtree(self.place / "source", ignore_errors=True)
        folder = h.ZeroFolder(self.recorded(name))
        edit(folder)
        return folder.write(self.place / "source")

    def refuse(self, edit, name="z1_bf16_dp2"):
        source = self.edited(edit, name)
        self.refused("digest", source)
        self.refused("convert", source, self.place / "out", "--to", "universal")
        self.assertFalse(self.canary.exists())

    def test_code_in_the_client_state(self):
        command = h.text(f"touch {self.canary}")
        for only in ("model_states", "pp_rank_1"):
            with self.subTest(only):
                self.refuse(
                    lambda f: f.insert(
                        "hook", h.name("os", "system") + h.sequence(command) + h.REDUCE, only
                    )
                )

    def test_bombs_in_the_client_state(self):
        def insert(value):
            def edit(folder):
                for inside, (_, records) in folder.files.items():
                    if "model_states" in inside:
                        data = records["data.pkl"]
                        new = value(h.free_memo(data)) if callable(value) else value
                        records["data.pkl"] = data[:-2] + h.text("bomb") + new + b"u."

            return edit

        real = b"G" + struct.pack(">d", 1.5)
        for title, value in {
            "2^60 leaves": lambda memo: h.dag(60, memo=memo),
            "2^20 numbers": lambda memo: h.dag(20, leaf=real, memo=memo),
            "2^19 strings of 60 kB": lambda memo: h.dag(19, leaf=h.text("x" * 60_000), memo=memo),
            "200,000 lists": b"]" * 200_000 + b"a" * 199_999,
            "expanded tensor": h.tensor((2**40,), (0,), key="1", numel=5),
            "an expanded tensor of 2^31": h.tensor((2**31,), (0,), key="1", numel=5),
        }.items():
            with self.subTest(title):
                self.refuse(insert(value))

    def test_expanded_tensor_in_the_module(self):
        """A buffer of 2^40 elements over a storage of one."""
        old = h.integer(0) + b"))"  # offset 0, shape (), stride (): the buffer `count`
        new = h.integer(0) + h.sequence(h.integer(2**40)) + h.sequence(h.integer(0))
        self.refuse(lambda f: f.replace(old, new, "model_states"))

    def test_damaged_tensor_in_the_client_state(self):
        """Its bytes are in no leaf, but they are in the digest."""

        def edit(folder):
            for inside, (_, records) in folder.files.items():
                if "model_states" in inside:
                    records["data.pkl"] = (
                        records["data.pkl"][:-2] + h.text("extra") + h.tensor(key="3") + b"u."
                    )
                    records["data/3"] = h.floats(4)
                    for name in ("version", ".data/serialization_id"):
                        records[name] = records.pop(name)

        source = self.edited(edit)
        self.digest(source)
        path = next(source.rglob("mp_rank_00_model_states.pt"))
        data = path.read_bytes()
        at = data.index(h.floats(4))
        path.write_bytes(data[:at] + b"\1" + data[at + 1 :])
        self.refused("digest", source)

    def test_shapes_that_overflow(self):
        def grow(*sizes):
            return lambda folder: h.grow_shapes(folder, sizes)

        for name in ("z1_bf16_dp2", "z3_bf16_dp2_frozen"):
            for sizes in (
                (2**62,),
                (2**62, 2**62),
                (2**62, 2**62, 2**62),
                (2**61,),
                (2**63 - 1,),
                (-1,),
                (2**40,),
                (0,),
                (0, 0, 0),
            ):
                with self.subTest(recording=name, sizes=sizes):
                    self.refuse(grow(*sizes), name)

    def test_fields_of_the_wrong_type(self):
        """Values of every pickle, one after the other, as None, a number, a list or a text; every
        13th, with ISOSHARD_CASES=all each of them."""
        for name in ("z1_bf16_dp2", "z3_bf16_dp2_frozen", "z1_bf16opt_dp2", "z0_bf16_dp2"):
            failures = []
            for inside, title, folder in wrong_types(self.recorded(name)):
                shutil.rmtree(self.place / "source", ignore_errors=True)
                source = folder.write(self.place / "source")
                result = Outcome(["digest", "--quiet", source], self.place)
                FIGURES["refused" if result.status == 2 else "fine"] += 1
                if result.status not in (0, 2) or result.seconds > SECONDS:
                    failures.append(
                        f"{inside} {title}: status {result.status}, {result.err.strip()[:200]}"
                    )
            self.assertFalse(failures, "\n".join(failures[:40]))

    def test_stage_without_arguments(self):
        call = h.name("deepspeed.runtime.zero.config", "ZeroStageEnum")

        def edit(folder):
            for _, (_, records) in folder.files.items():
                data = records["data.pkl"]
                if call in data:
                    at = data.index(b"K\x01\x85", data.index(call))
                    records["data.pkl"] = data[:at] + b")" + data[at + 3 :]

        self.refuse(edit)

    def test_state_named_like_the_master(self):
        self.refuse(lambda f: f.replace(h.text("exp_avg"), h.text("fp32"), "optim"))

    def test_stage_beyond_32_bits(self):
        def edit(folder):
            for _, (_, records) in folder.files.items():
                data = records["data.pkl"]
                call = h.name("deepspeed.runtime.zero.config", "ZeroStageEnum")
                if call in data:
                    at = data.index(b"K\x01\x85", data.index(call))
                    records["data.pkl"] = data[:at] + h.integer(2**32 + 1) + data[at + 2 :]

        self.refuse(edit)


def wrong_types(source):
    """Yields copies of a recording in which one plain value of one pickle has another type."""
    plain = {
        "BININT1",
        "BININT2",
        "BININT",
        "BINFLOAT",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "EMPTY_DICT",
        "EMPTY_LIST",
    }
    others = (b"N", b"K\x07", b"]", b"}", h.text("x"), b")")
    base = h.ZeroFolder(source)
    step = 1 if ASKED == "all" else 13
    turn = 0
    for inside in base.files:
        data = base.files[inside][1]["data.pkl"]
        opcodes = list(pickletools.genops(data)) + [(None, None, len(data))]
        for (opcode, _, at), (_, _, end) in zip(opcodes, opcodes[1:]):
            if opcode.name not in plain:
                continue
            turn += 1
            new = others[turn // step % len(others)]
            if opcode.name in ("EMPTY_DICT", "EMPTY_LIST") and new in (
                b"]",
                b"}",
                b"N",
                b"K\x07",
                b")",
            ):
                new = b"}" if opcode.name == "EMPTY_LIST" else b"]"
            if data[at:end] == new or turn % step != 0:
                continue
            folder = h.ZeroFolder.__new__(h.ZeroFolder)
            folder.latest = base.latest
            folder.files = {k: (p, dict(r)) for k, (p, r) in base.files.items()}
            folder.files[inside][1]["data.pkl"] = data[:at] + new + data[end:]
            yield inside, f"byte {at}: {opcode.name} → {new[:10]!r}", folder


class Names(Case):
    """Contracts §6: which parameter names are refused, which are fine."""

    OLD = "blocks.0.norm.weight"
    REFUSED = (
        "../../escape",
        "..",
        ".",
        "/tmp/isoshard-escape",
        "/",
        "",
        "a//b",
        "a/",
        "a/../b",
        "a/./b",
        "./a",
        "a\0b",
        "a\nb",
        "a\x1b[31mb",
        "a\x7fb",
        "a\u0085b",
        "x" * 256,
        "a/" + "y" * 256,
        "é" * 128,
        "a" * 5000,
        b"\xff\xfe",
        b"a\xc0\xafb",
        b"\xed\xa0\x80",
    )
    FINE = (
        "layer[0].weight",
        "with space",
        " leading",
        "trailing ",
        "a:b",
        "ünï.çødé",
        "重み",
        "a/b/c",
        "*?[a-z]",
        "(a+)+$",
        "$HOME",
        "a\\b",
        "-rf",
        "~",
        "x" * 255,
        "a.b/c[1].d",
        "'quoted' \"twice\"",
        "a%s%n",
        "..a",
        "a..",
        "...",
        "CON",
        "\U0001f600",
        "fp32",
        "step",
        "zero",
        "MANIFEST.json",
        "data.pkl",
        "exp_avg",
        "\u202egnp",
        "a,b;c|d",
        "#",
        "{}",
        "<b>",
    )

    def named(self, name, recording="z1_bf16_dp2"):
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        return (
            h.ZeroFolder(self.recorded(recording))
            .rename(self.OLD, name)
            .write(self.place / "in" / "source")
        )

    def test_unsafe_names_are_refused(self):
        for recording in ("z1_bf16_dp2", "z3_bf16_dp2_frozen"):
            for name in self.REFUSED:
                with self.subTest(recording=recording, name=name[:40]):
                    source = self.named(name, recording)
                    self.refused("digest", source)
                    out = self.place / "out" / "deep"
                    self.refused("convert", source, out / "universal", "--to", "universal")
                    self.refused("convert", source, out / "fp32", "--to", "fp32")
                    self.refused("reshard", source, out / "zero", "--to", "dp=3")
                    self.assertFalse(list(Path("/tmp").glob("isoshard-escape*")))

    def test_unsafe_names_in_weights(self):
        for name in self.REFUSED:
            with self.subTest(name=name[:40]):
                path = self.place / "pytorch_model.bin"
                path.write_bytes(h.torch_file(h.weights([(name, h.tensor())]), [h.floats(4)]))
                self.refused("digest", path)

    def test_fine_names_round_trip(self):
        for name in self.FINE:
            with self.subTest(name=name[:40]):
                source = self.named(name)
                expected = self.digest(source)
                self.done(
                    "convert", source, self.place / "out" / "u", "--to", "universal", "--quiet"
                )
                self.assertTrue((self.place / "out" / "u" / "zero" / name / "fp32.pt").is_file())
                universal = self.digest(self.place / "out" / "u")
                for section in ("weights", "exp_avg", "exp_avg_sq", "steps", "buffers"):
                    self.assertEqual(universal[section], expected[section])
                self.done(
                    "reshard", source, self.place / "out" / "z", "--to", "dp=3,stage=3", "--quiet"
                )
                self.assertEqual(self.digest(self.place / "out" / "z"), expected)
                for form in ("safetensors", "bin"):
                    self.done(
                        "convert",
                        source,
                        self.place / "out" / form,
                        "--to",
                        "fp32",
                        "--format",
                        form,
                        "--quiet",
                    )
                    weights = self.digest(self.place / "out" / form)
                    for section in ("weights", "buffers"):
                        self.assertEqual(weights[section], expected[section])
                outside = [p for p in self.place.iterdir() if p.name not in ("in", "out")]
                self.assertFalse(outside)

    def test_names_that_collide_in_universal(self):
        """A parameter whose folder has the name of another's file."""
        for one, other in (
            ("n", "n/fp32.pt"),
            ("n", "n/exp_avg.pt/x"),
            ("optimizer_state.pt", "n"),
            ("n", "n/step.pt"),
        ):
            with self.subTest(names=(one, other)):
                shutil.rmtree(self.place, ignore_errors=True)
                self.place.mkdir()
                folder = (
                    h.ZeroFolder(self.recorded())
                    .rename(self.OLD, one)
                    .rename("blocks.0.norm.bias", other)
                )
                source = folder.write(self.place / "source")
                self.refused("convert", source, self.place / "out" / "u", "--to", "universal")
