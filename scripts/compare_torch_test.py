#!/usr/bin/env python3
"""Proves that compare_torch.py finds each kind of difference and reports no false one.

Hand-made files are written opcode by opcode, so that nothing of compare_torch.py or torch takes
part in making them. The tests on real checkpoints need the folder that ISOSHARD_TRACES names
(default: traces/ of this repository) and are skipped, with a message, where it holds none.
Does not verify: agreement with torch.load itself, files beyond 4 GiB.
"""
import contextlib
import glob
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import unittest
import zipfile

import compare_torch

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRACES = os.environ.get("ISOSHARD_TRACES", os.path.join(REPOSITORY, "traces"))
FLOATS = struct.pack("<6f", 1, 2, 3, 4, 5, 6)


class Global(str):
    """A global, as "module name"."""


class Reduce:
    """GLOBAL, arguments, REDUCE (or NEWOBJ), then SETITEMS and BUILD where given."""

    def __init__(self, name, *args, items=None, state=None, opcode=b"R"):
        self.name, self.args, self.items, self.state, self.opcode = name, args, items, state, opcode


class Persistent(tuple):
    """The storage that a persistent id names."""


class Raw(bytes):
    """Opcodes taken as they are."""


def opcodes(item):
    if isinstance(item, Raw):
        return bytes(item)
    if isinstance(item, Global):
        return b"c" + item.replace(" ", "\n").encode() + b"\n"
    if isinstance(item, Reduce):
        tail = set_items(item.items) if item.items is not None else b""
        tail += opcodes(item.state) + b"b" if item.state is not None else b""
        return opcodes(Global(item.name)) + opcodes(item.args) + item.opcode + tail
    if isinstance(item, Persistent):
        return opcodes(tuple(item)) + b"Q"
    if isinstance(item, (tuple, list)):
        return b"(" + b"".join(map(opcodes, item)) + (b"t" if isinstance(item, tuple) else b"l")
    if isinstance(item, dict):
        return b"}" + set_items(item)
    if isinstance(item, str):
        return b"X" + struct.pack("<I", len(item.encode())) + item.encode()
    if isinstance(item, float):
        return b"G" + struct.pack(">d", item)
    if item is None or isinstance(item, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[item]
    return b"J" + struct.pack("<i", item)


def set_items(items):
    pairs = items.items() if isinstance(items, dict) else items
    return b"(" + b"".join(opcodes(key) + opcodes(value) for key, value in pairs) + b"u"


def ordered(*pairs, state=None):
    return Reduce("collections OrderedDict", items=list(pairs), state=state)


def bare(storage="FloatStorage", storage_numel=6, key="0", location="cpu"):
    return Persistent(("storage", Global(f"torch {storage}"), key, location, storage_numel))


def tensor(shape=(2, 3), stride=(3, 1), offset=0, grad=False, **storage):
    return Reduce("torch._utils _rebuild_tensor_v2", bare(**storage), offset, shape, stride, grad,
                  ordered())


def safetensors(shape=(2, 3), dtype="F32", metadata=("format",), data=FLOATS, end=24):
    header = json.dumps({"__metadata__": {key: "pt" for key in metadata},
                         "w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}})
    return struct.pack("<Q", len(header)) + header.encode() + data


def scaler(**state):
    return Reduce("deepspeed.runtime.fp16.loss_scaler LossScaler", state=state, opcode=b"\x81")


class Files(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.made = 0

    def path(self, name):
        os.makedirs(os.path.dirname(os.path.join(self.folder, name)), exist_ok=True)
        return os.path.join(self.folder, name)

    def write(self, name, data):
        with open(self.path(name), "wb") as stream:
            stream.write(data)
        return self.path(name)

    def torch_file(self, tree, storages=None, name=None, prefix="archive", more=()):
        self.made += 1
        path = self.path(name or f"{self.made}.pt")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{prefix}/data.pkl", b"\x80\x02" + opcodes(tree) + b".")
            for key, data in (storages or {"0": FLOATS}).items():
                archive.writestr(f"{prefix}/data/{key}", data)
            for record, data in more:
                archive.writestr(f"{prefix}/{record}", data)
        return path

    def judge(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = compare_torch.main([str(argument) for argument in arguments])
        return status, out.getvalue() + err.getvalue()

    def differences(self, a, b, storages_a=None, storages_b=None):
        """The paths that differ between two trees; compared in both directions."""
        file_a, file_b = self.torch_file(a, storages_a), self.torch_file(b, storages_b)
        for path in (file_a, file_b):
            self.assertEqual(compare_torch.compare_paths(path, path).differences, [])
        found = compare_torch.compare_paths(file_a, file_b).differences
        back = compare_torch.compare_paths(file_b, file_a).differences
        self.assertEqual(sorted(d.path for d in found), sorted(d.path for d in back))
        return [d.path for d in found]

    def assert_differs(self, a, b, *paths, **storages):
        self.assertEqual(self.differences(a, b, **storages), list(paths))


class ScalarsAndContainers(Files):
    def test_types_and_bits_of_scalars_count(self):
        for a, b in ((3, 3.0), (1, True), (0, False), (0.0, -0.0), (1, 2), ("a", "b"), ("1", 1),
                     (None, False), (1.0, 1.0 + 2**-52), ("x" * 300 + "a", "x" * 300 + "b")):
            with self.subTest(a=a, b=b):
                self.assert_differs({"k": [a]}, {"k": [b]}, "['k'][0]")

    def test_nan_equals_nan_of_the_same_bits_only(self):
        quiet, other = (Raw(b"G\x7f\xf8\0\0\0\0\0" + last) for last in (b"\0", b"\1"))
        self.assert_differs([quiet], [quiet])
        self.assert_differs([quiet], [other], "[0]")

    def test_opcode_choice_does_not_count(self):
        self.assert_differs([300, "s", (1, 2)],
                            [Raw(b"M\x2c\x01"), Raw(b"X\x01\0\0\0sq\0"), Raw(b"K\x01K\x02\x86")])

    def test_class_of_container_counts(self):
        forms = [(1, 2), [1, 2], Reduce("torch Size", (1, 2)), {1: 2}, ordered((1, 2)),
                 Reduce("collections Counter", {1: 2})]
        for i, a in enumerate(forms):
            for j, b in enumerate(forms):
                self.assert_differs({"k": a}, {"k": b}, *["['k']"] * (i != j))

    def test_missing_and_extra_items_and_type_of_key_count(self):
        self.assert_differs([1, 2], [1, 2, 3], "[2]")
        self.assert_differs({"a": 1, "b": 2}, {"a": 1}, "['b']")
        for other in (True, "1", 1.0):
            self.assertEqual(len(self.differences({1: 0}, {other: 0})), 2)

    def test_order_of_keys_counts(self):
        self.assert_differs({"a": 1, "b": 2}, {"b": 2, "a": 1}, ".order")
        self.assert_differs(ordered(("a", 1), ("b", 2)), ordered(("b", 2), ("a", 1)), ".order")

    def test_order_of_keys_is_free_only_inside_optimizer_state(self):
        one, two = {"step": 1, "exp_avg": 2}, {"exp_avg": 2, "step": 1}
        self.assert_differs({"state": {0: one, 1: one}}, {"state": {0: two, 1: two}})
        self.assert_differs({"state": {"0": one}}, {"state": {"0": two}}, "['state']['0'].order")
        self.assert_differs({"state": [one]}, {"state": [two]}, "['state'][0].order")
        self.assert_differs({"state": {0: {"in": one}}}, {"state": {0: {"in": two}}},
                            "['state'][0]['in'].order")
        self.assert_differs({"state": {0: one, 1: one}}, {"state": {1: one, 0: one}},
                            "['state'].order")
        self.assert_differs({"state": {0: one}}, {"state": {0: {"exp_avg": 2, "step": 3}}},
                            "['state'][0]['step']")

    def test_state_of_ordered_dict_counts(self):
        self.assert_differs(ordered(("a", 1), state={"_metadata": 1}),
                            ordered(("a", 1), state={"_metadata": 2}), ".state['_metadata']")
        self.assert_differs(ordered(state={"_metadata": 1}), ordered(), ".state")

    def test_order_inside_a_set_does_not_count(self):
        for name in ("__builtin__ set", "builtins frozenset"):
            self.assert_differs(Reduce(name, ["a", "b"]), Reduce(name, ["b", "a"]))
            self.assertEqual(len(self.differences(Reduce(name, ["a"]), Reduce(name, ["b"]))), 2)

    def test_cycles_end(self):
        def cycle(number):
            return Raw(b"]q\x00(" + opcodes(number) + b"h\x00e")
        self.assert_differs(cycle(1), cycle(1))
        self.assert_differs(cycle(1), cycle(2), "[0]")


class UnknownObjects(Files):
    def test_everything_put_into_an_object_counts(self):
        self.assert_differs([scaler(cur_scale=1.0)], [scaler(cur_scale=1)],
                            "[0].state['cur_scale']")
        stage = "deepspeed.runtime.zero.config ZeroStageEnum"
        self.assert_differs(Reduce(stage, 1), Reduce(stage, 2), ".args[0]")
        self.assert_differs(Reduce(stage), Reduce(stage, opcode=b"\x81"), ".how")
        self.assert_differs(Reduce("m C", items={"a": 1}), Reduce("m C", items={"a": 2}),
                            ".dictitems['a']")
        one, two = (Raw(opcodes(Reduce("m C")) + b"(" + opcodes(n) + b"e") for n in (1, 2))
        self.assert_differs(one, two, ".listitems[0]")

    def test_module_and_name_count(self):
        for other in ("m D", "n C"):
            self.assert_differs([Reduce("m C")], [Reduce(other)], "[0]")
        self.assert_differs([Global("torch float16")], [Global("torch bfloat16")], "[0]")

    def test_objects_as_keys_are_compared(self):
        one, two = (Reduce("m C", state={"a": n}) for n in (1, 2))
        self.assert_differs({one: 5}, {two: 5}, ".key[m.C ()].state['a']")
        self.assert_differs({one: 5, two: 6}, {one: 7, two: 6}, "[m.C ()]")

    def test_nothing_named_in_a_file_runs(self):
        target = self.path("made_by_the_pickle")
        hostile = [Reduce("os mkdir", target), Reduce("builtins eval", "__import__('os').abort()"),
                   Reduce("no.such.module thing", 1)]
        self.assert_differs(hostile, hostile)
        self.assertFalse(os.path.exists(target))
        self.assertNotIn("no.such.module", sys.modules)


class Tensors(Files):
    def test_every_flipped_bit_is_found(self):
        for bit in range(8 * len(FLOATS)):
            flipped = bytearray(FLOATS)
            flipped[bit // 8] ^= 1 << bit % 8
            self.assert_differs([tensor()], [tensor()], "[0]", storages_b={"0": bytes(flipped)})

    def test_message_names_first_index_both_patterns_and_count(self):
        other = struct.pack("<6f", 1, 2, 3, 4, -5, 7)
        paths = self.torch_file({"a": tensor()}), self.torch_file({"a": tensor()}, {"0": other})
        out = self.judge(*paths)[1]
        self.assertIn("['a']: expected 0x40a00000 at [1, 1] of float32 [2, 3], found 0xc0a00000; "
                      "2 of 6 elements differ", out)

    def test_first_difference_beyond_one_chunk_is_found(self):
        n = compare_torch.CHUNK_BYTES // 2 + 3
        tree = [tensor(shape=(n,), stride=(1,), storage="LongStorage", storage_numel=n)]
        other = bytes(8 * n - 16) + b"\1" + bytes(15)
        a, b = (self.torch_file(tree, {"0": data}) for data in (bytes(8 * n), other))
        found = compare_torch.compare_paths(a, b).differences
        self.assertIn(f"at [{n - 2}]", found[0].expected)
        self.assertIn(f"1 of {n} elements", found[0].found)

    def test_each_property_counts(self):
        self.assert_differs([tensor()], [tensor(grad=True)], "[0].requires_grad")
        self.assert_differs([tensor()], [tensor(storage="IntStorage")], "[0].dtype")
        self.assert_differs([tensor()], [tensor(shape=(1, 3))], "[0].shape")
        self.assert_differs([tensor()], [tensor(stride=(1, 2))], "[0].stride", "[0]")

    def test_elements_follow_offset_and_stride(self):
        whole, half = {"0": bytes(24) + FLOATS}, {"0": FLOATS}
        self.assert_differs([tensor(offset=6, storage_numel=12)], [tensor()],
                            storages_a=whole, storages_b=half)
        columns = tensor(shape=(3, 2), stride=(1, 3))
        strided = tensor(shape=(3, 2), stride=(1, 3), offset=6, storage_numel=12)
        self.assert_differs([columns], [strided], storages_a=half, storages_b=whole)
        unused = {"0": FLOATS[:20] + b"\xff\xff\xff\xff"}
        row = tensor(shape=(5,), stride=(1,))
        self.assert_differs([row], [row], storages_a=half, storages_b=unused)
        last = tensor(shape=(2,), stride=(5,))
        self.assert_differs([last], [last], "[0]", storages_a=half, storages_b=unused)

    def test_device_prefix_numbering_and_id_do_not_count(self):
        a = self.torch_file([tensor()])
        b = self.torch_file([tensor(key="7", location="cuda:3")], {"7": FLOATS}, prefix="other",
                            more=[("byteorder", b"little"), (".data/serialization_id", b"1")])
        self.assertEqual(self.judge(a, b)[0], 0)

    def test_ties_count_in_both_directions(self):
        both = {"0": FLOATS, "1": FLOATS}
        tied = {"a": tensor(), "b": tensor()}
        untied = {"a": tensor(), "b": tensor(key="1")}
        self.assert_differs(tied, untied, "['b'].tie", storages_a=both, storages_b=both)
        swapped = {"a": tensor(key="1"), "b": tensor()}
        self.assert_differs(untied, swapped, storages_a=both, storages_b=both)
        empty = {key: tensor(key=key, shape=(0,), stride=(1,)) for key in "01"}
        shared = {key: tensor(key="0", shape=(0,), stride=(1,)) for key in "01"}
        self.assert_differs(empty, shared, storages_a=both, storages_b=both)

    def test_parameter_attributes_and_subclass_count(self):
        parameter = Reduce("torch._utils _rebuild_parameter", tensor(), True, ordered())
        self.assertIn("[0].type_name", self.differences([tensor()], [parameter]))
        frozen = Reduce("torch._utils _rebuild_parameter", tensor(), False, ordered())
        self.assert_differs([parameter], [frozen], "[0].requires_grad")
        one, two = (Reduce("torch._utils _rebuild_parameter_with_state", tensor(), True, ordered(),
                           {"tag": n}) for n in (1, 2))
        self.assert_differs([one], [two], "[0].attributes['tag']")

        def typed(name, state):
            inner = tensor()
            return Reduce("torch._tensor _rebuild_from_type_v2", Global(inner.name), Global(name),
                          inner.args, state)
        self.assert_differs([typed("torch Tensor", {})], [tensor()])
        self.assert_differs([typed("torch Tensor", {"ds_id": "0"})], [tensor()],
                            "[0].attributes['ds_id']")
        self.assert_differs([typed("m Sub", {})], [tensor()], "[0].type_name")

    def test_dtype_without_a_storage_class(self):
        def tensor_v3(dtype):
            return Reduce("torch._utils _rebuild_tensor_v3", bare("UntypedStorage", 24), 0, (12,),
                          (1,), False, ordered(), Global(dtype))
        self.assert_differs([tensor_v3("torch uint16")], [tensor_v3("torch float16")], "[0].dtype")

    def test_bare_storages_are_compared(self):
        other, short = {"0": FLOATS[:20] + bytes(4)}, {"0": FLOATS[:20]}
        self.assert_differs([bare()], [bare()], "[0]", storages_b=other)
        self.assert_differs([bare()], [bare("IntStorage")], "[0].dtype")
        self.assert_differs([bare()], [bare(storage_numel=5)], "[0].size_bytes", storages_b=short)


class Unreadable(Files):
    def assert_unreadable(self, path):
        status, out = self.judge(path, path)
        self.assertEqual((status, out.count("\n")), (2, 1), out)

    def test_broken_files_end_in_one_line(self):
        with open(self.torch_file([tensor()]), "rb") as stream:
            data = stream.read()
        for name, broken in (("crc.pt", data.replace(FLOATS, bytes(24))), ("cut.pt", data[:-40]),
                             ("empty.pt", b""), ("pickle.pt", b"\x80\x02}."), ("x.json", b"{"),
                             ("twice.json", b'{"a": 1, "a": 1}'), ("x.safetensors", b"\xff" * 9),
                             ("long.safetensors", safetensors(data=FLOATS + b"\0")),
                             ("cut.safetensors", safetensors(data=FLOATS[:-1])),
                             ("shape.safetensors", safetensors(shape=(5,)))):
            with self.subTest(name=name):
                self.assert_unreadable(self.write(name, broken))
        self.assert_unreadable(self.path("absent.pt"))

    def test_lying_tensors_are_refused(self):
        for lie in (tensor(offset=1), tensor(shape=(7,), stride=(1,)), tensor(stride=(3,)),
                    tensor(storage_numel=5), tensor(key="9"), tensor(storage="NoStorage"),
                    tensor(offset=-1), tensor(shape=(True, 3))):
            self.assert_unreadable(self.torch_file([lie]))
        self.assert_unreadable(self.torch_file([tensor()], more=[("byteorder", b"big")]))
        state_twice = Raw(opcodes(scaler(a=1)) + opcodes({"a": 2}) + b"b")
        nested_deeply = Raw(b"(" * 9999 + b"l" * 9999)
        for tree in (state_twice, nested_deeply):
            self.assert_unreadable(self.torch_file(tree))

    def test_folder_against_file_and_nothing_against_nothing(self):
        os.makedirs(self.path("empty/inner"))
        self.assertEqual(self.judge(self.folder, self.torch_file([]))[0], 2)
        self.assertEqual(self.judge(self.path("empty"), self.path("empty"))[0], 2)


class Folders(Files):
    def setUp(self):
        super().setUp()
        for side in "ab":
            self.torch_file({"x": tensor()}, name=f"{side}/zero/w/fp32.pt")
            self.write(f"{side}/latest", b"global_step3")
            self.write(f"{side}/config.json", b'{"a": 1, "b": [2.0]}')
            self.write(f"{side}/model.safetensors", safetensors(metadata=("format", "kind")))
        self.write("b/MANIFEST.json", b"{}")
        self.write("a/certificate.json", b"{}")

    def found(self, *more):
        result = compare_torch.compare_paths(self.path("a"), self.path("b"), *more)
        return [(found.file, found.path) for found in result.differences]

    def test_equal_apart_from_our_own_files(self):
        self.assertEqual(self.found(), [])

    def test_missing_and_extra_files_count(self):
        os.remove(self.path("b/zero/w/fp32.pt"))
        self.write("b/more", b"")
        self.assertEqual(self.found(), [("more", "(file)"), ("zero/w/fp32.pt", "(file)")])
        self.assertEqual(self.found((), ("more", "zero/*")), [])

    def test_bytes_of_other_files_count(self):
        self.write("b/latest", b"global_step3\n")
        self.assertEqual(self.found(), [("latest", "(top)")])

    def test_json_is_compared_as_parsed(self):
        self.write("b/config.json", b'{"b":[2.0],"a":1}')
        self.assertEqual(self.found(), [])
        self.write("b/config.json", b'{"b":[2],"a":1}')
        self.assertEqual(self.found(), [("config.json", "['b'][0]")])

    def test_safetensors_are_compared_by_tensor(self):
        self.write("b/model.safetensors", safetensors(metadata=("kind", "format")))
        self.assertEqual(self.found(), [])
        self.write("b/model.safetensors", safetensors(dtype="I32"))
        self.assertEqual([path for _, path in self.found()],
                         ["['__metadata__']['kind']", "['w'].dtype"])

    def test_ignored_differences_are_counted(self):
        self.torch_file({"x": tensor(grad=True), "y": 1}, name="b/zero/w/fp32.pt")
        a, b = self.path("a"), self.path("b")
        self.assertEqual(self.judge(a, b)[1].count("expected"), 2)
        self.assertEqual(self.judge(a, b, "--max", 1)[1].count("expected"), 1)
        self.assertEqual(self.judge(a, b, "--quiet"), (1, ""))
        status, out = self.judge(a, b, "--ignore", r"requires_grad$", "--ignore", r"\['y'\]")
        self.assertEqual(status, 0)
        self.assertIn("ignored 2", out)
        self.assertEqual(self.judge(a, b, "--ignore", "requires_grad$")[0], 1)
        self.assertEqual(self.judge(a, b, "--ignore", "(")[0], 2)

    def test_dump_shows_the_tree(self):
        out = self.judge("--dump", self.path("a/zero/w/fp32.pt"))[1]
        self.assertIn("['x']: torch.Tensor float32 [2, 3]", out)


class RealCheckpoints(Files):
    @classmethod
    def setUpClass(cls):
        found = glob.glob(os.path.join(TRACES, "**", "*.pt"), recursive=True)
        if not found:
            print(f"skipped: no *.pt below ISOSHARD_TRACES = {TRACES}", file=sys.stderr)
            raise unittest.SkipTest(f"no *.pt below {TRACES}")
        cls.files = sorted(path for path in found if "refused" not in path.split(os.sep))

    def edited(self, path, edit):
        """A copy whose records went through edit(record name, bytes), with CRCs to match."""
        self.made += 1
        copy = self.path(f"edited{self.made}.pt")
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
            for name in source.namelist():
                target.writestr(name, edit(name, source.read(name)))
        return copy

    def test_every_file_equals_itself(self):
        compared = [compare_torch.compare_paths(path, path) for path in self.files]
        self.assertEqual([result.differences for result in compared if result.differences], [])
        tensors = sum(result.tensors for result in compared)
        self.assertGreater(tensors, 0)
        print(f"{len(self.files)} real files, {tensors} tensors", file=sys.stderr)

    def test_a_flipped_bit_in_each_file_is_found(self):
        changed = 0
        for path in self.files:
            tree = compare_torch.load(path)
            key, byte = first_element(tree) or (None, 0)

            def flip(name, data):
                if not name.endswith(f"/data/{key}"):
                    return data
                return data[:byte] + bytes([data[byte] ^ 0x10]) + data[byte + 1:]
            if key is not None:
                other = compare_torch.load(self.edited(path, flip))
                self.assertTrue(compare_torch.compare(tree, other), path)
                changed += 1
        self.assertGreater(changed, 0)

    def test_an_int_made_float_is_found(self):
        def to_float(name, data):
            key = opcodes("global_steps")
            if not name.endswith("data.pkl"):
                return data
            at = data.index(key) + len(key)
            at += 2 if data[at:at + 1] == b"q" else 5 if data[at:at + 1] == b"r" else 0
            self.assertEqual(data[at:at + 1], b"K")
            return data[:at] + opcodes(float(data[at + 1])) + data[at + 2:]
        models = [path for path in self.files
                  if os.path.basename(path) == "mp_rank_00_model_states.pt"]
        for path in models:
            found = compare_torch.compare_paths(path, self.edited(path, to_float)).differences
            self.assertEqual([d.path for d in found], ["['global_steps']"], path)
        self.assertGreater(len(models), 0)

    def test_different_checkpoints_differ(self):
        first, other = (os.path.join(TRACES, name, "universal")
                        for name in ("z1_bf16_dp2", "z1_fp16_dp2"))
        if not os.path.isdir(first) or not os.path.isdir(other):
            self.skipTest("no z1_bf16_dp2 and z1_fp16_dp2")
        self.assertEqual(self.judge(first, first)[0], 0)
        out = self.judge(first, other, "--max", 1000)[1]
        self.assertIn("'global_step3_universal/zero/scale/fp32.pt' ['param']: expected 0x", out)


def first_element(item):
    """(storage key, byte) of the first element of some non-empty tensor, or None."""
    if isinstance(item, compare_torch.Tensor):
        width = compare_torch.ITEM_BYTES[item.dtype]
        return None if 0 in item.shape else (item.storage.key, item.offset * width)
    if isinstance(item, (dict, list, tuple)):
        places = (first_element(child) for child in compare_torch.children(item).values())
        return next((place for place in places if place), None)
    return None


if __name__ == "__main__":
    unittest.main(verbosity=2)
