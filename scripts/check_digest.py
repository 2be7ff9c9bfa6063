#!/usr/bin/env python3
"""Computes iso1 digests (docs/formats/digest.md) a second time, to judge `isoshard digest`.

    check_digest.py SOURCE [--against PROGRAM]

SOURCE: a save folder, tag folder (ZeRO 1 to 3), universal folder, or pytorch_model.bin. Tensors are
put together whole and their CRC-64s taken byte by byte; the program adds up CRCs of fragments.
Prints all sections but `hyper`; --against compares them and the root with what the program prints.
Not verified: `hyper`, stage 0, mp ranks, experts. Exit: 0 printed or equal, 1 different, 2 neither.
"""
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from compare_torch import ITEM_BYTES, Tensor, Unreadable, load, require
dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def crc64(polynomial, data):
    table, crc = range(256), 2**64 - 1
    for _ in range(8):
        table = [entry >> 1 ^ (polynomial if entry & 1 else 0) for entry in table]
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return f"{crc ^ 2**64 - 1:016x}"


class Leaves(dict):  # section -> [(name, state, canonical line, elements)]
    def put(self, section, name, state, elements, *fields):
        line = "\t".join([dump(name), state, *fields]) + "\n"
        self.setdefault(section, []).append((name, state, line, elements))

    def tensor(self, name, state, dtype, shape, data):
        require(len(data) == math.prod(shape) * ITEM_BYTES[dtype], f"size of {name} {state}")
        section = {"weight": "weights", "buffer": "buffers"}.get(state, state)
        crcs = [crc64(reflected, data) for reflected in (0xC96C5795D7870F42, 0x95AC9329AC4BC9B5)]
        self.put(section, name, state, math.prod(shape), dtype, dump(shape), *crcs)

    def scalar(self, name, state, value):
        if isinstance(value, Tensor):
            value, = memoryview(value.bits()).cast({"float32": "f", "int64": "q"}[value.dtype])
        if value is not None:
            require(value == int(value), f"{name} {state} is {value}, not whole")
            self.put("steps", name, state, 1, str(int(value)))

    def slots(self, names, state, parts, gaps):
        """Cuts flat buffers: each parameter takes one slot of every part, then a gap follows."""
        begin, dtype, flats = 0, parts[0].dtype, [bytes(part.bits()) for part in parts]
        width, flats = ITEM_BYTES[dtype], [b"".join(flats)] if gaps else flats
        for (name, shape), gap in zip(names.items(), gaps or [0] * len(names)):
            end = begin - (-math.prod(shape) // len(flats))  # rounded up
            data = b"".join(flat[begin * width:end * width] for flat in flats)
            self.tensor(name, state, dtype, shape, data[:math.prod(shape) * width])
            begin = end + gap

    def zero(self, shapes, optims):
        """Stages 1 and 2: the ranks' partitions in a row; stage 3: a slot of each rank."""
        base, master = "base_optimizer_state", "single_partition_of_fp32_groups"
        if stage3 := "fp32_flat_groups" in optims[0]:
            base, master = "optimizer_state_dict", "fp32_flat_groups"
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
        common = load(str(folder / "optimizer_state.pt"))
        stage3 = "fp32_flat_groups" in common
        for i, name in ((i, name) for i, names in enumerate(shapes) for name in names):
            for path in (folder / name).glob("*.pt"):
                state, value = path.stem.replace("fp32", "weight"), load(str(path))
                if stage3 or isinstance(value, dict):
                    tensor = value["param"] if isinstance(value, dict) else value
                    shape = tensor.shape if isinstance(value, dict) else shapes[i][name]
                    self.tensor(name, state, tensor.dtype, shape, tensor.bits())
                else:
                    self.scalar(name, state, value)
            if stage3:
                self.scalar(name, "step", common["optimizer_state_dict"]["state"][i]["step"])

    def module(self, models):
        """Frozen parameters, buffers and aliases; all there is, in a file of weights."""
        for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
            fragments = [model["frozen_param_fragments"][name] for model in models]
            self.slots({name: shape}, "weight", fragments, None)
        known, views = {name for name, *_ in self.get("weights", [])}, {}
        for name, tensor in models[0]["module"].items():
            first = views.setdefault(tensor.view() if math.prod(tensor.shape) else name, name)
            target = models[0].get("shared_params", {name: first}).get(name, name)
            if name in models[0].get("buffer_names", []):
                self.tensor(name, "buffer", tensor.dtype, tensor.shape, tensor.bits())
            elif target != name:
                self.put("weights", name, "alias", 0, dump(target))
            elif name not in known:
                self.tensor(name, "weight", tensor.dtype, tensor.shape, tensor.bits())
        return self

    def read(self, source):
        for pointer in sorted(source.glob("latest*")):
            return self.read(source / pointer.read_text().strip())
        if source.suffix == ".bin":
            paper = source.parent / "certificate.json"
            names = json.loads(paper.read_text()).get("buffers", []) if paper.exists() else []
            return self.module([{"module": load(str(source)), "buffer_names": names}])
        paths = sorted(map(str, source.glob("*_states.pt")), key=lambda path: (len(path), path))
        models, optims = ([load(p) for p in paths if kind in p] for kind in ("_model_", "_optim_"))
        outside = models[0].get("num_experts") or optims and "mp_rank_00" not in paths[-1]
        require(models[0]["module"] and models[0]["param_shapes"] and not outside, "not covered")
        if optims:
            self.zero(models[0]["param_shapes"], [file["optimizer_state_dict"] for file in optims])
        else:
            self.universal(models[0]["param_shapes"], source / "zero")
        return self.module(models)

    def rows(self):
        moments = sorted(self.keys() - {"weights", "steps", "buffers"})
        for section in [name for name in ("weights", *moments, "steps", "buffers") if name in self]:
            _, states, lines, counts = zip(*sorted(self[section]))
            digest = hashlib.sha256("".join(lines).encode()).hexdigest()
            tensors = str(len(lines) - states.count("alias"))
            yield [f"iso1:{digest}", section, tensors, str(sum(counts))]


def main(source, option="", program=""):
    try:
        rows = found = list(Leaves().read(Path(source)).rows())
    except (Unreadable, ValueError, LookupError, OSError) as error:
        return print(f"check_digest: {source!r}: {error!r}", file=sys.stderr) or 2
    if option == "--against":
        run = subprocess.run([program, "digest", source], stdout=subprocess.PIPE, text=True)
        found = [line.split("  ") for line in run.stdout.splitlines() if line.startswith("iso1:")]
        rows = rows + [row for row in found if row[1] == "hyper"]
        root = hashlib.sha256("".join(f"{row[1]}\t{row[0][5:]}\n" for row in rows).encode())
        totals = (str(sum(int(row[column]) for row in rows)) for column in (2, 3))
        rows.insert(0, ["iso1:" + root.hexdigest(), "root", *totals])
    print("\n".join("  ".join(row) for row in rows))
    if option == "--against":
        print("equal" if found == rows else f"different; {program} says\n{run.stdout}")
    return int(found != rows)

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) in (2, 4) else print(__doc__) or 2)
