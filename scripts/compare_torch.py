#!/usr/bin/env python3
"""Judges whether two torch.save files, .safetensors files or folder trees are equal.

    compare_torch.py EXPECTED FOUND [--ignore REGEX] [--ignore-file GLOB] [--max N] [--quiet]
    compare_torch.py --dump FILE

It is the second derivation of "equal to DeepSpeed's own" (docs/CONTRACTS.md): Python's standard
library only, nothing shared with the C++ reader and writer that it judges. Nothing named in a
pickle is imported or run. Both files of a pair are held in memory.

Compared: the set of files (less MANIFEST.json and certificate.json), zip CRCs, classes, keys and
their order (order is free inside an optimizer's ['state'][int], in sets, in JSON and in safetensors
metadata), scalars by type and by bits, and per tensor its class, dtype, shape, stride,
requires_grad, attributes and the bits of its elements. Two non-empty tensors that are one view
(storage, offset, shape, stride) on one side are one view on the other. A file that is not .pt,
.pth, .ckpt, .bin, .safetensors or .json is compared by its bytes.

Not verified: pickle opcodes and memo, which Python objects are shared, record order and numbering,
serialization_id, storage size, offset and device, bytes outside every view, views that overlap
otherwise, empty folders, and whether torch itself would load the file.

Exit status: 0 equal, 1 different, 2 cannot read or nothing to compare.
"""
import argparse
import collections
import fnmatch
import io
import json
import math
import os
import pickle
import re
import struct
import sys
import zipfile

OURS = ("MANIFEST.json", "certificate.json")
ABSENT = "nothing"
CHUNK_BYTES = 1 << 20  # a multiple of every item size
ITEM_BYTES = {name: width for width, names in {
    1: "uint8 int8 bool float8_e4m3fn float8_e5m2", 2: "int16 uint16 float16 bfloat16",
    4: "int32 uint32 float32", 8: "int64 uint64 float64 complex64", 16: "complex128"}.items()
    for name in names.split()}
STORAGE_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128", "Untyped": "uint8"}
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

Difference = collections.namedtuple("Difference", "file path expected found")
Storage = collections.namedtuple("Storage", "key dtype data")


class Unreadable(Exception):
    """A file that cannot be judged; the message names the file and the reason."""


def require(condition, reason):
    if not condition:
        raise ValueError(reason)


# ---- What a pickle becomes: plain records.


class Tensor(collections.namedtuple("Tensor", "type_name storage dtype offset shape stride "
                                    "requires_grad hooks metadata attributes")):
    """A view of a storage; offset and stride count elements."""

    __slots__ = ()

    def view(self):
        return self.storage.key, self.offset, self.shape, self.stride

    def bits(self):
        """The elements in row-major order, as bytes or as a slice of the storage."""
        width, data, step, contiguous = ITEM_BYTES[self.dtype], self.storage.data, 1, True
        for n, stride in zip(reversed(self.shape), reversed(self.stride)):
            contiguous = contiguous and (n == 1 or stride == step)
            step *= n
        if contiguous or step == 0:
            return data[self.offset * width:(self.offset + step) * width]
        places = [self.offset]
        for n, stride in zip(self.shape, self.stride):
            places = [place + i * stride for place in places for i in range(n)]
        return b"".join(data[place * width:(place + 1) * width] for place in places)


def make_tensor(storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None,
                dtype=None):
    dtype = dtype or storage.dtype
    require(isinstance(storage, Storage) and dtype in ITEM_BYTES, f"unknown tensor of {dtype}")
    require(all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)) and
            len(shape) == len(stride), "a tensor has a bad offset, shape or stride")
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride))
    require(0 in shape or reach * ITEM_BYTES[dtype] <= len(storage.data),
            "a tensor reaches beyond its storage")
    return Tensor("torch.Tensor", storage, dtype, offset, tuple(shape), tuple(stride),
                  requires_grad, hooks or {}, metadata or {}, {})


def make_tensor_v3(storage, offset, shape, stride, requires_grad, hooks, dtype, metadata=None):
    return make_tensor(storage, offset, shape, stride, requires_grad, hooks, metadata,
                       dtype.__name__[len("torch."):])


def make_parameter(data, requires_grad, hooks, state=None):
    if not isinstance(data, Tensor):
        return NotImplemented
    return data._replace(type_name="torch.nn.parameter.Parameter", requires_grad=requires_grad,
                         hooks=hooks or {}, attributes=state or {})


def make_from_type(function, new_type, args, state):
    made = function(*args) if isinstance(function, GlobalType) else None
    if not isinstance(made, Tensor):
        return NotImplemented
    return made._replace(type_name=new_type.__name__, attributes=state or {})


class GlobalType(type):
    """The stand-in for one global; a global used as a value is one of these."""

    def __call__(cls, *args):
        build = BUILDERS.get(cls.__name__)
        made = build(*args) if build else NotImplemented
        if made is NotImplemented:
            made = cls.__new__(cls, *args)
            made.how = "call"
        return made


class Opaque(metaclass=GlobalType):
    """An object of an unknown class: how it was made, and all that was put into it."""

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.how, self.args, self.state, self.listitems, self.dictitems = "new", args, None, [], {}
        return self

    def __setstate__(self, state):
        require(self.state is None, "an object is given its state twice")
        self.state = state

    def __setitem__(self, key, value):
        self.dictitems[key] = value

    def append(self, item):
        self.listitems.append(item)


class OrderedDict(dict):
    """collections.OrderedDict; its state holds for example a state_dict's _metadata."""

    state = None
    __setstate__ = Opaque.__setstate__


class Size(tuple):
    """torch.Size."""

    __slots__ = ()


class Unordered(dict):
    """A JSON object: keys without an order."""


BUILDERS = {
    "torch._utils._rebuild_tensor": make_tensor,
    "torch._utils._rebuild_tensor_v2": make_tensor,
    "torch._utils._rebuild_tensor_v3": make_tensor_v3,
    "torch._utils._rebuild_parameter": make_parameter,
    "torch._utils._rebuild_parameter_with_state": make_parameter,
    "torch._tensor._rebuild_from_type_v2": make_from_type,
    "torch.Size": Size,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
}
GLOBALS = {}


class InertUnpickler(pickle.Unpickler):
    """Unpickles into the records above; every global is a GlobalType, none is imported."""

    def __init__(self, stream, storages):
        super().__init__(stream, fix_imports=False, encoding="utf-8")
        self.storages = storages

    def find_class(self, module, name):
        name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if name not in GLOBALS:
            GLOBALS[name] = GlobalType(name, (Opaque,), {})
        return GLOBALS[name]

    def persistent_load(self, pid):
        tag, storage_type, key, _, numel = pid
        match = re.fullmatch(r"torch\.(storage\.|cuda\.)?(\w+)Storage", storage_type.__name__)
        require(tag == "storage" and match and match[2] in STORAGE_DTYPES,
                f"unknown storage {tag!r}, {storage_type.__name__!r}")
        data, dtype = memoryview(self.storages[key]), STORAGE_DTYPES[match[2]]
        require(len(data) == numel * ITEM_BYTES[dtype],
                f"storage {key!r} has {len(data)} bytes for {numel} elements of {dtype}")
        return Storage(key, dtype, data)


# ---- Files.


def load_torch(path):
    with zipfile.ZipFile(path) as archive:  # read() checks the CRC
        names = archive.namelist()
        require(names and len(names) == len(set(names)), "no record, or two of one name")
        records = {name: archive.read(name) for name in names}
    prefix = names[0].split("/")[0] + "/"
    require(records.get(prefix + "byteorder", b"little") == b"little", "not little-endian")
    storages = {name[len(prefix + "data/"):]: data for name, data in records.items()
                if name.startswith(prefix + "data/")}
    return InertUnpickler(io.BytesIO(records[prefix + "data.pkl"]), storages).load()


def json_object(pairs):
    made = Unordered(pairs)
    require(len(made) == len(pairs), "a JSON object has a key twice")
    return made


def load_safetensors(data):
    begin = 8 + struct.unpack_from("<Q", data)[0]
    header, tree, end = json.loads(data[8:begin], object_pairs_hook=json_object), {}, begin
    for name, entry in header.items():
        if name == "__metadata__":
            tree[name] = entry
            continue
        first, last = (begin + offset for offset in entry["data_offsets"])
        shape, dtype = entry["shape"], SAFETENSORS_DTYPES[entry["dtype"]]
        stride = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
        storage = Storage(name, dtype, memoryview(data)[first:last])
        tree[name] = make_tensor(storage, 0, shape, stride)
        require(last - first == len(storage.data) == math.prod(shape) * ITEM_BYTES[dtype],
                f"tensor {name!r} has {last - first} bytes")
        end = max(end, last)
    require(end == len(data), "bytes after the last tensor")
    return tree


def load(path):
    """The contents of one file as plain records. Raises Unreadable."""
    try:
        require(os.path.isfile(path), "not a file")
        if path.endswith((".pt", ".pth", ".ckpt", ".bin")):
            return load_torch(path)
        with open(path, "rb") as stream:
            data = stream.read()
        if path.endswith(".safetensors"):
            return load_safetensors(data)
        return json.loads(data, object_pairs_hook=json_object) if path.endswith(".json") else data
    except Exception as error:  # a broken file may fail anywhere inside pickle, zipfile or json
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unreadable(f"cannot read {path!r}: {reason}") from error


# ---- Text and contents of items.


def text(item, limit=None):
    """One quoted line; without a limit, scalars of different type or bits have different lines."""
    if isinstance(item, Tensor):
        line = (f"{item.type_name} {item.dtype} {list(item.shape)} stride {list(item.stride)} of "
                f"storage {item.storage.key!r} + {item.offset}, grad {item.requires_grad}")
    elif isinstance(item, Storage):
        line = f"storage {item.key!r} {item.dtype} of {len(item.data)} bytes"
    elif isinstance(item, GlobalType):
        line = f"global {item.__name__}"
    elif isinstance(item, (Opaque, tuple)):
        inner = item.args if isinstance(item, Opaque) else item
        line = f"{type(item).__name__} ({', '.join(text(child, limit) for child in inner)})"
    elif isinstance(item, (dict, list, set, frozenset)):
        line = f"{type(item).__name__} of {len(item)}"
    elif isinstance(item, float) and item != item:
        line = f"float nan 0x{struct.pack('>d', item).hex()}"
    elif isinstance(item, int) and item.bit_length() > 128:
        line = hex(item)
    else:
        line = repr(item) if isinstance(item, str) else f"{type(item).__name__} {item!r}"
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if limit is None or len(line) <= limit else f"{line[:limit]}... ({len(line)} long)"


def children(item):
    """label -> child for what is inside an item, apart from a tensor's elements."""
    if isinstance(item, Tensor):
        return {f".{field}": getattr(item, field) for field in ("hooks", "metadata", "attributes")}
    if isinstance(item, Storage):
        return {".dtype": item.dtype, ".size_bytes": len(item.data)}
    if isinstance(item, Opaque):
        fields = ("how", "args", "state", "listitems", "dictitems")
        return {f".{field}": getattr(item, field) for field in fields}
    if isinstance(item, (list, tuple)):
        return {f"[{i}]": child for i, child in enumerate(item)}
    made = {".state": item.state} if isinstance(item, OrderedDict) else {}
    for key in item:
        label = f"[{key}]" if type(key) is int else f"[{text(key)}]"
        while label in made:
            label += "again"
        made[label] = item[key] if isinstance(item, dict) else key
        if isinstance(item, dict) and not isinstance(key, (str, bytes, int, float, type(None))):
            made[".key" + label] = key
    return made


def tree_lines(label, item, above=()):
    """The lines that --dump prints."""
    cut = id(item) in above
    yield f"{'  ' * len(above)}{label}: {text(item, 200)}{' (cycle)' if cut else ''}"
    if not cut and isinstance(item, (Tensor, Opaque, dict, list, set, frozenset)):
        for inner, child in children(item).items():
            if inner[0] != "." or child:
                yield from tree_lines(inner, child, above + (id(item),))


# ---- Comparison.


class Comparison:
    """Walks pairs of items, expected a and found b, and collects their differences."""

    def __init__(self, ignore=()):
        self.patterns = [re.compile(pattern) for pattern in ignore]
        self.differences, self.ignored, self.files, self.tensors = [], 0, 0, 0
        self.start_file("")

    def start_file(self, name):
        self.file, self.active = name, set()
        self.views_expected, self.views_found = {}, {}

    def report(self, path, expected, found):
        if any(pattern.search(path) for pattern in self.patterns):
            self.ignored += 1
        else:
            self.differences.append(Difference(self.file, path or "(top)", expected, found))

    def walk(self, path, a, b, parent=None):
        """parent is the item that holds a."""
        if type(a) is not type(b):
            self.report(path, text(a, 100), text(b, 100))
        elif isinstance(a, (str, bytes, bytearray)):
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
                begin, end = max(0, at - 20), at + 40
                self.report(path, text(a[begin:end]), f"{text(b[begin:end])} from place {begin}")
        elif not isinstance(a, (Tensor, Opaque, dict, list, tuple, set, frozenset)):
            if text(a) != text(b):
                self.report(path, text(a), text(b))
        elif (id(a), id(b)) not in self.active:  # else a cycle: the pair is met further up
            self.active.add((id(a), id(b)))
            if isinstance(a, Tensor):
                self.tensor(path, a, b)
            elif isinstance(a, Storage) and (a.dtype, len(a.data)) == (b.dtype, len(b.data)):
                self.elements(path, a.dtype, [len(a.data) // ITEM_BYTES[a.dtype]], a.data, b.data)
            in_state = isinstance(parent, dict) and re.search(r"\['state'\]\[-?\d+\]$", path)
            self.inside(path, a, b, type(a) in (dict, OrderedDict) and not in_state)
            self.active.discard((id(a), id(b)))

    def inside(self, path, a, b, ordered):
        children_a, children_b = children(a), children(b)
        for label in [label for label in children_a if label not in children_b]:
            self.report(path + label, text(children_a[label], 100), ABSENT)
        for label in [label for label in children_b if label not in children_a]:
            self.report(path + label, ABSENT, text(children_b[label], 100))
        common_a = [label for label in children_a if label in children_b]
        common_b = [label for label in children_b if label in children_a]
        if ordered and common_a != common_b:
            at = next(i for i, (x, y) in enumerate(zip(common_a, common_b)) if x != y)
            self.report(path + ".order", f"{common_a[at]} in place {at}", common_b[at])
        for label in common_a:
            self.walk(path + label, children_a[label], children_b[label], a)

    def tensor(self, path, a, b):
        self.tensors += 1
        for field in ("type_name", "dtype", "shape", "stride", "requires_grad"):
            value_a, value_b = str(getattr(a, field)), str(getattr(b, field))
            if value_a != value_b:
                self.report(f"{path}.{field}", value_a, value_b)
        if a.dtype == b.dtype and a.shape == b.shape:
            self.elements(path, a.dtype, a.shape, a.bits(), b.bits())
        if 0 in a.shape or 0 in b.shape:
            return
        view_b, path_b = self.views_expected.setdefault(a.view(), (b.view(), path))
        view_a, path_a = self.views_found.setdefault(b.view(), (a.view(), path))
        if view_b != b.view():
            self.report(path + ".tie", f"the same view as {path_b}", "another view")
        if view_a != a.view():
            self.report(path + ".tie", "another view", f"the same view as {path_a}")

    def elements(self, path, dtype, shape, bits_a, bits_b):
        width, count, first = ITEM_BYTES[dtype], 0, None
        for begin in range(0, len(bits_a), CHUNK_BYTES):
            a, b = (bytes(bits[begin:begin + CHUNK_BYTES]) for bits in (bits_a, bits_b))
            if a != b:
                places = [i for i in range(0, len(a), width) if a[i:i + width] != b[i:i + width]]
                count += len(places)
                first = first or (begin + places[0], a[places[0]:][:width], b[places[0]:][:width])
        if count:
            index, rest = [], first[0] // width
            for n in reversed(shape):
                rest, place = divmod(rest, n)
                index.insert(0, place)
            hex_a, hex_b = (f"0x{raw[::-1].hex()}" for raw in first[1:])
            self.report(path, f"{hex_a} at {index} of {dtype} {list(shape)}",
                        f"{hex_b}; {count} of {len(bits_a) // width} elements differ")


def compare(a, b, ignore=()):
    """The differences between two results of load()."""
    comparison = Comparison(ignore)
    comparison.walk("", a, b)
    return comparison.differences


def files_below(folder, ignore_file):
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder, followlinks=True)
             for name in names if name not in OURS]
    files = {os.path.relpath(path, folder).replace(os.sep, "/"): path for path in paths}
    return {name: path for name, path in files.items()
            if not any(fnmatch.fnmatch(name, glob) for glob in ignore_file)}


def compare_paths(a, b, ignore=(), ignore_file=()):
    """The Comparison of two files or two folders. Raises Unreadable."""
    if not os.path.exists(a) or not os.path.exists(b) or os.path.isdir(a) != os.path.isdir(b):
        raise Unreadable(f"cannot compare {a!r} with {b!r}: not two files, not two folders")
    if os.path.isdir(a):
        files_a, files_b = files_below(a, ignore_file), files_below(b, ignore_file)
    else:
        files_a, files_b = {os.path.basename(b): a}, {os.path.basename(b): b}
    comparison = Comparison(ignore)
    for name in sorted(files_a.keys() | files_b.keys()):
        comparison.start_file(name)
        comparison.files += 1
        if name in files_a and name in files_b:
            comparison.walk("", load(files_a[name]), load(files_b[name]))
        else:
            sides = ("file", ABSENT) if name in files_a else (ABSENT, "file")
            comparison.differences.append(Difference(name, "(file)", *sides))
    if comparison.files == 0:
        raise Unreadable(f"nothing to compare in {a!r} and {b!r}")
    return comparison


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("paths", nargs="+", metavar="PATH", help="EXPECTED and FOUND")
    parser.add_argument("--dump", action="store_true", help="print the tree of one file")
    parser.add_argument("--ignore", action="append", default=[], metavar="REGEX",
                        help="leave out differences whose item path matches; repeatable")
    parser.add_argument("--ignore-file", action="append", default=[], metavar="GLOB",
                        help="leave out files whose relative path matches; repeatable")
    parser.add_argument("--max", type=int, default=20, metavar="N", help="differences printed")
    parser.add_argument("--quiet", action="store_true", help="print nothing, only exit")
    options = parser.parse_args(arguments)
    if len(options.paths) != (1 if options.dump else 2):
        parser.error("takes EXPECTED and FOUND, or --dump and one file")
    try:
        if options.dump:
            print("\n".join(tree_lines("(top)", load(options.paths[0]))))
            return 0
        result = compare_paths(*options.paths, options.ignore, options.ignore_file)
    except (Unreadable, RecursionError, re.error) as error:
        print(f"compare_torch: {error}", file=sys.stderr)
        return 2
    if not options.quiet:
        for found in result.differences[:options.max]:
            print(f"{found.file!r} {found.path}: expected {found.expected}, found {found.found}")
        print(f"{'different' if result.differences else 'equal'}: {len(result.differences)} "
              f"differences, ignored {result.ignored}, in {result.files} files and "
              f"{result.tensors} pairs of tensors")
    return 1 if result.differences else 0


if __name__ == "__main__":
    sys.exit(main())
