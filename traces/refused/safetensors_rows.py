"""Headers of safetensors files that lie, and the index and certificate beside such files."""

import json

from row import file, files, h, row

DATA = h.floats(4)
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
TEXT = json.dumps(ENTRY).encode()
LENGTH = "the header's length is at most 100,000,000 and inside the file"
TILE = "data_offsets run from 0 to the file's end without hole or overlap"
SHAPE = "shape × item size is the length, by checked arithmetic"
ONCE = "every key once"
JSON = "one JSON object in UTF-8, spaces behind it and nothing else"
TYPES = "known dtypes, whole numbers, texts"
NAME = "names are relative paths without tricks"
SOUND = h.safetensors({"w": ENTRY}, DATA)


def with_(data=DATA, **fields):
    return h.safetensors({"w": {**ENTRY, **fields}}, data)


def raw(header, data=DATA):
    return h.safetensors(header, data)


def st_row(name, threat, code, words, rule, content, **how):
    return row("safetensors." + name, threat, code, words, rule,
               file(content, "model.safetensors"), **how)


def rows():
    yield from lengths()
    yield from offsets()
    yield from shapes()
    yield from keys()
    yield from texts()
    yield from beside()


def lengths():
    lie = "a reader that allocates what the header's length says"
    for name, content, words in (
        ("empty_file", b"", "too short"),
        ("seven_bytes", b"\x08\0\0\0\0\0\0", "too short"),
        ("length_beyond_the_file", h.safetensors({"w": ENTRY}, DATA, 10**6), "impossible"),
        ("length_100_000_001", h.safetensors({"w": ENTRY}, DATA, 100_000_001), "impossible"),
        ("length_2_to_63", h.safetensors({"w": ENTRY}, DATA, 2**63), "impossible"),
        ("length_2_to_64", h.safetensors({"w": ENTRY}, DATA, 2**64 - 1), "impossible"),
        ("length_wraps", h.safetensors({"w": ENTRY}, DATA, 2**64 - 8), "impossible"),
        ("length_0", h.safetensors(b"", DATA), "begin"),
        ("length_one_less", h.safetensors({"w": ENTRY}, DATA, len(TEXT) + 6), "JSON"),
        ("length_into_the_data", h.safetensors({"w": ENTRY}, DATA, len(TEXT) + 23), ""),
    ):
        yield st_row(name, lie, "corrupt", words, LENGTH, content)


def offsets():
    lie = "bytes that no tensor or two tensors own: hidden data, aliasing"
    two = {"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 32]}}
    for name, content, words in (
        ("hole_at_the_begin", with_(DATA + bytes(4), data_offsets=[4, 20]), "hole"),
        ("hole_between", h.safetensors({**two, "b": {**ENTRY, "data_offsets": [20, 36]}},
                                       DATA + bytes(20)), "hole"),
        ("overlap", h.safetensors({**two, "b": {**ENTRY, "data_offsets": [8, 24]}},
                                  DATA + bytes(8)), "overlap"),
        ("overlap_whole", h.safetensors({"a": ENTRY, "b": ENTRY}, DATA), "share bytes"),
        ("overlap_inside", h.safetensors(
            {"a": ENTRY, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, DATA),
         "overlap"),
        ("bytes_behind", h.safetensors({"w": ENTRY}, DATA + b"x"), "follow the last"),
        ("archive_behind", h.safetensors({"w": ENTRY}, DATA + b"PK\5\6" + bytes(18)),
         "follow the last"),
        ("bytes_missing", h.safetensors({"w": ENTRY}, DATA[:-1]), "do not fit"),
        ("end_before_begin", with_(data_offsets=[16, 0]), "do not fit"),
        ("offset_negative", with_(data_offsets=[-16, 0]), "do not fit"),
        ("offset_2_to_63", with_(data_offsets=[2**63, 2**63 + 16]), "not integers"),
        ("offset_2_to_64", with_(data_offsets=[2**64, 2**64 + 16]), "not integers"),
        ("offset_near_2_to_63", with_(data_offsets=[2**63 - 17, 2**63 - 1]), "do not fit"),
        ("offsets_one", with_(data_offsets=[0]), "two data_offsets"),
        ("offsets_three", with_(data_offsets=[0, 16, 32]), "two data_offsets"),
        ("offsets_fractions", with_(data_offsets=[0.5, 16.5]), "not integers"),
        ("offsets_texts", with_(data_offsets=["0", "16"]), "not integers"),
        ("offsets_an_object", with_(data_offsets={"0": 0, "1": 16}), "not integers"),
        ("offsets_infinite", raw(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,1e400]}}'),
         ""),
    ):
        yield st_row(name, lie, "corrupt", words, TILE, content)


def shapes():
    lie = "a product of sizes that wraps around or does not fit (a shape bomb, CVE-2026-0897)"

    def empty(dtype, *shape):
        return h.safetensors({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}})

    for name, content, words in (
        ("shape_too_large", with_(shape=[5]), "do not fit"),
        ("shape_too_small", with_(shape=[3]), "do not fit"),
        ("shape_negative", with_(shape=[-4]), "negative or too large"),
        ("shape_negative_twice", with_(shape=[-2, -2]), "negative or too large"),
        ("shape_2_to_62_in_nothing", empty("F32", 2**62), "too large"),
        ("shape_2_to_61_doubles_in_nothing", empty("F64", 2**61), "too large"),
        ("shape_wraps_to_nothing", empty("F32", 2**32, 2**32), "too large"),
        ("shape_wraps_to_16", with_(shape=[2**62 + 4]), "too large"),
        ("shape_wraps_beside_zero", empty("F32", 2**33, 2**33, 0), "too large"),
        ("shape_2_to_64", with_(shape=[2**64]), "not integers"),
        ("shape_fraction", with_(shape=[4.5]), "not integers"),
        ("shape_float_of_a_whole", with_(shape=[4.0]), "not integers"),
        ("shape_true", with_(shape=[True, 4]), "not integers"),
        ("shape_null", with_(shape=None), "not integers"),
        ("shape_number", with_(shape=4), "not integers"),
        ("shape_text", with_(shape="4"), "not integers"),
        ("shape_nan", raw(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'), "JSON"),
        ("shape_of_101_axes", with_(shape=[1] * 101), "too long"),
        ("dtype_unknown", with_(dtype="F31"), "unknown dtype"),
        ("dtype_in_small_letters", with_(dtype="f32"), "unknown dtype"),
        ("dtype_of_half_a_byte", with_(dtype="F4", shape=[32]), "unknown dtype"),
        ("dtype_number", with_(dtype=32), "lacks dtype"),
        ("dtype_missing", h.safetensors({"w": {"shape": [4], "data_offsets": [0, 16]}}, DATA),
         "lacks dtype"),
        ("shape_missing", h.safetensors({"w": {"dtype": "F32", "data_offsets": [0, 16]}}, DATA),
         "lacks"),
        ("entry_list", h.safetensors({"w": []}, DATA), ""),
        ("entry_null", h.safetensors({"w": None}, DATA), ""),
        ("entry_text", h.safetensors({"w": "F32"}, DATA), ""),
    ):
        yield st_row(name, lie, "corrupt", words, SHAPE if "shape" in name else TYPES, content)


def keys():
    last = "JSON libraries take the last of two equal keys in silence"
    for name, content, rule in (
        ("duplicate_name", raw(b'{"w":%b,"w":%b}' % (TEXT, TEXT)), ONCE),
        ("duplicate_name_by_escape", raw(b'{"w":%b,"\\u0077":%b}' % (TEXT, TEXT)), ONCE),
        ("duplicate_field", raw(b'{"w":{"dtype":"F32","dtype":"I32","shape":[4],'
                                b'"data_offsets":[0,16]}}'), ONCE),
        ("duplicate_metadata", raw(b'{"__metadata__":{},"__metadata__":{},"w":%b}' % TEXT), ONCE),
        ("duplicate_metadata_key", raw(b'{"__metadata__":{"a":"1","a":"2"},"w":%b}' % TEXT), ONCE),
    ):
        yield st_row(name, last, "corrupt", "twice", rule, content)
    odd = "metadata is text to text; programs trust it unread"
    for name, value in (
        ("number", 1), ("null", None), ("list", []), ("of_a_number", {"a": 1}),
        ("of_null", {"a": None}), ("nested", {"a": {"b": "c"}}), ("text", "pt"),
    ):
        yield st_row("metadata_" + name, odd, "corrupt", "etadata", TYPES,
                     h.safetensors({"__metadata__": value, "w": ENTRY}, DATA))
    for name, value in (
        ("of_nothing", {"alias:b": "nothing"}), ("with_a_path", {"alias:../../escape": "w"}),
        ("with_an_escape", {"alias:\x1b[2J": "w"}), ("of_itself", {"alias:w": "w"}),
        ("empty", {"alias:": "w"}),
    ):
        yield st_row("alias_" + name, "a second name for a tensor that is none", "corrupt",
                     "alias", NAME, h.safetensors({"__metadata__": value, "w": ENTRY}, DATA))


def texts():
    two = "two JSON readers, two meanings"
    for name, content, words in (
        ("single_quotes", raw(b"{'w': 1}"), "JSON"),
        ("list_for_an_object", h.safetensors(b"[]"), "begin"),
        ("leading_space", raw(b" {}"), "begin"),
        ("byte_order_mark", raw(b"\xef\xbb\xbf{}"), "begin"),
        ("text_behind", raw(b'{"w":%b} x' % TEXT), "JSON"),
        ("object_behind", raw(b'{"w":%b}{}' % TEXT), "JSON"),
        ("nul_behind", raw(b'{"w":%b}\0' % TEXT), "NUL"),
        ("comment", raw(b'{/* */"w":%b}' % TEXT), "JSON"),
        ("trailing_comma", raw(b'{"w":%b,}' % TEXT), "JSON"),
        ("not_utf8", raw(b'{"\xff":%b}' % TEXT), "JSON"),
        ("overlong_utf8", raw(b'{"\xc0\xaf":%b}' % TEXT), "JSON"),
        ("lone_surrogate", raw(b'{"\\ud800":%b}' % TEXT), "JSON"),
        ("unfinished", raw(b'{"w":'), "JSON"),
    ):
        yield st_row(name, two, "corrupt", words, JSON, content)
    grow = "JSON of great depth or width"
    for name, code, words, content in (
        ("lists_in_lists", "corrupt", "holds a list", lambda: raw(b'{"w":' + b"[" * 20_000_000)),
        ("lists_closed", "corrupt", "holds a list",
         lambda: raw(b'{"w":' + b"[" * 500_000 + b"]" * 500_000 + b"}")),
        ("objects_in_objects", "corrupt", "nested too deeply",
         lambda: raw(b'{"w":' * 100_000 + b"1" + b"}" * 100_000)),
        ("wide_list", "corrupt", "too long", lambda: raw(b'{"w":[' + b"1," * 5_000_000 + b"1]}")),
        ("wide_object", "limit", "memory",
         lambda: raw(b"{" + b",".join(b'"%d":0' % i for i in range(900_000)) + b"}")),
        ("header_of_41_MB", "limit", "size of the header", lambda: raw(b"{" + b" " * 41_000_000)),
        ("number_of_a_million_digits", "corrupt", "",
         lambda: raw(b'{"w":{"dtype":"F32","shape":[' + b"9" * 1_000_000
                     + b'],"data_offsets":[0,16]}}')),
    ):
        yield st_row("bomb_" + name, grow, code, words, JSON, content)
    climb = "written under its name, the tensor leaves the folder"
    for name, tensor in (
        ("parent", "../../escape"), ("absolute", "/tmp/isoshard-escape"), ("empty", ""),
        ("control", "a\x1b[2J"), ("nul", "a\0b"), ("dots", ".."), ("slashes", "a//b"),
        ("component_of_256_bytes", "x" * 256), ("5000_bytes", "a/" * 2500 + "a"),
    ):
        yield st_row("name_" + name, climb, "corrupt", "", NAME,
                     h.safetensors({tensor: ENTRY}, DATA))


def beside():
    index = "the index names files and tensors as it likes"
    shards = {f"model-0000{n}-of-00002.safetensors": h.safetensors({name: ENTRY}, DATA)
              for n, name in ((1, "a"), (2, "b"))}
    first, second = shards

    def indexed(text):
        return files(lambda: {**shards, "model.safetensors.index.json":
                              text() if callable(text) else text})

    # An index beside sound files: convert reads the files, verify tells what does not fit.
    for name, text in (
        ("no_object", "[]"), ("empty", ""), ("no_json", "{'a': 1}"), ("no_map", "{}"),
        ("map_is_a_list", '{"weight_map": []}'),
        ("nested", lambda: "[" * 1_000_000),
        ("nested_4_MB", lambda: '{"weight_map":' + '{"a":' * 800_000),
        ("deep_5_MB", lambda: "[" * 5_000_000),
        ("wide_15_MB", lambda: '{"weight_map":{},"a":[' + "[]," * 5_000_000 + "[]]}"),
    ):
        yield row("safetensors.index_" + name, index, "", "", "the index is what the files hold",
                  indexed(text), verdict="CORRUPT")
    for name, mapped, verdict in (
        ("climbs", {"a": "../../etc/passwd", "b": second}, "SUSPECT"),
        ("absolute", {"a": "/dev/zero", "b": second}, "SUSPECT"),
        ("swapped", {"a": second, "b": first}, "SUSPECT"),
        ("names_a_tensor_too_many", {"a": first, "b": second, "c": second}, "INCOMPLETE"),
        ("lacks_a_tensor", {"a": first}, "SUSPECT"),
        ("maps_to_numbers", {"a": 1, "b": 2}, "SUSPECT"),
    ):
        yield row("safetensors.index_" + name, index, "", "", "the index is what the files hold",
                  indexed(json.dumps({"weight_map": mapped})), verdict=verdict)
    twice = {first: h.safetensors({"w": ENTRY}, DATA), second: h.safetensors({"w": ENTRY}, DATA)}
    yield row("safetensors.tensor_in_two_files", "the last file wins in silence", "mismatch",
              "two files", ONCE, files(twice))
    yield row("safetensors.shard_missing", "a model that is half there", "incomplete",
              "missing", "all shards are there", files({first: shards[first]}))
    yield row("safetensors.shard_of_100_000", "a name that asks for 100,000 files", "incomplete",
              "missing", "all shards are there",
              files({"model-00001-of-100000.safetensors": SOUND}))
    yield row("safetensors.shard_of_2_to_64", "a name that asks for more", "incomplete", "missing",
              "all shards are there",
              files({"model-00001-of-99999999999999999999.safetensors": SOUND}))
    yield row("safetensors.3000_shards_of_100_000", "quadratic work for names", "incomplete",
              "missing", "all shards are there",
              files(lambda: {f"model-{i:05}-of-100000.safetensors": b"" for i in range(3000)}))
    paper = "our own paper beside the weights, made by somebody else"
    for name, text in (
        ("nested_5_MB", lambda: "[" * 5_000_000),
        ("wide_15_MB", lambda: '{"buffers":[' + "[]," * 5_000_000 + "[]]}"),
    ):
        # It says no more than which tensors are buffers, so that inspect tells and leaves it; it
        # is a sign of isoshard's own folder, which has a manifest.
        yield row("safetensors.certificate_" + name, paper, "incomplete", "MANIFEST.json",
                  "memory and time are bounded", files(
                      lambda text=text: {"model.safetensors": SOUND, "certificate.json": text()}),
                  inspect=False)
    yield row("safetensors.certificate_of_65_MB", paper, "limit", "must be small",
              "memory and time are bounded", files(
                  lambda: {"model.safetensors": SOUND, "certificate.json": " " * (65 << 20)}))
