"""Files of torch.save without torch, whose storages are holes: terabytes that fill no disk.

Stands in for torch in make_checkpoint.py --sparse: tensors without data, the classes that DeepSpeed
pickles under their real names, and save(), which lays records out as torch 2.13 does
(docs/formats/torch_file.md), zip64 included. Python's standard library only.

Not verified: serialization_id is forty zeros, which no reader checks.
"""
import collections
import enum
import io
import os
import pickle
import struct
import sys
import types
import zlib

MOST_32 = 0xFFFFFFFF  # sizes and offsets from here on stand in zip64 fields
CRC_POLYNOMIAL = 0xEDB88320

# ---- the CRC of zeros ----------------------------------------------------------------------------


def multiply(a, b):
    """a·b modulo the CRC polynomial; the coefficient of x^0 is the top bit."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (CRC_POLYNOMIAL if b & 1 else 0)
    return product


def crc32_of_zeros(size_bytes):
    """zlib.crc32(bytes(size_bytes)), in the time of about forty multiplications."""
    power, square = 1 << 31, 1 << 23  # x^0, and x^8: the step of one byte
    while size_bytes:
        if size_bytes & 1:
            power = multiply(power, square)
        square = multiply(square, square)
        size_bytes >>= 1
    return multiply(power, 0xFFFFFFFF) ^ 0xFFFFFFFF


# ---- what is pickled -----------------------------------------------------------------------------


def module_of(name):
    """The module of that name; it and those above it are made, empty, if nothing has imported them,
    so that pickle finds the name without the package."""
    for end in [at for at, letter in enumerate(name) if letter == "."] + [len(name)]:
        sys.modules.setdefault(name[:end], types.ModuleType(name[:end]))
    return sys.modules[name]


def named(module, name, made):
    """Gives a class or function the name under which it is pickled."""
    made.__module__, made.__name__, made.__qualname__ = module, name, name
    setattr(module_of(module), name, made)
    return made


class Plain:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Stage(enum.IntEnum):
    disabled, optimizer_states, gradients, weights = range(4)


def deepspeed_classes():
    """LossScaler, ZeroStageEnum and fragment_address, as pickle sees DeepSpeed's own."""
    return types.SimpleNamespace(
        LossScaler=named("deepspeed.runtime.fp16.loss_scaler", "LossScaler",
                         type("LossScaler", (Plain,), {})),
        ZeroStageEnum=named("deepspeed.runtime.zero.config", "ZeroStageEnum", Stage),
        fragment_address=named("deepspeed.utils.tensor_fragment", "fragment_address",
                               type("fragment_address", (Plain,), {})))


class Storage:
    def __init__(self, dtype, numel, data=None):
        self.dtype, self.numel, self.data = dtype, numel, data

    def size_bytes(self):
        return self.numel * {"Float": 4, "BFloat16": 2, "Long": 8}[self.dtype]


class Tensor:
    def __init__(self, storage, offset, shape, requires_grad=False):
        self.storage, self.offset, self.shape = storage, offset, tuple(shape)
        self.requires_grad = requires_grad

    def __reduce__(self):
        step, stride = 1, []
        for length in reversed(self.shape):
            stride.insert(0, step)
            step *= max(1, length)
        arguments = (self.storage, self.offset, self.shape, tuple(stride), self.requires_grad,
                     collections.OrderedDict())
        if "ds_id" in self.__dict__:
            return Torch.rebuild_from_type, (Torch.rebuild, Torch.Tensor, arguments,
                                             {"ds_id": self.ds_id})
        return Torch.rebuild, arguments


class Size(tuple):
    __slots__ = ()

    def __reduce__(self):
        return Size, (tuple(self),)


def never_called(*_):
    raise AssertionError("only the name is pickled")


class Torch:
    """The names of torch that are pickled, and the calls that make_checkpoint.py needs."""

    Size, Tensor = Size, type("Tensor", (), {})
    rebuild, rebuild_from_type = (lambda *_: never_called()), (lambda *_: never_called())
    storages = {kind: type(kind + "Storage", (), {}) for kind in ("Float", "BFloat16", "Long")}

    def register(self):
        named("torch", "Size", Size)
        named("torch", "Tensor", Torch.Tensor)
        named("torch._utils", "_rebuild_tensor_v2", Torch.rebuild)
        named("torch._tensor", "_rebuild_from_type_v2", Torch.rebuild_from_type)
        for kind, made in Torch.storages.items():
            named("torch", kind + "Storage", made)

    def random(self, numel, rank, kind):
        return Tensor(Storage("Float", numel), 0, (numel,))

    def zero(self, tensor, begin, end):
        """All elements are zero already."""

    def view(self, tensor, offset, shape, requires_grad=False):
        return Tensor(tensor.storage, tensor.offset + offset, shape, requires_grad)

    def low_precision(self, tensor):
        return Tensor(Storage("BFloat16", tensor.storage.numel), 0, tensor.shape)

    def join(self, tensors):
        numel = sum(tensor.storage.numel for tensor in tensors)
        return Tensor(Storage(tensors[0].storage.dtype, numel), 0, (numel,))

    def empty(self):
        return Tensor(Storage("BFloat16", 0), 0, (0,))

    def scalar(self, value):
        return Tensor(Storage("Float", 1, struct.pack("<f", value)), 0, ())

    def save(self, tree, path):
        write_pieces(path, *file_pieces(tree, stem_of(path)))


class Pickler(pickle.Pickler):
    def __init__(self, stream):
        super().__init__(stream, protocol=2)
        self.storages, self.numbers = [], {}

    def persistent_id(self, item):
        if not isinstance(item, Storage):
            return None
        number = self.numbers.setdefault(id(item), len(self.storages))
        if number == len(self.storages):
            self.storages.append(item)
        return "storage", Torch.storages[item.dtype], str(number), "cpu", item.numel


# ---- the container -------------------------------------------------------------------------------


def stem_of(path):
    return os.path.basename(path).rsplit(".", 1)[0]


def flags(size):
    """UTF-8 name, and a data descriptor, which torch leaves out behind an empty record."""
    return 0x0808 if size else 0x0800


def zip64_extra(size, stored_size, offset):
    fields = struct.pack("<QQ", size, stored_size) if size >= MOST_32 else b""
    fields += struct.pack("<Q", offset) if offset >= MOST_32 else b""
    return struct.pack("<HH", 1, len(fields)) + fields if fields else b""


class Container:
    """The records of one file: pieces (offset, bytes) that are written, holes between them."""

    def __init__(self, stem):
        self.stem, self.pieces, self.entries, self.cursor = stem, [], [], 0

    def put(self, data):
        self.pieces.append((self.cursor, data))
        self.cursor += len(data)

    def add(self, name, size, data=None):
        """A record; without data its payload is a hole."""
        name, begin = f"{self.stem}/{name}".encode(), self.cursor
        extra = zip64_extra(size, 0, begin)
        fill = -(begin + 30 + len(name) + len(extra) + 4) % 64
        extra += b"FB" + struct.pack("<H", fill) + b"Z" * fill
        self.put(struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags(size), 0, 0, 0, 0, 0, 0, len(name),
                             len(extra)) + name + extra)
        crc = crc32_of_zeros(size) if data is None else zlib.crc32(data)
        if data is None:
            self.cursor += size
        else:
            self.put(data)
        if size:
            wide = size >= MOST_32 or begin >= MOST_32
            self.put(struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\7\10", crc, size, size))
        self.entries.append((name, begin, size, crc))

    def finish(self):
        begin, directory = self.cursor, b""
        for name, offset, size, crc in self.entries:
            extra = zip64_extra(size, size, offset)
            shown = min(size, MOST_32)
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, flags(size), 0, 0, 0, crc,
                                     shown, shown, len(name), len(extra), 0, 0, 0, 0,
                                     min(offset, MOST_32)) + name + extra
        count, end = len(self.entries), begin + len(directory)
        directory += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 798, 45, 0, 0, count, count,
                                 len(directory), begin)
        directory += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        directory += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(count, 65535), min(count, 65535),
                                 end - begin, min(begin, MOST_32), 0)
        self.put(directory)
        return self.pieces, self.cursor


def file_pieces(tree, stem):
    """(offset, bytes) of everything that is no hole, and the size of the file."""
    stream = io.BytesIO()
    pickler = Pickler(stream)
    pickler.dump(tree)
    container = Container(stem)
    for name, data in (("data.pkl", stream.getvalue()), (".format_version", b"1"),
                       (".storage_alignment", b"64"), ("byteorder", b"little")):
        container.add(name, len(data), data)
    for number, storage in enumerate(pickler.storages):
        container.add(f"data/{number}", storage.size_bytes(), storage.data)
    container.add("version", 2, b"3\n")
    container.add(".data/serialization_id", 40, b"0" * 40)
    return container.finish()


def write_pieces(path, pieces, size):
    with open(path, "wb", buffering=0) as stream:
        stream.truncate(size)
        joined, at = bytearray(), 0
        for offset, data in pieces:  # neighbours go out in one write
            if offset != at + len(joined):
                os.pwrite(stream.fileno(), joined, at)
                joined, at = bytearray(), offset
            joined += data
        os.pwrite(stream.fileno(), joined, at)
