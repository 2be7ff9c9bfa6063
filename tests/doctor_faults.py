"""Puts each fault that `isoshard doctor` knows into a copy of a checkpoint, for tests/doctor.py.

Every mutator follows the fault's own mechanism: fragments are joined sorted as text, moments are
made of zeros under the old step, a shorter file is laid over a longer one. Python's standard
library only. Not verified here: anything.
"""

import io
import pickle
import struct
import zlib
from pathlib import Path

import hostile as h

NONCE = "0123456789abcdef" * 2


def read(path):
    """(prefix, records) of an archive."""
    return h.split_zip(path)


def write(path, prefix, records):
    path.write_bytes(h.join_zip(prefix, records))


# ---- which record holds which tensor -------------------------------------------------------------


class Inert:
    """Stands for every class and function of a pickle; keeps what it was called with."""

    def __new__(cls, *arguments):
        made = super().__new__(cls)
        made.arguments, made.state, made.pairs = arguments, None, {}
        return made

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.pairs[key] = value

    def append(self, item):
        self.arguments += (item,)


class Loader(pickle.Unpickler):
    def find_class(self, module, name):
        return type(name, (Inert,), {})

    def persistent_load(self, pid):
        return ("storage", pid[2])


def tensors(data_pkl):
    """(path of keys, key of the storage) of every tensor of a pickle."""

    def walk(value, path):
        if isinstance(value, Inert):
            if value.arguments and isinstance(value.arguments[0], tuple):
                if value.arguments[0][:1] == ("storage",):
                    yield path, value.arguments[0][1]
                    return
            for inner in (*value.arguments, value.state, value.pairs):
                yield from walk(inner, path)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, (*path, key))
        elif isinstance(value, (list, tuple)):
            for number, inner in enumerate(value):
                yield from walk(inner, (*path, number))

    return list(walk(Loader(io.BytesIO(data_pkl)).load(), ()))


def zero_tensors(path, chosen):
    """The storages of tensors whose path of keys is chosen become zeros; how many."""
    prefix, records = read(path)
    count = 0
    for keys, storage in tensors(records["data.pkl"]):
        if chosen(keys):
            records[f"data/{storage}"] = bytes(len(records[f"data/{storage}"]))
            count += 1
    if count:
        write(path, prefix, records)
    return count


def is_moment(keys):
    return any(key in ("exp_avg", "exp_avg_sq") for key in keys)


def zero_moments(folder, chosen=lambda path: True):
    """Of a tag folder, or a universal one, in the files that are chosen."""
    count = 0
    for path in sorted(Path(folder).rglob("*.pt")):
        own = path.stem in ("exp_avg", "exp_avg_sq")
        if chosen(path):
            count += zero_tensors(path, (lambda keys: True) if own else is_moment)
    assert count, folder
    return count


# ---- ranks in the order of their digits ----------------------------------------------------------


def rename_by_text(tag, pattern, key=str):
    """The file of every rank gets the name of the rank that stands in its place when sorted as
    text: rank 2's place holds rank 10."""
    ranks = {}
    for path in tag.glob(pattern):
        ranks[int(path.name.split("pp_rank_")[1].split("_")[0])] = path
    order = sorted(ranks, key=key)
    assert order != sorted(ranks)
    aside = {rank: path.rename(tag / f"aside{rank}") for rank, path in ranks.items()}
    for place, rank in enumerate(order):
        aside[rank].rename(ranks[place])
    return ranks


def join_by_text(universal, shapes, ranks):
    """fp32 and moments of every parameter, cut as stages 1 and 2 cut it, joined sorted as text.

    shapes: [(name, numel)] of each group, in flat order. Returns how many parameters changed.
    """
    changed = 0
    for group in shapes:
        total = sum(numel for _, numel in group)
        partition = -(-total // (2 * ranks)) * 2
        offset = 0
        for name, numel in group:
            pieces = {}
            for rank in range(offset // partition, (offset + numel - 1) // partition + 1):
                begin = max(offset, rank * partition) - offset
                pieces[rank] = (begin, min(offset + numel, (rank + 1) * partition) - offset)
            offset += numel
            order = sorted(pieces, key=str)
            if order == sorted(pieces):
                continue
            changed += 1
            for state in ("fp32", "exp_avg", "exp_avg_sq"):
                path = universal / "zero" / name / f"{state}.pt"
                prefix, records = read(path)
                data = records["data/0"]
                records["data/0"] = b"".join(
                    data[4 * pieces[rank][0] : 4 * pieces[rank][1]] for rank in order
                )
                assert len(records["data/0"]) == len(data)
                write(path, prefix, records)
    return changed


# ---- single files --------------------------------------------------------------------------------


def lay_over(path, shorter):
    """The bytes of a shorter file over those of a longer one, whose end stays."""
    old, new = path.read_bytes(), shorter
    assert len(new) + 22 < len(old), (len(new), len(old))
    path.write_bytes(new + old[len(new) :])


def append_end(path, new, block):
    """A new file's whole blocks over an older file, and the rest of it behind that."""
    old, front = path.read_bytes(), len(new) // block * block
    assert 0 < front < len(new) and front <= len(old), (front, len(new), len(old))
    path.write_bytes(new[:front] + old[front:] + new[front:])
    return front


def longer(path):
    """The archive with a bigger second storage: what an earlier save may have left."""
    prefix, records = read(path)
    name = [each for each in records if each.startswith("data/")][-1]
    records[name] = records[name] + b"\7" * 4096
    return h.join_zip(prefix, records)


def other_save(path, more=0):
    """What an earlier save has left: other values and CRCs, a last storage that was longer."""
    prefix, records = read(path)
    name = next(each for each in records if each.startswith("data/") and records[each])
    records[name] = bytes(byte ^ 1 for byte in records[name])
    last = [each for each in records if each.startswith("data/")][-1]
    records[last] += b"\7" * more
    return h.join_zip(prefix, records)


def keep_padding(universal, name, ranks):
    """A stage-3 parameter with its slots' padding, in every state."""
    for path in (universal / "zero" / name).glob("*.pt"):
        prefix, records = read(path)
        data = records["data/0"]
        padded = -(-(len(data) // 4) // ranks) * ranks
        pickled = h.program(h.tensor((padded,), (1,), numel=padded))
        data = data + bytes(4 * padded - len(data))
        path.write_bytes(h.torch_file(pickled, [data], prefix=prefix))


def with_zip64_end(data):
    """The same archive, whose end record leaves size and place of the directory to zip64's."""
    return data[:-10] + b"\xff" * 8 + data[-2:]


def wrong_zip64_end(data):
    """Its zip64 end record says another place."""
    at = len(data) - 22 - 20 - 56
    assert data[at : at + 4] == b"PK\6\6", data[at:]
    return data[: at + 48] + struct.pack("<Q", 1) + data[at + 56 :]


def other_step(path, value=7.0, chosen=lambda keys: True):
    """A step that the other ranks, or the other groups, do not stand at."""
    prefix, records = read(path)
    count = 0
    for keys, storage in tensors(records["data.pkl"]):
        if keys[-1] == "step" and chosen(keys):
            records[f"data/{storage}"] = struct.pack("<f", value)
            count += 1
    assert count, path
    write(path, prefix, records)


# ---- files of great size, nearly all of them holes -----------------------------------------------


def enlarge(universal, rows):
    """Both `up.weight` of the recorded model at stage 3 get so many rows of 10, as holes."""
    shape = h.integer(17) + h.integer(10) + b"\x86"
    total = 0
    for path in sorted(universal.rglob("*.pt")):
        prefix, records = read(path)
        if path.parent.name.endswith("up.weight"):
            records["data.pkl"] = records["data.pkl"].replace(h.integer(170), h.integer(rows * 10))
            total += sparse_zip(path, prefix, records, {"data/0": rows * 40})
        elif path.name.endswith("model_states.pt"):
            grown = h.integer(rows) + h.integer(10) + b"\x86"
            records["data.pkl"] = records["data.pkl"].replace(shape, grown)
            write(path, prefix, records)
    return total


def sparse_zip(path, prefix, records, sizes):
    """An archive whose records named in `sizes` are holes of that many bytes, with a CRC that is
    not that of zeros. Returns the file's size."""
    directory = b""
    with open(path, "wb") as out:
        for name, data in records.items():
            full = f"{prefix}/{name}".encode()
            size = sizes.get(name, len(data))
            crc = 0x12345678 if name in sizes else zlib.crc32(data)
            flags = 0x0808 if size else 0x0800
            header = out.tell()
            assert size < 2**32 - 1 and header < 2**32 - 1
            fill = -(header + 30 + len(full) + 4) % h.ALIGNMENT
            out.write(struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, flags, 0, 0, 0, 0, 0, 0,
                                  len(full), fill + 4))
            out.write(full + struct.pack("<HH", 0x4246, fill) + b"Z" * fill)
            if name in sizes:
                out.seek(size, 1)
            else:
                out.write(data)
            if size:
                out.write(struct.pack("<IIII", 0x08074B50, crc, size, size))
            directory += struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 0, 0, flags, 0, 0, 0, crc,
                                     size, size, len(full), 0, 0, 0, 0, 0, header) + full
        at, number = out.tell(), len(records)
        assert at < 2**32 - 1
        out.write(directory)
        end = out.tell()
        out.write(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 45, 0, 0, number, number,
                              len(directory), at))
        out.write(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        out.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, number, number, len(directory), at, 0))
        return out.tell()
