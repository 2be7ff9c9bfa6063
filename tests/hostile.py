"""Makes hostile checkpoints from nothing, so that the corpus needs no binary files.

  zip      torch_zip(): an archive as torch.save writes it, and the tricks that break its rules
  pickle   small functions that return opcodes; weights() puts tensors together
  ZeRO     ZeroFolder: a recorded DeepSpeed checkpoint that is taken apart, edited and put together

Used by tests/damage.py and tests/crash.py. Python's standard library only. Not verified here:
anything; these are generators.
"""

import json
import os
import pickle
import struct
import zlib
from pathlib import Path

# ---- zip, as caffe2/serialize/inline_container.cc writes it --------------------------------------

ALIGNMENT = 64


class Record:
    """A stored record. Fields left at None get the value that torch writes."""

    def __init__(self, name, data, **tricks):
        self.name, self.data = name, data
        self.tricks = {
            "crc": None,
            "method": 0,
            "flags": None,
            "local_name": None,
            "local_size": None,
            "central_size": None,
            "offset": None,
            "raw": None,
            "time": 0,
            "version": 0,
            "central_extra": b"",
            "central_comment": b"",
            "attributes": 0,
        }
        assert set(tricks) <= set(self.tricks), tricks
        self.tricks.update(tricks)

    def __getattr__(self, key):
        return self.__dict__["tricks"][key]


def torch_zip(
    records, before=b"", after=b"", comment=b"", count=None, directory_shift=0, end64=True
):
    """The bytes of an archive. `records`: pairs of full name and data, or Records."""
    out, directory = bytearray(before), bytearray()
    for item in records:
        record = item if isinstance(item, Record) else Record(*item)
        stored = record.data if record.raw is None else record.raw
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        flags = (0x0808 if record.data else 0x0800) if record.flags is None else record.flags
        name = record.name.encode() if isinstance(record.name, str) else record.name
        local_name = name if record.local_name is None else record.local_name.encode()
        header = len(out)
        fill = -(header + 30 + len(local_name) + 4) % ALIGNMENT
        now = (0, 0, 0) if flags & 8 else (crc, len(stored), len(record.data))
        out += struct.pack(
            "<IHHHHHIIIHH",
            0x04034B50,
            record.version,
            flags,
            record.method,
            record.time,
            0,
            *now,
            len(local_name),
            fill + 4,
        )
        out += local_name + struct.pack("<HH", 0x4246, fill) + b"Z" * fill + stored
        size = len(record.data) if record.local_size is None else record.local_size
        if flags & 8:
            out += struct.pack(
                "<IIII", 0x08074B50, crc, len(stored) if size == len(record.data) else size, size
            )
        size = len(record.data) if record.central_size is None else record.central_size
        packed = len(stored) if record.raw is not None else size
        offset = header if record.offset is None else record.offset
        directory += (
            struct.pack(
                "<IHHHHHHIIIHHHHHII",
                0x02014B50,
                0,
                record.version,
                flags,
                record.method,
                record.time,
                0,
                crc,
                packed,
                size,
                len(name),
                len(record.central_extra),
                len(record.central_comment),
                0,
                0,
                record.attributes,
                offset,
            )
            + name
            + record.central_extra
            + record.central_comment
        )
    at = len(out) + directory_shift
    number = len(records) if count is None else count
    out += directory
    if end64:
        end = len(out)
        out += struct.pack(
            "<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 45, 0, 0, number, number, len(directory), at
        )
        out += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    short = min(number, 0xFFFF)
    out += (
        struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, short, short, len(directory), at, len(comment))
        + comment
    )
    return bytes(out) + after


def records_of(data_pkl, storages=(), prefix="archive", byteorder=b"little", version=b"3\n"):
    """The records of torch.save, in its order."""
    first = [
        ("data.pkl", data_pkl),
        (".format_version", b"1"),
        (".storage_alignment", b"64"),
        ("byteorder", byteorder),
    ]
    last = [("version", version), (".data/serialization_id", b"0" * 40)]
    middle = [(f"data/{i}", data) for i, data in enumerate(storages)]
    return [(f"{prefix}/{name}", data) for name, data in first + middle + last]


def torch_file(data_pkl, storages=(), **options):
    return torch_zip(records_of(data_pkl, storages, **options))


class ZipPlaces:
    """Where the parts of an archive of torch_zip() begin."""

    def __init__(self, data):
        self.end = data.rindex(b"PK\5\6")
        self.locator, self.end64 = self.end - 20, self.end - 76
        self.directory = struct.unpack_from("<I", data, self.end + 16)[0]
        self.central, self.local, self.payload, self.descriptor = [], [], [], []
        at = self.directory
        while data[at : at + 4] == b"PK\1\2":
            flags, packed = struct.unpack_from("<H10xI", data, at + 8)
            name, extra, comment = struct.unpack_from("<HHH", data, at + 28)
            self.central.append(at)
            local = struct.unpack_from("<I", data, at + 42)[0]
            self.local.append(local)
            self.payload.append(local + 30 + sum(struct.unpack_from("<HH", data, local + 26)))
            self.descriptor.append(self.payload[-1] + packed if flags & 8 else None)
            at += 46 + name + extra + comment


def patched(data, at, form, *values):
    """The bytes with fields of struct format `form` written at `at`."""
    new = struct.pack("<" + form, *values)
    return data[:at] + new + data[at + len(new) :]


def inflating_overlap(name_count, kernel, quoted):
    """An archive whose deflated records share one kernel, as in D. Fifield's zip bomb.

    quoted: each record's data begins with the next local headers, as non-final stored blocks;
    otherwise every directory entry points at the one local header.
    """
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    tail = packed.compress(kernel) + packed.flush()
    data, entries = kernel, []
    header = out = b""
    for number in reversed(range(name_count if quoted else 1)):
        name = b"archive/data/%d" % number
        if out:
            head = struct.pack("<BHH", 0, len(header), 0xFFFF - len(header))
            tail, data = head + out, header + data
        header = (
            struct.pack(
                "<IHHHHHIIIHH", 0x04034B50, 20, 0, 8, 0, 0, zlib.crc32(data), len(tail),
                len(data), len(name), 0,
            )
            + name
        )
        out = header + tail
        entries.insert(0, (name, zlib.crc32(data), len(tail), len(data), len(out)))
    if not quoted:
        entries = [(b"archive/data/%d" % i, *entries[0][1:]) for i in range(name_count)]
    directory = b""
    for name, crc, packed_size, size, rest in entries:
        directory += (
            struct.pack(
                "<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 8, 0, 0, crc, packed_size, size,
                len(name), 0, 0, 0, 0, 0, len(out) - rest,
            )
            + name
        )
    end = struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, len(entries), len(entries), len(directory), len(out), 0
    )
    return out + directory + end


# ---- pickle, protocol 2 --------------------------------------------------------------------------

MARK, STOP, NONE, REDUCE, BUILD = b"(", b".", b"N", b"R", b"b"
TUPLE, SETITEMS, APPENDS, EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE = b"t", b"u", b"e", b"}", b"]", b")"


def program(body, protocol=2):
    return b"\x80" + bytes([protocol]) + body + STOP


def text(value):
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module, attribute):
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def sequence(*items):
    return MARK + b"".join(items) + TUPLE


def call(module, attribute, *arguments):
    return name(module, attribute) + sequence(*arguments) + REDUCE


def mapping(pairs):
    return EMPTY_DICT + MARK + b"".join(key + value for key, value in pairs) + SETITEMS


def storage(key="0", numel=4, kind="FloatStorage", module="torch"):
    return (
        sequence(text("storage"), name(module, kind), text(key), text("cpu"), integer(numel)) + b"Q"
    )


def tensor(shape=(4,), stride=(1,), offset=0, **options):
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage(**options),
        integer(offset),
        sequence(*map(integer, shape)),
        sequence(*map(integer, stride)),
        b"\x89",
        call("collections", "OrderedDict"),
    )


def weights(entries):
    """data.pkl of a state dict: pairs of a name and the opcodes of its value."""
    return program(mapping([(text(key), value) for key, value in entries]))


def floats(count):
    return struct.pack(f"<{count}f", *(i * 0.5 - 1 for i in range(count)))


def dag(depth, leaf=EMPTY_TUPLE, memo=0):
    """Pairs that hold the pair before twice: 2^depth leaves. `memo`: the first free slot."""
    body = leaf
    for level in range(memo, memo + depth):
        body += b"r" + struct.pack("<I", level) + b"j" + struct.pack("<I", level) + b"\x86"
    return body


def free_memo(data_pkl):
    """The number of the next memo slot of a pickle."""
    import pickletools

    return sum(
        opcode.name in ("BINPUT", "LONG_BINPUT") for opcode, _, _ in pickletools.genops(data_pkl)
    )


# ---- safetensors ---------------------------------------------------------------------------------


def safetensors(header, data=b"", length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def manifest(listed, **members):
    """MANIFEST.json of isoshard's: `listed` are (path, size, hash); `members` replace others."""
    import hashlib

    told = {
        "files": [
            {"hash": hash_, "path": path, "size_bytes": size} for path, size, hash_ in listed
        ],
        "kind": "isoshard-manifest",
        "program_version": "0.1.0",
        "schema": 1,
    } | members
    body = json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    told.setdefault("self_hash", "sha256:" + hashlib.sha256(body.encode()).hexdigest())
    return json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


# ---- recorded DeepSpeed checkpoints --------------------------------------------------------------


def split_zip(path):
    """(prefix, {name without prefix: bytes}) in the archive's order."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        prefix = names[0].split("/")[0]
        return prefix, {each[len(prefix) + 1 :]: archive.read(each) for each in names}


def join_zip(prefix, records, **options):
    """The archive that split_zip() takes apart."""
    return torch_zip([(f"{prefix}/{name}", data) for name, data in records.items()], **options)


def bfloat16_of(data):
    """float32 bytes as bfloat16: to nearest, ties to even; a NaN keeps its upper half."""
    found = b""
    for (bits,) in struct.iter_unpack("<I", data):
        nan = bits & 0x7FFFFFFF > 0x7F800000
        found += struct.pack("<H", bits >> 16 | 0x40 if nan
                             else bits + 0x7FFF + (bits >> 16 & 1) >> 16)
    return found


def after_memo(data, at):
    """Behind a BINPUT or LONG_BINPUT that may stand there."""
    return at + {b"q": 2, b"r": 5}.get(data[at : at + 1], 0)


def plain_size(data, at):
    """Bytes of the opcode of a number, None or truth value."""
    return {b"K": 2, b"M": 3, b"J": 5, b"G": 9, b"N": 1, b"\x88": 1, b"\x89": 1}[data[at : at + 1]]


class ZeroFolder:
    """A copy of a recorded checkpoint whose pickles and payloads can be edited."""

    def __init__(self, source):
        self.latest = None
        self.files = {}  # path inside → (prefix, records)
        for path in sorted(Path(source).rglob("*")):
            inside = str(path.relative_to(source))
            if path.is_file() and path.suffix == ".pt":
                self.files[inside] = split_zip(path)
            elif path.is_file() and inside.startswith("latest"):
                self.latest = (inside, path.read_bytes())

    def replace(self, old, new, only="", least=1):
        """Replaces opcodes in every pickle whose path has `only` in it."""
        hits = 0
        for inside, (_, records) in self.files.items():
            if only in inside:
                hits += records["data.pkl"].count(old)
                records["data.pkl"] = records["data.pkl"].replace(old, new)
        assert hits >= least, (old, hits)
        return self

    def rename(self, old, new):
        """Renames a parameter everywhere."""
        return self.replace(text(old), text(new))

    def set_after(self, key, new, old=None, only="", least=1, skip=b""):
        """The plain value that follows the text `key` (and the opcodes `skip`) becomes `new`."""
        hits = 0
        for inside, (_, records) in self.files.items():
            data = records["data.pkl"]
            if only not in inside or text(key) not in data:
                continue
            at = after_memo(data, data.index(text(key)) + len(text(key)))
            for opcode in skip:
                assert data[at] == opcode, (key, data[at : at + 8])
                at = after_memo(data, at + 1)
            if old is not None:
                assert data[at : at + len(old)] == old, (key, data[at : at + 8])
            size = len(old) if old is not None else plain_size(data, at)
            records["data.pkl"] = data[:at] + new + data[at + size :]
            hits += 1
        assert hits >= least, (key, hits)
        return self

    def insert(self, key, value, only):
        """A further key of the outermost dictionary; `value` must not write to the memo."""
        for inside, (_, records) in self.files.items():
            if only in inside:
                assert records["data.pkl"].endswith(b"u.")
                records["data.pkl"] = records["data.pkl"][:-2] + text(key) + value + b"u."
        return self

    def write(self, target):
        target = Path(target)
        for inside, (prefix, records) in self.files.items():
            path = target / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(join_zip(prefix, records))
        if self.latest:
            (target / self.latest[0]).write_bytes(self.latest[1])
        return target


class Evil:
    """Pickles, by Python's own pickler, into a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def evil_pickle(command, protocol=2):
    return pickle.dumps({"weight": Evil(command)}, protocol)


def grow_shapes(folder, sizes):
    """The first sizes of three parameters, as param_shapes tells them, become others."""
    for inside, (_, records) in folder.files.items():
        if "model_states" not in inside:
            continue
        data = records["data.pkl"]
        at = data.index(text("param_shapes"))
        tail = data[at:]
        for old, size in zip((b"K\x0dK\x0a\x86", b"K\x11K\x0a\x86", b"K\x0aK\x11\x86"), sizes):
            assert old in tail
            tail = tail.replace(old, integer(size) + integer(1) + b"\x86")
        records["data.pkl"] = data[:at] + tail
