#!/usr/bin/env python3
"""Computes iso1 digests (docs/formats/digest.md) a second time, to judge `isoshard digest`.

    check_digest.py SOURCE [--against PROGRAM]

SOURCE: a save folder, tag folder (ZeRO 1 to 3), universal folder, or pytorch_model.bin. Tensors are
put together whole and their CRC-64s taken byte by byte; the program adds up CRCs of fragments.
Prints every section but `hyper`; with --against, compares them with the program's, and its root,
taking only `hyper` on trust. Standard library only; compare_torch.py reads the files. Not verified:
`hyper`, reasons of absent sections, stage 0, BF16_Optimizer. Exit status: 0 printed, or equal;
1 different; 2 cannot read.
"""
import glob
import hashlib
import json
import math
import os
import re
import subprocess
import sys

from compare_torch import ITEM_BYTES, Tensor, Unreadable, load, require

ECMA, JONES = 0xC96C5795D7870F42, 0x95AC9329AC4BC9B5  # reflected
dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def crc64(polynomial, data):
    table, crc = range(256), 2**64 - 1
    for _ in range(8):
        table = [entry >> 1 ^ (polynomial if entry & 1 else 0) for entry in table]
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return f"{crc ^ 2**64 - 1:016x}"


class Leaves(dict):
    """section -> [(name, state, canonical line, elements)]"""

    def put(self, section, name, state, elements, *fields):
        line = "\t".join([dump(name), state, *fields]) + "\n"
        self.setdefault(section, []).append((name, state, line, elements))

    def tensor(self, name, state, tensor, shape=None, data=None):
        shape, data = tensor.shape if shape is None else shape, data or tensor.bits()
        require(len(data) == math.prod(shape) * ITEM_BYTES[tensor.dtype], f"size of {name} {state}")
        section = {"weight": "weights", "buffer": "buffers"}.get(state, state)
        crcs = crc64(ECMA, data), crc64(JONES, data)
        self.put(section, name, state, math.prod(shape), tensor.dtype, dump(shape), *crcs)

    def scalar(self, name, state, value):
        if isinstance(value, Tensor):
            value, = memoryview(value.bits()).cast({"float32": "f", "int64": "q"}[value.dtype])
        if value is not None:
            require(value == int(value), f"{name} {state} is {value}, not whole")
            self.put("steps", name, state, 1, str(int(value)))

    def slots(self, names, state, parts, gaps):
        """Cuts flat buffers: each parameter takes one slot of every part, then a gap follows."""
        begin, width, flats = 0, ITEM_BYTES[parts[0].dtype], [bytes(part.bits()) for part in parts]
        flats = [b"".join(flats)] if gaps else flats
        for (name, shape), gap in zip(names.items(), gaps or [0] * len(names)):
            end = begin - -math.prod(shape) // len(flats)
            data = b"".join(flat[begin * width:end * width] for flat in flats)
            self.tensor(name, state, parts[0], shape, data[:math.prod(shape) * width])
            begin = end + gap

    def zero(self, shapes, optims):
        """Stages 1 and 2: the ranks' partitions in a row; stage 3: a slot of each rank."""
        base, master, stage3 = "optimizer_state_dict", "fp32_flat_groups", True
        if "base_optimizer_state" in optims[0]:
            base, master, stage3 = "base_optimizer_state", "single_partition_of_fp32_groups", False
        for i, names in enumerate(shapes):
            no_gaps = {i: [0] * len(names)}
            gaps = None if stage3 else optims[0].get("param_alignment_paddings", no_gaps)[i]
            self.slots(names, "weight", [optim[master][i] for optim in optims], gaps)
            states = [optim[base]["state"].get(i, {}) for optim in optims]
            for key, value in states[0].items():
                if isinstance(value, Tensor) and value.shape:
                    self.slots(names, key, [state[key] for state in states], gaps)
                else:
                    [self.scalar(name, key, value) for name in names]

    def universal(self, shapes, folder):
        common = load(os.path.join(folder, "optimizer_state.pt"))
        stage3 = "fp32_flat_groups" in common
        for i, name in [(i, name) for i, names in enumerate(shapes) for name in names]:
            for path in glob.glob(os.path.join(folder, glob.escape(name), "*.pt")):
                state, value = os.path.basename(path)[:-3].replace("fp32", "weight"), load(path)
                if stage3 or isinstance(value, dict):
                    self.tensor(name, state, value if stage3 else value["param"], shapes[i][name])
                else:
                    self.scalar(name, state, value)
            if stage3:
                self.scalar(name, "step", common["optimizer_state_dict"]["state"][i]["step"])

    def module(self, models):
        """Frozen parameters, buffers and aliases; all there is, in a file of weights."""
        frozen = (models[0].get("frozen_param_shapes") or {}) if len(models) > 1 else {}
        for name, shape in frozen.items():
            fragments = [model["frozen_param_fragments"][name] for model in models]
            self.slots({name: shape}, "weight", fragments, None)
        known, views = {name for name, *_ in self.get("weights", [])}, {}
        for name, tensor in models[0]["module"].items():
            first = views.setdefault(tensor.view() if math.prod(tensor.shape) else name, name)
            target = models[0].get("shared_params", {name: first}).get(name, name)
            if name in models[0].get("buffer_names", []):
                self.tensor(name, "buffer", tensor)
            elif target != name:
                self.put("weights", name, "alias", 0, dump(target))
            elif name not in known:
                self.tensor(name, "weight", tensor)

    def read(self, source):
        for pointer in glob.glob(os.path.join(source, "latest*")):
            with open(pointer) as stream:
                return self.read(os.path.join(source, stream.read().strip()))
        if source.endswith(".bin"):
            return self.module([{"module": load(source)}])
        models, optims = ([load(path) for path in sorted(  # by rank
            glob.glob(os.path.join(source, f"*_{kind}_states.pt")), key=lambda path: [
                int(digits) for digits in re.findall(r"\d+", os.path.basename(path))])]
            for kind in ("model", "optim"))
        require(models and models[0]["param_shapes"], "no model file of ZeRO 1 to 3")
        if optims:
            self.zero(models[0]["param_shapes"], [file["optimizer_state_dict"] for file in optims])
        else:
            self.universal(models[0]["param_shapes"], os.path.join(source, "zero"))
        return self.module(models)

    def lines(self):
        moments = sorted(self.keys() - {"weights", "steps", "buffers"})
        for section in [name for name in ("weights", *moments, "steps", "buffers") if name in self]:
            lines = sorted(self[section])
            digest = hashlib.sha256("".join(line[2] for line in lines).encode()).hexdigest()
            yield (f"iso1:{digest}  {section}  {sum(line[1] != 'alias' for line in lines)}"
                   f"  {sum(line[3] for line in lines)}")


def main(source, *against):
    leaves = Leaves()
    try:
        leaves.read(source)
    except (Unreadable, ValueError, LookupError, OSError) as error:
        return f"check_digest: {source!r}: {error!r}"
    lines = list(leaves.lines())
    print("\n".join(lines))
    if not against:
        return None
    run = subprocess.run([against[-1], "digest", source], stdout=subprocess.PIPE, text=True)
    found = [line for line in run.stdout.splitlines() if line.startswith("iso1:")]
    cells = [line[5:].split("  ") for line in lines + found[-1:] * found[-1].endswith("hyper  0  0")]
    root = hashlib.sha256("".join(f"{cell[1]}\t{cell[0]}\n" for cell in cells).encode())
