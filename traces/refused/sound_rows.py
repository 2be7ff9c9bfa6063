"""Odd but legal: what must be accepted, so that refusing everything does not pass."""

import struct

from row import edited, file, files, h, row, tree

LEGAL = "no false alarm on a sound file is as much a gate as no missed error"
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DATA = h.floats(4)
OLD = "blocks.0.norm.weight"


def sound(name, why, make, to="fp32"):
    return row("sound." + name, why, "", "", LEGAL, make, to=to)


def weights(entries, storages):
    return file(h.torch_file(h.weights(entries), storages))


def st(header, data=DATA):
    return file(h.safetensors(header, data), "model.safetensors")


def named(name):
    return edited(lambda folder: folder.rename(OLD, name))


def rows():
    yield from tensors()
    yield from headers()
    yield from folders()


def tensors():
    view = h.tensor
    yield sound("plain", "the file that all others damage", weights([("w", view())], [DATA]))
    yield sound("64_axes", "torch's limit", weights([("w", view((1,) * 64, (1,) * 64, numel=1))],
                                                    [DATA[:4]]))
    yield sound("no_axes", "a number", weights([("w", view((), (), numel=1))], [DATA[:4]]))
    yield sound("no_elements", "an axis of 0", weights([("w", view((0, 3), (3, 1), numel=0))],
                                                       [b""]))
    yield sound("no_elements_beside_2_to_30", "an axis of 0",
                weights([("w", view((2**30, 0), (1, 1), numel=0))], [b""]))
    yield sound("transposed", "strides that fall", weights([("w", view((2, 2), (1, 2)))], [DATA]))
    yield sound("expanded_inside", "stride 0 over a storage of as many elements",
                weights([("w", view((4,), (0,)))], [DATA]))
    yield sound("offset_of_all_but_one", "the last element",
                weights([("w", view((1,), (1,), offset=3))], [DATA]))
    yield sound("two_names_of_one_tensor", "tied weights",
                weights([("a", view()), ("b", view())], [DATA]))
    yield sound("storage_key_of_nine_digits", "the largest that is read", file(
        h.torch_zip([(name.replace("data/0", "data/123456789"), data) for name, data in
                     h.records_of(h.weights([("w", view(key="123456789"))]), [DATA])])))
    bits = struct.pack("<4I", 0x7F800001, 0xFFC12345, 0x80000000, 0x00000001)
    yield sound("nan_payloads_and_denormals", "bits are copied, not numbers",
                weights([("w", view())], [bits]))
    yield sound("text_of_a_name_of_255_bytes", "the longest component",
                weights([("x" * 255, view())], [DATA]))
    yield sound("names_of_every_kind", "Unicode, spaces, brackets, slashes",
                weights([(name, view((1,), (1,), offset=i)) for i, name in enumerate(
                    ("layer[0].weight", " ", "重み/b c", "..a"))], [DATA]))


def headers():
    yield sound("header_padded", "spaces behind the object", file(
        h.safetensors(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}' + b" " * 100_000,
                      DATA), "model.safetensors"))
    yield sound("header_unsorted", "names in another order than their bytes",
                st({"b": {**ENTRY, "data_offsets": [16, 32]}, "a": ENTRY}, DATA * 2))
    yield sound("empty_tensors_at_one_offset", "no bytes, no overlap",
                st({"a": {**ENTRY, "shape": [0], "data_offsets": [0, 0]},
                    "b": {**ENTRY, "shape": [2**40, 0], "data_offsets": [0, 0]}, "w": ENTRY}))
    yield sound("metadata_of_1_MB", "text to text",
                st({"__metadata__": {"format": "pt", "note": "x" * 1_000_000}, "w": ENTRY}))
    yield sound("10_000_tensors", "a wide header", file(
        lambda: h.safetensors({f"layer.{i}": {"dtype": "U8", "shape": [1],
                                              "data_offsets": [i, i + 1]}
                               for i in range(10_000)}, bytes(10_000)), "model.safetensors"))
    yield sound("shards_with_an_index", "as transformers writes them", files({
        "model-00001-of-00002.safetensors": h.safetensors({"a": ENTRY}, DATA),
        "model-00002-of-00002.safetensors": h.safetensors({"b": ENTRY}, DATA),
        "model.safetensors.index.json": '{"metadata": {"total_size": 32}, "weight_map": {"a": '
        '"model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'}))


def folders():
    yield sound("latest_with_a_newline", "as an editor leaves it", tree(
        lambda source, _: (source / "latest").write_text("global_step3\r\n")), "universal")
    yield sound("shards_by_links", "as a download cache keeps them", tree(linked), "universal")
    yield sound("code_beside_the_shards", "DeepSpeed copies zero_to_fp32.py in", tree(
        lambda source, _: (source / "zero_to_fp32.py").write_text("raise SystemExit('run')\n")),
        "universal")
    for title, name in (
        ("of_255_bytes", "x" * 255), ("with_slashes", "a.b/c[1].d"), ("of_a_pattern", "(a+)+$"),
        ("of_dots", "..."), ("of_a_device", "CON"), ("right_to_left", "\u202egnp"),
        ("of_a_command", "$(touch canary)"), ("of_an_option", "-rf"),
    ):
        yield sound("parameter_" + title, "legitimate (docs/CONTRACTS.md §6)", named(name),
                    "universal")
    yield sound("client_state_of_unknown_classes", "carried opcode for opcode", edited(
        lambda folder: folder.insert(
            "hook", h.call("project.config", "Schedule", h.text("x")) + b"}" + h.BUILD,
            "model_states")), "universal")
    for module, name, why in (
        ("functools", "partial", "making one calls nothing; what it holds is judged itself"),
        ("types", "SimpleNamespace", "attributes alone, as argparse.Namespace"),
        ("posix", "uname_result", "what os.uname() gives"),
        ("subprocess", "CompletedProcess", "what a command left; making one starts none"),
        ("commands.train", "Config", "a user's package of an old module's name"),
        ("code.model", "Block", "a user's package of a module's name"),
    ):
        yield sound(f"client_state_{module}.{name}", why, edited(
            lambda folder, module=module, name=name: folder.insert(
                "hook", h.call(module, name, h.integer(1)), "model_states")), "universal")
    yield sound("client_state_nested_900_deep", "below the limit", edited(
        lambda folder: folder.insert("deep", b"]" * 900 + b"a" * 899, "model_states")),
        "universal")
    yield sound("client_state_integer_of_1000_bytes", "LONG4, which torch writes", edited(
        lambda folder: folder.insert("large", b"\x8b" + struct.pack("<i", 1000) + b"\1" * 1000,
                                     "model_states")), "universal")


def linked(_, tag):
    store = tag.parent / "blobs"
    store.mkdir()
    for path in list(tag.glob("*.pt")):
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
