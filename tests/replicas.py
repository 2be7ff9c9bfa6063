#!/usr/bin/env python3
"""tests/replicas.py PROGRAM TRACES: what is stored more than once, and which copy is alone.

One copy of real checkpoints is altered, with right CRCs, in every kind of replica; `verify
--replicas` must find it, and with three copies or more name the very file. Each rank is altered in
turn, so that a comparison of the first two alone, or one that trusts the first, fails. Of every
recording as it is nothing may be told. Python's standard library only.

Not verified: checkpoints of thousands of ranks.
"""

import json
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import compare_torch  # noqa: E402
import hostile as h  # noqa: E402
from program_case import CONFIG, run_tests  # noqa: E402
from replica_case import MODEL, OPTIM, Case  # noqa: E402

NORM = "model.layers.0.input_layernorm.weight"
# DeepSpeed's own converter swaps masters there (docs/deepspeed_errata.md).
ROUND_ROBIN = {("z2_rr_dp3", "universal"), ("z2_rr_groups_dp2", "universal")}

# The config of the model files alone was edited there.
EDITED = {"edited_data_first_ep2": {"ds_config.use_data_before_expert_parallelism"}}


def flip(data):
    """The highest bit of the mantissa of a bfloat16, one of some weight of a float32."""
    return data[:-2] + bytes([data[-2] ^ 64]) + data[-1:] if len(data) > 1 else bytes([data[0] ^ 1])


def lowest(data):
    return bytes([data[0] ^ 1]) + data[1:]


def put(pattern):
    return lambda data: struct.pack("<I", pattern)


def module(name):
    return lambda root: root["module"][name]


def exp_avg(root):
    return root["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]


def master(root):
    return root["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]


def slice_of(path, name):
    """The first element of a parameter in its group's flat partition."""
    optimizer = compare_torch.load(str(path))["optimizer_state_dict"]
    for group in optimizer["param_slice_mappings"]:
        if name in group:
            return group[name].state["start"]
    raise AssertionError(name)


class Tensors(Case):
    def test_each_rank_of_three_in_turn(self):
        for rank in range(3):
            with self.subTest(rank=rank):
                altered = self.altered("autotp_uneven_tp3")
                inside = altered.files(MODEL)[rank]
                altered.element(inside, module(NORM), flip, at=5)
                kind = self.found(altered, "tensors of ranks")
                self.assertEqual(len(kind), 1)
                contrast = self.alone(kind[0], inside, copies=3)
                self.assertEqual(kind[0]["name"], NORM)
                self.assertEqual(contrast["index"], "[5]")
                self.assertEqual(contrast["differing"], 1)
                self.assertIn("one bit (bit 6)", contrast["how"])
                self.assertIn("the fp32 master, rounded, agrees with", kind[0]["evidence"])
                # The byte is where it says.
                whole = (self.place / "source" / inside).read_bytes()
                bits = int(contrast["found"].split()[0], 16)
                at = contrast["offset_bytes"]
                self.assertEqual(whole[at : at + 2], struct.pack("<H", bits))

    def test_optimizer_states_bit_for_bit(self):
        for rank in range(3):
            for title, usual, odd, how in (
                ("sign of zero", 0, 1 << 31, "the sign of zero alone"),
                ("payload of NaN", 0x7FC00000, 0x7FC00001, "payloads of NaN alone"),
                ("one bit", 0x3F800000, 0x3F800001, "one bit (bit 0), at most 1 ulp"),
                ("two ulp", 0x3F800002, 0x3F800000, "one bit (bit 1), at most 2 ulp"),
                ("zero", 0x3F800007, 0, "zeros instead of values"),
            ):
                with self.subTest(title, rank=rank):
                    altered = self.altered("autotp_uneven_tp3")
                    files = altered.files(OPTIM)
                    self.assertEqual(len(files), 3)
                    for number, inside in enumerate(files):
                        at = slice_of(altered.source / inside, NORM)
                        value = odd if number == rank else usual
                        altered.element(inside, exp_avg, put(value), at=at)
                    [difference] = self.found(altered, "tensors of ranks")
                    contrast = self.alone(difference, files[rank], copies=3)
                    self.assertEqual(difference["state"], "exp_avg")
                    self.assertEqual(contrast["how"], how)

    def test_a_master_below_the_bits_of_the_copy(self):
        altered = self.altered("autotp_uneven_tp3")
        inside = altered.files(OPTIM)[0]
        altered.element(inside, master, lowest, at=slice_of(altered.source / inside, NORM))
        [difference] = self.found(altered, "tensors of ranks")
        self.alone(difference, inside, copies=3)
        self.assertIn("below its bits", difference["evidence"])

    def test_a_whole_tensor(self):
        altered = self.altered("autotp_uneven_tp3")
        inside = altered.files(MODEL)[2]
        altered.whole(inside, module(NORM))
        [difference] = self.found(altered, "tensors of ranks")
        contrast = self.alone(difference, inside, copies=3)
        self.assertEqual(contrast["differing"], contrast["elements"])

    def test_two_against_two(self):
        altered = self.altered("autotp_tp2_to_tp4_dp1")
        for inside in altered.files(MODEL)[2:]:
            altered.element(inside, module(NORM), flip)
        differences = self.found(altered, "tensors of ranks")
        [difference] = [each for each in differences if each["name"] == NORM]
        self.assertEqual([len(group) for group in difference["groups"]], [2, 2])
        self.assertFalse(difference["majority"])
        self.assertEqual(difference["alone"], [])

    def test_of_two_copies_the_master_speaks(self):
        for rank in range(2):
            with self.subTest(rank=rank):
                altered = self.altered("autotp_z1_tp2_dp1")
                altered.element(altered.files(MODEL)[rank], module(NORM), flip)
                [difference] = self.found(altered, "tensors of ranks")
                self.assertFalse(difference["majority"])
                self.assertIn(
                    f"agrees with mp rank {1 - rank}", difference["evidence"].replace(", tp", " tp")
                )

    def test_what_is_said_without_the_flag(self):
        altered = self.altered("autotp_z1_tp2_dp1")
        altered.element(altered.files(MODEL)[1], module(NORM), flip)
        source = altered.write(self.place / "source")
        text = self.run_program(1, "verify", source).stdout
        self.assertIn(": 1 differs\n", text)
        self.assertIn("values of optimizer states that no other rank holds: they are stored", text)
        text = self.run_program(0, "verify", self.recorded("z1_bf16_dp2")).stdout
        self.assertIn("values of optimizer states: they are stored once", text)

    def test_stages_of_a_pipeline(self):
        altered = self.altered("pipe_bf16_pp3_dp2")
        inside = altered.files("mp_rank_02", OPTIM)[0]
        name = "tied_modules.embed.weight"
        altered.element(inside, exp_avg, lowest, at=slice_of(altered.source / inside, name))
        [difference] = self.found(altered, "tensors of ranks")
        self.assertEqual((difference["name"], difference["state"]), (name, "exp_avg"))
        self.assertFalse(difference["majority"])
        self.assertEqual(difference["contrasts"][0]["file"], Path(inside).name)

    def test_a_record_that_does_not_fit_its_crc(self):
        altered = self.altered("autotp_z1_tp2_dp1")
        source = altered.write(self.place / "source")
        inside = altered.files(MODEL)[1]
        record, offset, _, _ = altered.place(inside, module(NORM))
        data = bytearray((source / inside).read_bytes())
        at = data.index(altered.folder.files[inside][1][record]) + offset + 1
        data[at] ^= 1
        (source / inside).write_bytes(data)
        differences, verification = self.told(1, source, "--replicas")
        self.assertEqual(verification["verdict"], "CORRUPT")
        [difference] = [each for each in differences if each["name"] == NORM]
        self.assertIn(f'"{Path(inside).name}" {record} does not fit', difference["evidence"]
                      .replace(str(Path(inside).parent) + "/", ""))


class Pairs(Case):
    def test_a_master_and_the_models_copy(self):
        altered = self.altered("z1_bf16_dp2")
        altered.element(altered.files(MODEL)[0], module("head.weight"), flip, at=3)
        [difference] = self.found(altered, "masters")
        self.assertEqual(difference["name"], "head.weight")
        self.assertFalse(difference["majority"])

    def test_a_tied_name(self):
        altered = self.altered("autoep_z1_ep2_dp2")
        [inside] = altered.files("/mp_rank_00", MODEL)
        name = "model.layers.0.mlp.gate.gate.weight"
        altered.element(inside, module(name), flip)
        self.assertTrue(self.found(altered, "tied names"))

    def test_a_restated_tensor(self):
        altered = self.altered("z1_bf16_dp2", "universal")
        [inside] = altered.files("/running/fp32")
        altered.element(inside, lambda root: root["param"], flip)
        [difference] = self.found(altered, "restated tensors")
        self.assertEqual(difference["name"], "running")


class Buffers(Case):
    def test_each_rank_in_turn(self):
        for rank in range(3):
            with self.subTest(rank=rank):
                altered = self.altered("z3_bf16_dp3")
                inside = altered.files(MODEL)[rank]
                altered.element(inside, module("running"), lowest, at=2)
                [difference] = self.found(altered, "buffers of ranks")
                contrast = self.alone(difference, inside, copies=3)
                self.assertEqual(contrast["index"], "[2]")

    def test_statistics_of_their_own_are_told_and_not_judged(self):
        altered = self.altered("z3_bf16_dp3")
        for number, inside in enumerate(altered.files(MODEL)):
            for at in range(5):
                pattern = 0x3F801234 + 77777 * number + 333 * at
                altered.element(inside, module("running"), put(pattern), at=at)
        [difference] = self.found(altered, "buffers of ranks", 0, "COMPLETE")
        self.assertFalse(difference["judged"])


class Values(Case):
    """Of every rank's file; some of them make the reader refuse the folder as a whole."""

    def value(self, name, part, rank, path, change, verdict="SUSPECT", copies=None, status=1):
        altered = self.altered(name)
        inside = altered.files(part)[rank]
        change(altered, inside)
        kind = self.found(altered, "values of ranks", status, verdict)
        [difference] = [each for each in kind if each["name"] == path]
        contrast = self.alone(difference, inside, copies)
        return difference, contrast

    def test_counters_of_stage_3(self):
        for rank in range(3):
            _, contrast = self.value(
                "z3_bf16_dp3", MODEL, rank, "global_steps", verdict="CORRUPT", copies=3,
                change=lambda altered, inside: altered.folder.set_after(
                    "global_steps", b"K\x04", only=inside))
            self.assertEqual((contrast["expected"], contrast["found"]), ("3", "4"))

    def test_counters_of_tensor_parallel_ranks(self):
        self.value(
            "autotp_uneven_tp3", MODEL, 2, "skipped_steps", verdict="CORRUPT", copies=3,
            change=lambda altered, inside: altered.folder.set_after(
                "skipped_steps", b"K\x01", only=inside))

    def test_steps(self):
        def later(root):
            return root["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["step"]

        for rank in range(3):
            difference, contrast = self.value(
                "z3_bf16_dp3", OPTIM, rank,
                "optimizer_state_dict.optimizer_state_dict.state[0].step",
                verdict="CORRUPT", copies=3,
                change=lambda altered, inside: altered.element(
                    inside, later, lambda data: struct.pack("<f", 4)))
            self.assertEqual(contrast["found"], "4 float32")
            self.assertIn("global_steps is 3", difference["evidence"])

    def test_loss_scaler(self):
        self.value(
            "z3_bf16_dp3", OPTIM, 1, "optimizer_state_dict.loss_scaler.cur_scale", copies=3,
            change=lambda altered, inside: altered.folder.set_after(
                "cur_scale", b"G" + struct.pack(">d", 2.0), only=inside))

    def test_schedule(self):
        def change(altered, inside):
            for each in altered.files(MODEL):
                number = 4 if each == inside else 3
                schedule = h.mapping([(h.text("last_batch_iteration"), h.integer(number))])
                altered.folder.set_after("lr_scheduler", schedule, only=each)

        self.value("z3_bf16_dp3", MODEL, 2, "lr_scheduler.last_batch_iteration", change=change,
                   copies=3)

    def test_a_schedule_that_one_rank_lacks(self):
        def change(altered, inside):
            for each in altered.files(MODEL):
                schedule = h.mapping([(h.text("last_batch_iteration"), h.integer(3))])
                if each != inside:
                    altered.folder.set_after("lr_scheduler", schedule, only=each)

        _, contrast = self.value("z3_bf16_dp3", MODEL, 0, "lr_scheduler.last_batch_iteration",
                                 change=change, copies=3)
        self.assertEqual(contrast["found"], "absent")

    def test_the_rate_of_a_group(self):
        self.value(
            "z2_bf16_dp4", OPTIM, 3,
            "optimizer_state_dict.base_optimizer_state.param_groups[0].lr", copies=4,
            change=lambda altered, inside: altered.folder.set_after(
                "lr", b"G" + struct.pack(">d", 0.02), only=inside))

    def test_the_version_of_models_and_optimizers(self):
        altered = self.altered("z1_bf16_dp2")
        [inside] = altered.files("/mp_rank_00", MODEL)
        altered.folder.replace(h.text("0.19.8"), h.text("0.19.7"), only=inside)
        kind = self.found(altered, "values of ranks")
        [difference] = [each for each in kind if each["name"] == "ds_version"]
        self.alone(difference, inside, copies=3)

    def test_an_entry_that_one_tensor_parallel_rank_has_or_lacks(self):
        """Such a rank is compared all the same: what it repeats must be right too."""
        path = "optimizer_state_dict.base_optimizer_state.param_groups[0]"
        for rank in range(3):
            for old, new in (("lr", "learning"), ("weight_decay", "decay")):
                with self.subTest(rank=rank, old=old):
                    altered = self.altered("autotp_uneven_tp3")
                    inside = altered.files(OPTIM)[rank]
                    altered.folder.replace(h.text(old), h.text(new), only=inside)
                    altered.folder.set_after(
                        "eps", b"G" + struct.pack(">d", 0.5), only=inside)
                    kind = self.found(altered, "values of ranks", verdict=None)
                    names = {each["name"]: each for each in kind}
                    lacks = self.alone(names[f"{path}.{old}"], inside, copies=3)
                    self.assertEqual(lacks["found"], "absent")
                    self.alone(names[f"{path}.{new}"], inside, copies=3)
                    self.alone(names[f"{path}.eps"], inside, copies=3)

    def test_a_stage_with_other_entries_is_told_as_not_compared(self):
        altered = self.altered("pipe_bf16_pp3_dp2")
        for inside in altered.files("mp_rank_01", OPTIM):
            altered.folder.replace(h.text("weight_decay"), h.text("decay"), only=inside)
        source = altered.write(self.place / "source")
        result = self.run_program(None, "verify", source, "--replicas", "--json")
        told = json.loads(result.stdout.splitlines()[-1])
        [line] = told["not_compared"]
        self.assertIn("only among mp ranks that have the same, of 1; of 0, 2", line)

    def test_the_parts_of_an_object_hide_nothing_of_each_other(self):
        def scheduler(number):
            made = h.name("deepspeed.runtime.lr_schedules", "WarmupLR") + h.sequence(h.integer(7))
            return made + h.REDUCE + h.sequence(h.integer(number)) + h.BUILD

        altered = self.altered("z3_bf16_dp3")
        files = altered.files(MODEL)
        for each in files:
            number = 6 if each == files[1] else 5
            altered.folder.set_after("lr_scheduler", scheduler(number), only=each)
        [difference] = self.found(altered, "values of ranks", verdict=None)
        contrast = self.alone(difference, files[1], copies=3)
        self.assertEqual((contrast["expected"], contrast["found"]), ("5", "6"))

    def test_client_state_is_told_and_not_judged(self):
        altered = self.altered("z3_bf16_dp3")
        inside = altered.files(MODEL)[1]
        altered.folder.set_after("epoch", b"K\x09", only=inside)
        [difference] = self.found(altered, "client state", 0, "COMPLETE")
        self.alone(difference, inside, copies=3)
        self.assertFalse(difference["judged"])


class Clean(Case):
    def test_every_recording_as_it_is(self):
        seen = 0
        for case in sorted(CONFIG.traces.iterdir()):
            for inside in ("ckpt", "universal"):
                if not (case / inside).is_dir():
                    continue
                with self.subTest(case=case.name, inside=inside):
                    self.clean(case, inside)
                    seen += 1
        self.assertGreater(seen, 100)

    def clean(self, case, inside):
        odd = (case.name, inside) in ROUND_ROBIN
        _, plain = self.told(1 if odd else 0, case / inside)
        differences, told = self.told(1 if odd else 0, case / inside, "--replicas")
        self.assertEqual(told["verdict"], plain["verdict"])
        self.assertEqual(told["digest"], plain["digest"])
        judged = {each["what"] for each in differences if each["judged"]}
        self.assertEqual(judged, {"masters"} if odd else set())
        others = {each["name"] for each in differences if not each["judged"]}
        self.assertEqual(others, EDITED.get(case.name, set()) if inside == "ckpt" else set())
        self.assertEqual(told["not_compared"], [])
        counts = told["replicas"]
        copies = plain["copies"]
        self.assertEqual(counts["masters"]["sets"], copies["masters"])
        tensors = counts["tensors of ranks"]
        self.assertEqual(tensors["copies"] - tensors["sets"], copies["replicas"])
        files = [each for each in (case / inside).glob("*/*.pt") if "_states" in each.name
                 and not each.name.startswith("layer_")]
        if len([each for each in files if "expert_" not in each.name]) > 1:
            self.assertGreater(counts["values of ranks"]["sets"], 8)
        ranks = [each for each in files if each.name.startswith("zero_pp") and MODEL in each.name]
        if len(ranks) > 1 and case.name.startswith("z3"):
            self.assertEqual(counts["buffers of ranks"],
                             {"sets": 2, "copies": 2 * len(ranks), "differing": 0})


if __name__ == "__main__":
    outcome, seconds = run_tests(__doc__)
    print(f"{outcome.testsRun} tests in {seconds:.1f} s")
    sys.exit(0 if outcome.wasSuccessful() else 1)
