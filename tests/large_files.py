#!/usr/bin/env python3
"""tests/large_files.py PROGRAM TRACES [--python PYTHON]: files beyond 4 GiB and 65,535 records.

Everything is written by the real torch.save and read by the program, and written by the program and
read by the real torch.load and by Python's zipfile (testzip: every CRC). Files are mostly holes:
what torch hands to write() lands sparse, so that a few MiB of disk hold tens of GiB.

  weights   a pytorch_model.bin of a 2^32+64-byte tensor and a small one behind it; the digest is
            compared with one computed here from docs/formats/digest.md
  master    a ZeRO-3 checkpoint whose master has 2^30+16 floats -> fp32 .bin and universal
  many      70,000 tensors in one file, read; a ZeRO-3 checkpoint of 70,000 parameters -> fp32 .bin

PYTHON is an interpreter that has torch; without one the test is skipped (77). Not verified: GPU
tensors, and the values of more than a sample of the many zeros (they are counted).
"""

import argparse
import collections
import enum
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
import types
import zipfile

try:
    import torch
except ImportError:
    torch = None

BIG_BYTES = 2**32 + 64
BIG_FLOATS = 2**30 + 16
MANY = 70_000
BLOCK = 1 << 20
ZEROS = bytes(BLOCK)


def check(good, text):
    if not good:
        sys.exit("FAILED: " + text)


def say(text, began):
    print(f"{text} ({time.monotonic() - began:.1f} s)", flush=True)


# ---- torch.save into holes -----------------------------------------------------------------------


class SparseFile:
    """What torch.save writes to: blocks of zeros become holes."""

    def __init__(self, path):
        self.file = open(path, "wb")

    def write(self, data):
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), BLOCK):
            block = bytes(view[begin : begin + BLOCK])
            if block == ZEROS or not any(block):
                self.file.seek(len(block), os.SEEK_CUR)
            else:
                self.file.write(block)
        return len(view)

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.truncate()
        self.file.close()


def save(value, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = SparseFile(path)
    torch.save(value, file)
    file.close()


def zeros(count, dtype):
    """A tensor whose pages take no memory until they are written: torch.zeros would touch them."""
    size = count * torch.empty(0, dtype=dtype).element_size()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


def disk_bytes(folder):
    total = 0
    for root, _, names in os.walk(folder):
        total += sum(os.stat(os.path.join(root, name)).st_blocks * 512 for name in names)
    return total


# ---- the digest, from its specification ----------------------------------------------------------

ECMA, JONES = 0xC96C5795D7870F42, 0x95AC9329AC4BC9B5
ONES = (1 << 64) - 1


def times(a, b, polynomial):
    product = 0
    for bit in range(63, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (polynomial if b & 1 else 0)
    return product


def crc64(pieces, size, polynomial):
    """Of `size` bytes that are zero but for pieces: {offset: bytes}."""

    def skip(register, count):
        square = 1 << 55  # x^8
        while count:
            if count & 1:
                register = times(register, square, polynomial)
            square = times(square, square, polynomial)
            count >>= 1
        return register

    register, at = ONES, 0
    for offset, data in sorted(pieces.items()):
        register = skip(register, offset - at)
        for byte in data:
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (polynomial if register & 1 else 0)
        at = offset + len(data)
    return f"{skip(register, size - at) ^ ONES:016x}"


def weights_section(leaves):
    """leaves: name -> (dtype, shape, pieces, bytes)."""
    text = ""
    for name, (dtype, shape, pieces, size) in sorted(leaves.items()):
        shape = json.dumps(shape, separators=(",", ":"))
        crcs = [crc64(pieces, size, polynomial) for polynomial in (ECMA, JONES)]
        text += "\t".join([json.dumps(name), "weight", dtype, shape, *crcs]) + "\n"
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the program and what reads after it ---------------------------------------------------------


def run(*arguments):
    result = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True)
    check(result.returncode == 0, f"{arguments}: status {result.returncode}\n{result.stderr}")
    return result.stdout


def section(source, name):
    """Hex, tensors and elements of a section of `digest`."""
    for line in run("digest", source, "--no-progress").splitlines():
        words = line.split()
        if words[1] == name:
            return words[0].removeprefix("iso1:"), int(words[2]), int(words[3])
    sys.exit(f"FAILED: no section {name} of {source}")


def reread(path):
    """The file by zipfile and by torch."""
    with zipfile.ZipFile(path) as archive:
        check(archive.testzip() is None, f"zipfile finds a wrong CRC in {path}")
    return torch.load(path, mmap=True, weights_only=False)


def expect_sparse(tensor, values, what):
    """All zero but for values: {index: value}."""
    flat = tensor.reshape(-1)
    count = sum(int(torch.count_nonzero(part)) for part in flat.split(1 << 26))
    check(count == len(values), f"{what}: {count} values are not zero instead of {len(values)}")
    for index, value in values.items():
        check(flat[index].item() == value, f"{what}: element {index} is {flat[index].item()}")


# ---- a ZeRO-3 checkpoint of one rank -------------------------------------------------------------


def deepspeed_classes():
    """Stand-ins under the names that DeepSpeed pickles, so that no DeepSpeed is needed."""
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero",
                 "deepspeed.runtime.zero.config", "deepspeed.runtime.fp16",
                 "deepspeed.runtime.fp16.loss_scaler"):
        sys.modules[name] = types.ModuleType(name)
    stage = enum.IntEnum("ZeroStageEnum", {"weights": 3}, module="deepspeed.runtime.zero.config")
    sys.modules["deepspeed.runtime.zero.config"].ZeroStageEnum = stage
    module = "deepspeed.runtime.fp16.loss_scaler"
    scaler = type("LossScaler", (), {"__module__": module})
    sys.modules[module].LossScaler = scaler
    instance = scaler()
    instance.cur_scale, instance.dynamic = 1.0, False
    return stage.weights, instance


def write_zero3(folder, shapes, master, moments):
    """shapes: name -> tuple, in order; one sub-group; the flat tensors are given."""
    stage, scaler = deepspeed_classes()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    sizes = collections.OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())
    module = collections.OrderedDict((name, torch.empty(0)) for name in shapes)
    model = {
        "module": module, "buffer_names": [], "optimizer": None, "param_shapes": [sizes],
        "frozen_param_shapes": collections.OrderedDict(), "shared_params": {},
        "frozen_param_fragments": collections.OrderedDict(), "lr_scheduler": None,
        "data_sampler": None, "random_ltd": None, "skipped_steps": 0, "global_steps": 3,
        "global_samples": 3, "dp_world_size": 1, "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}, "ds_config": config,
        "ds_version": "0.19.8",
    }
    state = {"step": torch.tensor(3.0), **moments}
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.01,
             "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
             "differentiable": False, "fused": None, "params": [0]}
    optimizer = {
        "zero_stage": stage, "loss_scaler": scaler, "dynamic_loss_scale": False, "overflow": False,
        "partition_count": 1,
        "optimizer_state_dict": {"state": {0: state}, "param_groups": [group]},
        "fp32_flat_groups": [master],
    }
    tag = os.path.join(folder, "global_step3")
    save(model, os.path.join(tag, "zero_pp_rank_0_mp_rank_00_model_states.pt"))
    save({"optimizer_state_dict": optimizer, "ds_config": config, "ds_version": "0.19.8"},
         os.path.join(tag, "zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    with open(os.path.join(folder, "latest"), "w", encoding="utf-8") as file:
        file.write("global_step3")


# ---- the three cases -----------------------------------------------------------------------------


def weights(work):
    began = time.monotonic()
    path = os.path.join(work, "pytorch_model.bin")
    big = zeros(BIG_BYTES, torch.uint8)
    values = {0: 1, 2**31: 2, 2**32 - 1: 3, 2**32: 4, BIG_BYTES - 1: 5}
    for index, value in values.items():
        big[index] = value
    small = torch.tensor([1.5, -2.0, 3.25])
    save({"big": big, "small": small}, path)
    check(os.path.getsize(path) > BIG_BYTES, "the file is too small")
    pieces = {index: bytes([value]) for index, value in values.items()}
    leaves = {"big": ("uint8", [BIG_BYTES], pieces, BIG_BYTES),
              "small": ("float32", [3], {0: small.numpy().tobytes()}, 12)}
    found = section(path, "weights")
    expected = (weights_section(leaves), 2, BIG_BYTES + 3)
    check(found == expected, f"digest of {path}: {found} instead of {expected}")
    inspected = run("inspect", path, "--no-progress")
    check(bool(inspected.strip()), "inspect says nothing")
    say("weights: a 4 GiB record and a small one behind it are read as torch wrote them", began)


def master(work):
    began = time.monotonic()
    source = os.path.join(work, "source")
    flat = zeros(BIG_FLOATS + 5, torch.float32)
    values = {0: 1.0, 2**29: -2.0, 2**30 - 1: 3.0, 2**30: 4.0, BIG_FLOATS - 1: 5.0}
    for index, value in values.items():
        flat[index] = value
    flat[BIG_FLOATS:] = torch.arange(1.0, 6.0)
    moment = zeros(BIG_FLOATS + 5, torch.float32)
    moment[2**30 + 3] = 0.5
    moment[-1] = 0.25
    square = zeros(BIG_FLOATS + 5, torch.float32)
    square[7] = 0.125
    shapes = {"big.weight": (BIG_FLOATS // 16, 16), "small.bias": (5,)}
    write_zero3(source, shapes, flat, {"exp_avg": moment, "exp_avg_sq": square})
    say("master: a ZeRO-3 checkpoint of 12 GiB is written by torch.save", began)

    fp32 = os.path.join(work, "fp32")
    run("convert", source, fp32, "--to", "fp32", "--format", "bin", "--max-shard-size", "20GB",
        "--no-progress")
    state = reread(os.path.join(fp32, "pytorch_model.bin"))
    check(list(state) == list(shapes), f"names {list(state)}")
    expect_sparse(state["big.weight"], values, "fp32 big.weight")
    check(tuple(state["big.weight"].shape) == shapes["big.weight"], "fp32 shape")
    check(torch.equal(state["small.bias"], flat[BIG_FLOATS:]), "fp32 small.bias")
    say("master: our fp32 .bin is read by torch.load and zipfile", began)

    universal = os.path.join(work, "universal")
    run("convert", source, universal, "--to", "universal", "--no-progress")
    folder = os.path.join(universal, "zero", "big.weight")
    moments = ("exp_avg", {2**30 + 3: 0.5}), ("exp_avg_sq", {7: 0.125})
    for name, expected in (("fp32", values), *moments):
        value = reread(os.path.join(folder, name + ".pt"))
        value = value["param"] if isinstance(value, dict) else value
        check(value.numel() == BIG_FLOATS, f"universal {name}: {value.numel()} elements")
        expect_sparse(value, expected, f"universal {name}")
    small = reread(os.path.join(universal, "zero", "small.bias", "exp_avg.pt"))
    small = small["param"] if isinstance(small, dict) else small
    check(torch.equal(small.reshape(-1), moment[BIG_FLOATS:]), "universal small.bias exp_avg")
    source_digest = [section(source, name) for name in ("weights", "exp_avg", "exp_avg_sq")]
    target_digest = [section(universal, name) for name in ("weights", "exp_avg", "exp_avg_sq")]
    check(source_digest == target_digest, "the universal folder has another digest")
    check(section(fp32, "weights") == source_digest[0], "the fp32 file has another digest")
    say("master: our universal files beyond 4 GiB are read by torch.load and zipfile", began)


def many(work):
    began = time.monotonic()
    path = os.path.join(work, "pytorch_model.bin")
    flat = torch.arange(float(MANY))
    names = [f"layers.{i}.weight" for i in range(MANY)]
    save({name: flat[i : i + 1].clone() for i, name in enumerate(names)}, path)
    found = section(path, "weights")
    check(found[1:] == (MANY, MANY), f"digest of {MANY} tensors counts {found}")
    say(f"many: {MANY} records of torch.save are read", began)

    source, fp32 = os.path.join(work, "source"), os.path.join(work, "fp32")
    shapes = {name: (1,) for name in names}
    moments = {"exp_avg": torch.zeros(MANY), "exp_avg_sq": torch.zeros(MANY)}
    write_zero3(source, shapes, flat, moments)
    run("convert", source, fp32, "--to", "fp32", "--format", "bin", "--no-progress")
    state = reread(os.path.join(fp32, "pytorch_model.bin"))
    check(list(state) == names, "names of our file")
    check(torch.equal(torch.cat(list(state.values())), flat), "values of our file")
    check(section(fp32, "weights") == found, "the same tensors have another digest")
    with zipfile.ZipFile(os.path.join(fp32, "pytorch_model.bin")) as archive:
        check(len(archive.infolist()) > 65_535, f"{len(archive.infolist())} records only")
    say(f"many: our file of {MANY} records is read by torch.load and zipfile", began)


def main():
    if torch is None:
        if ARGUMENTS.python:  # once more, in the interpreter that has it
            arguments = ["-B", __file__, PROGRAM, ARGUMENTS.traces]
            os.execv(ARGUMENTS.python, [ARGUMENTS.python, *arguments])
        print("SKIPPED: no torch in this Python; name one that has it with --python")
        sys.exit(77)
    began, peak = time.monotonic(), 0
    for case in (weights, master, many):
        with tempfile.TemporaryDirectory(prefix="isoshard-large-") as work:
            case(work)
            peak = max(peak, disk_bytes(work))
    print(f"all read on both sides; torch {torch.__version__}, {peak >> 20} MiB of disk at most, "
          f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("traces")
    parser.add_argument("--python", default=os.environ.get("ISOSHARD_TORCH_PYTHON"))
    ARGUMENTS = parser.parse_args()
    PROGRAM = os.path.abspath(ARGUMENTS.program)
    main()
