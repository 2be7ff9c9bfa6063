"""Single hostile files: torch archives with hostile pickles, tensors and zip records; safetensors.

Part of tests/damage.py, which runs it.
"""

import json
import struct
import zipfile
import zlib

import hostile as h
from damage_case import FIGURES, SECONDS, Case, Outcome


class Weights(Case):
    """Hostile torch files, read as fp32 weights; `digest` and `convert` must agree."""

    def refuse(self, content, words=()):
        path = self.place / "pytorch_model.bin"
        path.write_bytes(content)
        self.refused("digest", path, words=words)
        self.refused("convert", path, self.place / "out", "--to", "fp32")
        self.assertFalse(self.canary.exists())
        self.assertFalse((self.place / "out").exists())

    def table(self, cases, words=()):
        for title, content in cases.items():
            with self.subTest(title):
                self.refuse(content() if callable(content) else content, words)

    def test_the_generator_makes_a_good_file(self):
        path = self.place / "pytorch_model.bin"
        path.write_bytes(h.torch_file(h.weights([("w", h.tensor())]), [h.floats(4)]))
        self.assertEqual(self.digest(path)["weights"]["elements"], 4)

    def test_code_is_named_and_not_run(self):
        command = f"touch {self.canary}"
        run = h.sequence(h.text(command)) + h.REDUCE
        cases = {"os.system": h.evil_pickle(command)}
        for module, attribute in (
            ("os", "system"),
            ("posix", "system"),
            ("nt", "system"),
            ("builtins", "eval"),
            ("__builtin__", "eval"),
            ("builtins", "exec"),
            ("__builtin__", "execfile"),
            ("subprocess", "Popen"),
            ("subprocess", "check_output"),
            ("runpy", "run_path"),
            ("pip", "main"),
            ("importlib", "import_module"),
            ("torch.hub", "load"),
            ("builtins", "getattr"),
            ("builtins", "__import__"),
            ("webbrowser", "open"),
            ("os.path", "exists"),
            ("shutil", "rmtree"),
            ("socket", "create_connection"),
            ("ctypes", "CDLL"),
            ("pty", "spawn"),
            ("sys", "exit"),
        ):
            cases[f"{module}.{attribute}"] = h.weights([("w", h.name(module, attribute) + run)])
        self.table(
            {title: h.torch_file(content) for title, content in cases.items()},
            words=("nothing was executed",),
        )

    def test_code_by_other_roads(self):
        command = h.text(f"touch {self.canary}")
        system = h.name("os", "system")
        cases = {
            "instance opcode": h.program(h.MARK + command + b"ios\nsystem\n"),
            "object opcode": h.program(h.MARK + system + command + b"o"),
            "newobj": h.weights([("w", system + h.sequence(command) + b"\x81")]),
            "build": h.weights([("w", h.EMPTY_DICT + system + h.BUILD)]),
            "call of a call": h.weights(
                [
                    (
                        "w",
                        h.call("builtins", "getattr", system, h.text("x"))
                        + h.sequence(command)
                        + h.REDUCE,
                    )
                ]
            ),
            "call of a string": h.weights([("w", command + h.sequence(command) + h.REDUCE)]),
            "persistent id": h.weights(
                [
                    (
                        "w",
                        h.sequence(
                            h.text("storage"), system, h.text("0"), h.text("cpu"), h.integer(4)
                        )
                        + b"Q",
                    )
                ]
            ),
            "text persistent id": h.program(b"Pos.system\n"),
            "extension": h.program(b"\x82\x01"),
            "protocol 4": h.evil_pickle(f"touch {self.canary}", 4),
            "protocol 5": h.evil_pickle(f"touch {self.canary}", 5),
            "protocol 0": h.evil_pickle(f"touch {self.canary}", 0),
            "stack global": h.program(
                h.text("os") + h.text("system") + b"\x93" + h.sequence(command) + h.REDUCE
            ),
            "global with a path": h.weights(
                [("w", h.name("../../os", "system") + h.sequence(command) + h.REDUCE)]
            ),
            "dotted attribute": h.weights(
                [("w", h.name("torch", "os.system") + h.sequence(command) + h.REDUCE)]
            ),
            "unknown class": h.weights(
                [("w", h.name("evil", "Evil") + h.sequence(command) + h.REDUCE)]
            ),
            "second pickle": h.weights([]) + h.evil_pickle(f"touch {self.canary}"),
        }
        self.table({title: h.torch_file(content) for title, content in cases.items()})

    def test_bombs(self):
        text, integer = h.text, h.integer
        cases = {
            "2^60 leaves": h.weights([("w", h.dag(60))]),
            "2^900 leaves": h.weights([("w", h.dag(900))]),
            "2^60 leaves as root": h.program(h.dag(60)),
            "200,000 lists": h.program(b"]" * 200_000 + b"a" * 199_999),
            "200,000 tuples": h.program(b")" + b"\x85" * 200_000),
            "200,000 tuples in weights": h.weights([("w", b")" + b"\x85" * 200_000)]),
            "200,000 marks": h.program(b"(" * 200_000),
            "memo index 2^32-1": h.program(b"}r\xff\xff\xff\xff"),
            "memo index 2^31": h.program(b"}r\x00\x00\x00\x80"),
            "memo read 2^32-1": h.program(b"j\xff\xff\xff\xff"),
            "memo slot twice": h.program(b"}q\x00q\x00"),
            "string of 100 MB declared": h.program(
                b"X" + struct.pack("<I", 100_000_000) + b"short"
            ),
            "string of 4 GiB declared": h.program(b"X\xff\xff\xff\xff"),
            "integer of 2 GiB declared": h.program(b"\x8b" + struct.pack("<I", 2**31 - 1)),
            "negative length of an integer": h.program(b"\x8b\xff\xff\xff\xff"),
            "7,000,000 dictionaries": lambda: h.torch_file(
                h.program(b"(" + b"}" * 7_000_000 + b"t")
            ),
            "7,000,000 empty tuples": lambda: h.torch_file(
                h.program(b"(" + b")" * 7_000_000 + b"t")
            ),
            "2,000,000 objects": lambda: h.torch_file(
                h.program(h.name("a", "b") + b"q\x00(" + b"h\x00)R" * 2_000_000 + b"t\x86")
            ),
            "7,000,000 memo reads": lambda: h.torch_file(
                h.program(b"]q\x00(" + b"h\x00" * 7_000_000 + b"e")
            ),
            "contains itself": h.program(b"]q\x00h\x00a"),
            "dictionary contains itself": h.program(b"}q\x00" + text("w") + b"h\x00s"),
            "tuple contains itself": h.program(b"]q\x00h\x00\x85a"),
            "duplicate keys": h.weights([("w", h.tensor()), ("w", h.tensor())]),
            "duplicate keys 1 and True": h.program(
                h.mapping([(integer(1), b"N"), (b"\x88", b"N")])
            ),
            "unhashable key": h.program(h.mapping([(b"]", b"N")])),
            "no stop": b"\x80\x02}",
            "empty": b"",
            "stop alone": b"\x80\x02.",
            "two values": h.program(b"}}"),
            "mark left": h.program(b"}("),
            "append to a dictionary": h.program(b"}Na"),
            "set item of a list": h.program(b"]NNs"),
            "set item of a string": h.program(text("x") + b"NNs"),
            "odd items": h.program(b"}(Nu"),
            "build twice": h.program(h.call("a", "b") + b"}b}b"),
            "pop of nothing": h.program(b"\x87"),
            "pop over a mark": h.program(b"N(\x85"),
            "root is a list": h.program(b"]"),
            "root is a number": h.program(b"K\x01"),
            "value is a number": h.weights([("w", b"K\x01")]),
            "key is a number": h.program(h.mapping([(integer(1), b"N")])),
        }
        self.table(
            {
                title: content if callable(content) else h.torch_file(content)
                for title, content in cases.items()
            }
        )

    def test_tensors_that_lie(self):
        view, data = h.tensor, h.floats(4)
        huge = 0x4000000000000001
        shapes = {
            "numel overflow": view((huge,), (1,), numel=huge),
            "numel overflow, small view": view((4,), (1,), numel=huge),
            "numel negative": view((4,), (1,), numel=-1),
            "numel 2^80": view((4,), (1,), numel=2**80),
            "negative stride": view((4,), (-1,), offset=3),
            "negative size": view((-4,), (1,)),
            "negative offset": view((4,), (1,), offset=-1),
            "beyond storage": view((5,), (1,)),
            "beyond storage by offset": view((4,), (1,), offset=1),
            "beyond storage by stride": view((4,), (2,)),
            "offset near 2^63": view((4,), (1,), offset=2**63 - 1),
            "stride near 2^63": view((4,), (2**62,)),
            "size product 2^64": view((2**32, 2**32), (0, 0)),
            "size product 2^66 with zero": view((2**33, 2**33, 0), (1, 1, 1)),
            "expanded to 4 TB": view((2**40,), (0,)),
            "expanded to 64 GB": view((2**34,), (0,)),
            "expanded in two dimensions": view((2**20, 2**20), (0, 0)),
            "65 dimensions": view((1,) * 65, (1,) * 65),
            "more strides than sizes": view((4,), (1, 1)),
            "sizes as text": h.call(
                "torch._utils",
                "_rebuild_tensor_v2",
                h.storage(),
                h.integer(0),
                h.text("4"),
                h.text("1"),
            ),
            "no arguments": h.call("torch._utils", "_rebuild_tensor_v2"),
            "no storage": h.call(
                "torch._utils", "_rebuild_tensor_v2", b"N", h.integer(0), b")", b")"
            ),
            "parameter without a tensor": h.call("torch._utils", "_rebuild_parameter"),
            "parameter of itself": h.call(
                "torch._utils",
                "_rebuild_parameter",
                h.call("torch._utils", "_rebuild_parameter", b"N"),
            ),
            "sparse": h.call("torch._utils", "_rebuild_sparse_tensor", b"N", b")"),
            "quantised": h.call(
                "torch._utils", "_rebuild_qtensor", h.storage(), h.integer(0), b")", b")"
            ),
            "unknown storage class": view(kind="EvilStorage"),
            "storage key with a path": view(key="../../0"),
            "storage key is negative": view(key="-1"),
            "storage is not there": view(key="7"),
            "from type with no arguments": h.call("torch._tensor", "_rebuild_from_type_v2"),
        }
        self.table(
            {
                title: h.torch_file(h.weights([("w", value)]), [data])
                for title, value in shapes.items()
            }
        )
        two_ways = h.weights([("a", view()), ("b", view(kind="IntStorage"))])
        good = h.weights([("w", view())])
        self.table(
            {
                "storage described in two ways": h.torch_file(two_ways, [data]),
                "record half as long": h.torch_file(good, [data[:8]]),
                "record 64 bytes longer": h.torch_file(good, [data + bytes(64)]),
                "record empty": h.torch_file(good, [b""]),
                "record that no tensor uses": h.torch_file(good, [data, data]),
            }
        )

    def test_zip_tricks(self):
        data, good = h.floats(4), h.weights([("w", h.tensor())])
        base = h.records_of(good, [data])
        names = [name for name, _ in base]
        place = names.index("archive/data/0")

        def swapped(**tricks):
            records = list(base)
            records[place] = h.Record(names[place], data, **tricks)
            return h.torch_zip(records)

        def with_record(name, content=b"x"):
            return h.torch_zip(base + [(name, content)])

        deflated = zlib.compress(data)[2:-4]
        bomb = zlib.compress(bytes(50_000_000), 9)[2:-4]
        bombs = list(base)
        bombs[place] = h.Record(names[place], bytes(50_000_000), method=8, raw=bomb)
        plain = h.torch_zip(base)
        cases = {
            "duplicate data/0": with_record("archive/data/0", data),
            "duplicate data.pkl": with_record("archive/data.pkl", good),
            "overlapping headers": swapped(offset=0),
            "header offset beyond the file": swapped(offset=10**9),
            "header offset in a payload": swapped(offset=64),
            "wrong CRC": swapped(crc=1),
            "deflated": swapped(method=8, raw=deflated),
            "deflated bomb": h.torch_zip(bombs),
            "encrypted": swapped(flags=0x0809),
            "unknown flags": swapped(flags=0x8808),
            "other name in the header": swapped(local_name="archive/data/1"),
            "descriptor lies": swapped(local_size=8),
            "directory lies": swapped(central_size=8),
            "directory says 2 GB": swapped(central_size=2**31),
            "time set": swapped(time=0x1234),
            "version set": swapped(version=20),
            "prefix bytes": h.torch_zip(base, before=b"MZ" + bytes(62)),
            "prefix and right offsets": b"#!/bin/sh\n" + plain,
            "trailing bytes": plain + b"x",
            "trailing zeros": plain + bytes(512),
            "two archives": plain + plain,
            "comment": h.torch_zip(base, comment=b"hello"),
            "one record too many": h.torch_zip(base, count=len(base) + 1),
            "one record too few": h.torch_zip(base, count=len(base) - 1),
            "2^40 records": h.torch_zip(base, count=2**40),
            "directory elsewhere": h.torch_zip(base, directory_shift=-1),
            "big-endian": h.torch_file(good, [data], byteorder=b"big"),
            "byteorder is empty": h.torch_file(good, [data], byteorder=b""),
            "unknown version": h.torch_file(good, [data], version=b"99\n"),
            "parent folder": with_record("archive/../../escape"),
            "other parent folder": with_record("../escape"),
            "absolute name": with_record("/tmp/escape"),
            "backslashes": with_record("archive\\..\\escape"),
            "NUL in a name": with_record("archive/a\0b"),
            "escape sequence in a name": with_record("archive/\x1b[2J"),
            "name that is not UTF-8": with_record(b"archive/\xff\xfe"),
            "empty name": with_record(""),
            "folder entry": with_record("archive/", b""),
            "name of 65,535 bytes": with_record("archive/" + "a" * 65_500),
            "record outside the folder": with_record("other/data/1"),
            "record without a folder": with_record("loose"),
            "code": with_record("archive/code/__torch__.py", b"import os"),
            "constants.pkl": with_record(
                "archive/constants.pkl", h.evil_pickle(f"touch {self.canary}")
            ),
            "no data.pkl": h.torch_zip(base[1:]),
            "no records": h.torch_zip([]),
            "large version record": h.torch_file(good, [data], version=b"3\n" + bytes(5000)),
            "without zip64": h.torch_zip(base, end64=False, count=len(base) + 1),
        }
        self.table(cases)

    def test_archive_of_another_program_is_announced(self):
        """Contracts §5: a file in no known writer's dialect is read with a notice."""
        path = self.place / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in h.records_of(h.weights([("w", h.tensor())]), [h.floats(4)]):
                archive.writestr(name, data)
        result = Outcome(["digest", path], self.place)
        if result.status == 0:
            self.assertIn("notice", result.err)
        else:
            self.refused("digest", path)

    def test_many_parameters_are_no_bomb(self):
        """30,000 names of empty tensors: 2 MB of pickle."""
        body = (
            b"}("
            + b"".join(h.text(f"layer.{i}.weight") + h.tensor((0,), (1,)) for i in range(30_000))
            + b"u"
        )
        path = self.place / "pytorch_model.bin"
        path.write_bytes(h.torch_file(h.program(body), [h.floats(4)]))
        result = Outcome(["digest", path], self.place)
        self.assertEqual(result.status, 0, result)
        self.assertLess(result.seconds, 5 * SECONDS, f"{result.seconds} s")
        FIGURES["fine"] += 1


class Safetensors(Case):
    def test_headers_that_lie(self):
        data = h.floats(4)
        entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}

        def with_(**fields):
            return h.safetensors({"w": {**entry, **fields}}, data)

        cases = {
            "too short": b"\x08\0\0",
            "length beyond the file": h.safetensors({"w": entry}, data, length=10**6),
            "length 2^63": h.safetensors({"w": entry}, data, length=2**63),
            "length 2^64-1": h.safetensors({"w": entry}, data, length=2**64 - 1),
            "length 0": h.safetensors(b"", data),
            "not JSON": h.safetensors(b"{'w': 1}", data),
            "list": h.safetensors(b"[]"),
            "leading space": h.safetensors(b" {}"),
            "garbage after the object": h.safetensors(
                b'{"w":' + json.dumps(entry).encode() + b"} x", data
            ),
            "NUL after the object": h.safetensors(
                b'{"w":' + json.dumps(entry).encode() + b"}\0", data
            ),
            "duplicate name": h.safetensors(
                b'{"w":%b,"w":%b}' % ((json.dumps(entry).encode(),) * 2), data
            ),
            "duplicate field": h.safetensors(
                b'{"w":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', data
            ),
            "not UTF-8": h.safetensors(b'{"\xff":' + json.dumps(entry).encode() + b"}", data),
            "lone surrogate": h.safetensors(
                b'{"\\ud800":' + json.dumps(entry).encode() + b"}", data
            ),
            "hole": h.safetensors({"w": {**entry, "data_offsets": [4, 20]}}, data + bytes(4)),
            "hole between": h.safetensors(
                {"a": entry, "b": {**entry, "data_offsets": [20, 36]}}, data + bytes(20)
            ),
            "overlap": h.safetensors(
                {"a": entry, "b": {**entry, "data_offsets": [8, 24]}}, data + bytes(8)
            ),
            "the same bytes": h.safetensors({"a": entry, "b": entry}, data),
            "bytes behind": h.safetensors({"w": entry}, data + b"x"),
            "bytes missing": h.safetensors({"w": entry}, data[:-1]),
            "end before begin": with_(data_offsets=[16, 0]),
            "negative offset": with_(data_offsets=[-16, 0]),
            "offsets 2^63": with_(data_offsets=[2**63, 2**63 + 16]),
            "one offset": with_(data_offsets=[0]),
            "three offsets": with_(data_offsets=[0, 16, 32]),
            "offsets are fractions": with_(data_offsets=[0.5, 16.5]),
            "offsets are text": with_(data_offsets=["0", "16"]),
            "offsets are infinite": h.safetensors(
                b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,1e400]}}', data
            ),
            "wrong size": with_(shape=[5]),
            "negative size": with_(shape=[-4]),
            "size is a fraction": with_(shape=[4.5]),
            "size is true": with_(shape=[True, 4]),
            "size is null": with_(shape=None),
            "shape is a number": with_(shape=4),
            "2^62 elements in 0 bytes": h.safetensors(
                {"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 0]}}
            ),
            "2^61 doubles in 0 bytes": h.safetensors(
                {"w": {"dtype": "F64", "shape": [2**61], "data_offsets": [0, 0]}}
            ),
            "2^62+4 elements": h.safetensors(
                {"w": {"dtype": "F32", "shape": [2**62 + 4], "data_offsets": [0, 16]}}, data
            ),
            "2^66 elements": h.safetensors(
                {"w": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}}
            ),
            "unknown dtype": with_(dtype="F31"),
            "dtype is a number": with_(dtype=32),
            "dtype is missing": h.safetensors({"w": {"shape": [4], "data_offsets": [0, 16]}}, data),
            "entry is a list": h.safetensors({"w": []}, data),
            "entry is null": h.safetensors({"w": None}, data),
            "metadata is a number": h.safetensors({"__metadata__": 1, "w": entry}, data),
            "metadata holds a number": h.safetensors({"__metadata__": {"a": 1}, "w": entry}, data),
            "metadata is nested": h.safetensors(
                {"__metadata__": {"a": {"b": "c"}}, "w": entry}, data
            ),
            "nested lists": lambda: h.safetensors(b'{"w":' + b"[" * 20_000_000),
            "nested and closed": lambda: h.safetensors(
                b'{"w":' + b"[" * 5_000_000 + b"]" * 5_000_000 + b"}"
            ),
            "wide list": lambda: h.safetensors(b'{"w":[' + b"[]," * 7_000_000 + b"[]]}"),
            "parent folder": h.safetensors({"../../escape": entry}, data),
            "absolute": h.safetensors({"/escape": entry}, data),
            "control": h.safetensors({"a\x1b[2J": entry}, data),
            "alias of nothing": h.safetensors(
                {"__metadata__": {"alias:b": "nothing"}, "w": entry}, data
            ),
            "alias with a path": h.safetensors(
                {"__metadata__": {"alias:../../escape": "w"}, "w": entry}, data
            ),
            "alias with an escape": h.safetensors(
                {"__metadata__": {"alias:\x1b[2J": "w"}, "w": entry}, data
            ),
            "alias of itself": h.safetensors({"__metadata__": {"alias:w": "w"}, "w": entry}, data),
        }
        for title, content in cases.items():
            with self.subTest(title):
                path = self.place / "model.safetensors"
                path.write_bytes(content() if callable(content) else content)
                self.refused("digest", path)
                self.refused("convert", path, self.place / "out", "--to", "fp32")

    def test_shards_that_disagree(self):
        entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
        for number in (1, 2):
            (self.place / f"model-0000{number}-of-00002.safetensors").write_bytes(
                h.safetensors({"w": entry}, h.floats(4))
            )
        self.refused("digest", self.place)

    def test_missing_shard_of_weights(self):
        """The names say how many files there must be."""
        entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
        (self.place / "model-00001-of-00002.safetensors").write_bytes(
            h.safetensors({"w": entry}, h.floats(4))
        )
        self.refused("digest", self.place)
