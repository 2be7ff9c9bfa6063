"""What must be left of a damaged checkpoint, derived a second time: from the undamaged recording,
by way of offsets, in Python's standard library only.

A place is (file, storage key); Truth says of every tensor which elements lie at which place, and
what they are. Not covered: tensor-parallel ranks, stage 0.
"""

import math
import struct
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from compare_torch import ITEM_BYTES, Tensor, load  # noqa: E402


def as_float32(dtype, data):
    if dtype == "bfloat16":
        return b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    if dtype == "float16":
        halves = struct.unpack(f"<{len(data) // 2}e", data)
        return struct.pack(f"<{len(halves)}f", *halves)
    return bytes(data)


class Truth:
    """entries: (name, state) → dtype, shape, [(begin, count, place)], bytes, copy or None."""

    def __init__(self, folder):
        self.files = {path.name: load(str(path)) for path in sorted(folder.glob("*_states.pt"))}
        by_rank = sorted(self.files, key=lambda name: (len(name), name))
        self.models = [name for name in by_rank if "_model_" in name]
        self.optims = [name for name in by_rank if "_optim_" in name]
        self.entries = {}
        model = self.files[self.models[0]]
        for i, shapes in enumerate(model["param_shapes"]):
            self.group(i, shapes)
        self.module(model)

    def put(self, name, state, shape, parts, copy=None):
        """`parts`: (tensor, first element of it, elements, file), in order."""
        runs, begin, data = [], 0, b""
        for tensor, first, count, file in parts:
            if count == 0:
                continue
            width = ITEM_BYTES[tensor.dtype]
            runs.append((begin, count, (file, tensor.storage.key)))
            data += bytes(tensor.bits())[first * width : (first + count) * width]
            begin += count
        dtype = parts[0][0].dtype
        assert len(data) == math.prod(shape) * ITEM_BYTES[dtype], (name, state)
        self.entries[name, state] = (dtype, list(shape), runs, data, copy)

    def group(self, i, shapes):
        optims = [self.files[name]["optimizer_state_dict"] for name in self.optims]
        stage3 = "fp32_flat_groups" in optims[0]
        base, master = "base_optimizer_state", "single_partition_of_fp32_groups"
        if stage3:
            base, master = "optimizer_state_dict", "fp32_flat_groups"
        states = {"weight": [optim[master][i] for optim in optims]}
        for key, value in optims[0][base]["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.shape:
                states[key] = [optim[base]["state"][i][key] for optim in optims]
        gaps = (optims[0].get("param_alignment_paddings") or {}) if not stage3 else {}
        gaps = gaps[i] if gaps else [0] * len(shapes)
        dp, at = len(optims), 0
        total = sum(math.prod(shape) for shape in shapes.values()) + sum(gaps)
        partition = -(-total // (2 * dp)) * 2  # padded to a multiple of 2·dp
        for (name, shape), gap in zip(shapes.items(), gaps):
            n = math.prod(shape)
            for state, flats in states.items():
                parts = []
                for rank, flat in enumerate(flats):
                    if stage3:
                        slot = -(-n // dp)
                        first, count = at, max(0, min(slot, n - rank * slot))
                    else:
                        begin = max(at, rank * partition)
                        first = begin - rank * partition
                        count = max(0, min(at + n, (rank + 1) * partition) - begin)
                    parts.append((flat, first, count, self.optims[rank]))
                self.put(name, state, shape, parts)
            at += -(-n // dp) if stage3 else n + gap

    def module(self, model):
        trained = {name for shapes in model["param_shapes"] for name in shapes}
        shared = model.get("shared_params") or {}
        stage3 = len(self.models) > 1
        frozen = model.get("frozen_param_shapes") or {} if stage3 else {}
        for name, shape in frozen.items():
            n, parts = math.prod(shape), []
            slot = -(-n // len(self.models))
            for rank, file in enumerate(self.models):
                tensor = self.files[file]["frozen_param_fragments"][name]
                parts.append((tensor, 0, max(0, min(slot, n - rank * slot)), file))
            self.put(name, "weight", shape, parts)
        for name, tensor in model["module"].items():
            whole = (tensor, 0, math.prod(tensor.shape), self.models[0])
            if name in model["buffer_names"]:
                self.put(name, "buffer", tensor.shape, [whole])
            elif name in trained and not stage3:
                entry = self.entries[name, "weight"]
                copy = (self.models[0], tensor.storage.key), tensor.dtype, bytes(tensor.bits())
                self.entries[name, "weight"] = (*entry[:4], copy)
            elif name not in trained and name not in frozen and name not in shared:
                self.put(name, "weight", tensor.shape, [whole])

    def expected(self, lost):
        """(name, state) → status, lost runs, kept runs; `lost`: places that are damaged."""
        result = {}
        for key, (_, shape, runs, _, copy) in self.entries.items():
            bad = merged([(b, c) for b, c, place in runs if place in lost])
            good = merged([(b, c) for b, c, place in runs if place not in lost])
            others = [] if key[1] != "buffer" else self.models[1:]
            if not bad:
                status = "exported"
            elif any(self.place_in(file, key[0]) not in lost for file in others):
                status = "exported"
            elif copy and copy[0] not in lost:
                status = "copy"
            else:
                status = "partial" if good else "lost"
            result[key] = status, bad, good
        return result

    def place_in(self, file, name):
        return file, self.files[file]["module"][name].storage.key

    def places(self, file):
        """Every storage of a file."""
        found = set()

        def walk(item):
            if isinstance(item, Tensor):
                found.add((file, item.storage.key))
            elif isinstance(item, dict):
                for value in item.values():
                    walk(value)
            elif isinstance(item, (list, tuple)):
                for value in item:
                    walk(value)

        walk(self.files[file])
        return found


def merged(runs):
    result = []
    for begin, count in sorted(runs):
        if result and sum(result[-1]) == begin:
            result[-1][1] += count
        else:
            result.append([begin, count])
    return result


def record_ends(path):
    """Record name below the prefix → where its data begins, and where it and its CRC end."""
    result, data = {}, Path(path).read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name_bytes, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
            begin = info.header_offset + 30 + name_bytes + extra
            name = info.filename.split("/", 1)[1]
            end = begin + info.file_size
            result[name] = begin, end, end + (16 if info.file_size else 0)
    return result
