"""Tensors and archives of torch that lie about what lies where."""

from row import file, h, row

DATA = h.floats(4)
GOOD = h.weights([("w", h.tensor())])
HUGE = 0x4000000000000001
VIEW = "every element of a view lies in its storage, by checked arithmetic"
EXACT = "a storage's record has exactly numel × item size bytes"
FORMS = "dense tensors of known dtypes, by their known arguments"
RECORDS = "torch's own records, each once and with its known content"
WRAP = "numel × item size wraps around (pytorch PR 181310)"
REACH = "sizes, strides or an offset reach outside the storage (pytorch 109791)"
SHORT = "a record shorter or longer than the storage it holds (CVE-2026-24747)"
STRANGE = "a form that a reader without it would take for another"


def rebuilt(*arguments, module="torch._utils", function="_rebuild_tensor_v2"):
    return h.call(module, function, *arguments)


def sizes(*numbers):
    return h.sequence(*map(h.integer, numbers))


def untyped(dtype, numel=16):
    """_rebuild_tensor_v3 over an UntypedStorage."""
    return rebuilt(
        h.storage(kind="UntypedStorage", module="torch.storage", numel=numel), h.integer(0),
        sizes(4), sizes(1), b"\x89", h.call("collections", "OrderedDict"), dtype,
        function="_rebuild_tensor_v3",
    )


def persistent(*parts):
    return rebuilt(h.sequence(*parts) + b"Q", h.integer(0), sizes(4), sizes(1), b"\x89",
                   h.call("collections", "OrderedDict"))


def tensor_row(name, threat, code, words, rule, value, storages=(DATA,), **how):
    content = h.torch_file(h.weights([("w", value)]), list(storages))
    return row("torch." + name, threat, code, words, rule, file(content), **how)


def archive_row(name, threat, code, words, rule, content, **how):
    return row("torch." + name, threat, code, words, rule, file(content), **how)


def rows():
    yield from views()
    yield from forms()
    yield from identifiers()
    yield from archives()


def views():
    view = h.tensor
    for name, threat, value, code, words in (
        ("numel_wraps", WRAP, view((HUGE,), (1,), numel=HUGE), "corrupt", "wrong size"),
        ("numel_wraps_under_a_small_view", WRAP, view(numel=HUGE), "corrupt", "wrong size"),
        ("numel_negative", WRAP, view(numel=-1), "corrupt", "wrong size"),
        ("numel_2_to_63", WRAP, view(numel=2**63 - 1), "corrupt", "wrong size"),
        ("numel_2_to_80", WRAP, view(numel=2**80), "corrupt", "persistent id"),
        ("size_negative", REACH, view((-4,), (1,)), "corrupt", "negative or too large"),
        ("sizes_negative_twice", REACH, view((-2, -2), (2, 1)), "corrupt", "negative or too"),
        ("size_2_to_63", REACH, view((2**63 - 1,), (1,)), "corrupt", "negative or too large"),
        ("size_product_2_to_64", WRAP, view((2**32, 2**32), (0, 0)), "corrupt", "too large"),
        ("size_product_wraps_to_4", WRAP, view((2**62 + 1, 4), (0, 0)), "corrupt", "too large"),
        ("size_product_wraps_beside_zero", WRAP, view((2**33, 2**33, 0), (1, 1, 1)), "corrupt",
         "too large"),
        ("size_2_to_80", WRAP, view((2**80,), (1,)), "corrupt", "not an integer"),
        ("stride_negative", REACH, view((4,), (-1,), offset=3), "corrupt", "strides overflow"),
        ("stride_2_to_62", REACH, view((4,), (2**62,)), "corrupt", "strides overflow"),
        ("stride_wraps_to_inside", REACH, view((3,), (2**63 - 1,)), "corrupt", "strides overflow"),
        ("strides_wrap_in_their_sum", REACH, view((2, 2), (2**62, 2**62)), "corrupt",
         "strides overflow"),
        ("stride_outside", REACH, view((4,), (2,)), "corrupt", "beyond its storage"),
        ("offset_negative", REACH, view(offset=-1), "corrupt", "do not fit"),
        ("offset_2_to_63", REACH, view(offset=2**63 - 1), "corrupt", "strides overflow"),
        ("offset_outside", REACH, view(offset=1), "corrupt", "beyond its storage"),
        ("offset_outside_for_one_element", REACH, view((1,), (1,), offset=4), "corrupt",
         "beyond its storage"),
        ("size_outside", REACH, view((5,), (1,)), "limit", "more elements than its storage"),
        ("expanded_to_4_TB", "4 bytes that claim terabytes", view((2**40,), (0,)), "limit",
         "more elements than its storage"),
        ("expanded_in_two_axes", "4 bytes that claim terabytes", view((2**20, 2**20), (0, 0)),
         "limit", "more elements than its storage"),
        ("65_axes", STRANGE, view((1,) * 65, (1,) * 65), "corrupt", "do not fit"),
        ("100_000_axes", STRANGE, view((1,) * 100_000, (1,) * 100_000), "corrupt", "do not fit"),
        ("more_strides_than_sizes", STRANGE, view((4,), (1, 1)), "corrupt", "do not fit"),
        ("fewer_strides_than_sizes", STRANGE, view((2, 2), (1,)), "corrupt", "do not fit"),
    ):
        yield tensor_row(name, threat, code, words, VIEW, value)


def forms():
    name = h.name
    for title, value, code, words in (
        ("no_arguments", rebuilt(), "corrupt", "wrong types"),
        ("no_storage", rebuilt(b"N", h.integer(0), b")", b")"), "corrupt", "wrong types"),
        ("storage_is_a_number", rebuilt(b"K\0", h.integer(0), b")", b")"), "corrupt", "types"),
        ("offset_is_a_text", rebuilt(h.storage(), h.text("0"), b")", b")"), "corrupt", "types"),
        ("offset_is_a_float", rebuilt(h.storage(), b"G" + bytes(8), b")", b")"), "corrupt",
         "types"),
        ("sizes_are_a_text", rebuilt(h.storage(), h.integer(0), h.text("4"), h.text("1")),
         "corrupt", "size is not a tuple"),
        ("sizes_are_a_list", rebuilt(h.storage(), h.integer(0), b"]K\4a", b"]K\1a"), "corrupt",
         "size is not a tuple"),
        ("size_is_true", rebuilt(h.storage(), h.integer(0), b"\x88\x85", b"K\1\x85"), "corrupt",
         "not an integer"),
        ("size_of_a_size", rebuilt(h.storage(), h.integer(0), h.call("torch", "Size", b")", b")"),
                                   sizes(1)), "corrupt", "size is not a tuple"),
        ("dtype_missing", untyped(b"N"), "corrupt", "dtype is unknown"),
        ("dtype_unknown", untyped(name("torch", "float3")), "corrupt", "dtype is unknown"),
        ("dtype_is_a_function", untyped(name("torch", "load")), "hostile", "torch load"),
        ("dtype_of_another_module", untyped(name("evil", "float32")), "corrupt", "dtype"),
        ("size_of_another_class", rebuilt(h.storage(), h.integer(0), h.call("evil", "Size",
                                          sizes(4)), sizes(1)), "corrupt", "size is not a tuple"),
        ("dtype_does_not_divide", untyped(name("torch", "float64"), 15), "corrupt", "wrong size"),
        ("dtype_of_half_a_byte", untyped(name("torch", "float4_e2m1fn_x2")), "corrupt", "dtype"),
        ("dtype_quantised", untyped(name("torch", "qint8")), "corrupt", "dtype is unknown"),
        ("storage_class_unknown", h.tensor(kind="EvilStorage"), "corrupt", "unknown class"),
        ("storage_class_quantised", h.tensor(kind="QInt8Storage"), "corrupt", "unknown class"),
        ("storage_class_of_another_module", h.tensor(module="evil"), "corrupt", "unknown class"),
        ("sparse", rebuilt(name("torch", "sparse_coo"), b")",
                           function="_rebuild_sparse_tensor"), "unsupported", "sparse"),
        ("sparse_csr", rebuilt(name("torch", "sparse_csr"), b")",
                               function="_rebuild_sparse_csr_tensor"), "unsupported", "sparse"),
        ("quantised", rebuilt(h.storage(kind="ByteStorage", numel=16), h.integer(0), sizes(4),
                              sizes(2**40), b")", function="_rebuild_qtensor"), "unsupported",
         "quantised"),
        ("nested", rebuilt(b")", function="_rebuild_nested_tensor"), "unsupported", "form"),
        ("meta", rebuilt(b")", function="_rebuild_meta_tensor_no_storage"), "unsupported", "form"),
        ("wrapper_subclass", rebuilt(b")", function="_rebuild_wrapper_subclass"), "unsupported",
         "form"),
        ("device_tensor_from_numpy", rebuilt(b")", function="_rebuild_device_tensor_from_numpy"),
         "unsupported", "form"),
        ("parameter_of_nothing", rebuilt(function="_rebuild_parameter"), "corrupt", "no tensor"),
        ("parameter_of_none", rebuilt(b"N", function="_rebuild_parameter"), "corrupt", ""),
        ("parameter_of_parameters", parameters(900), "limit", "nesting"),
        ("from_type_of_nothing", h.call("torch._tensor", "_rebuild_from_type_v2"), "corrupt",
         "unknown form"),
        ("from_type_of_a_function", h.call(
            "torch._tensor", "_rebuild_from_type_v2", name("os", "system"),
            name("torch", "Tensor"), sequence_of(h.text("touch canary")), b"}"), "hostile",
         "os system"),
    ):
        yield tensor_row(title, STRANGE, code, words, FORMS, value,
                         [DATA] if b"Storage" in value else [])


def sequence_of(*items):
    return h.sequence(*items)


def parameters(depth):
    value = b"N"
    for _ in range(depth):
        value = h.name("torch._utils", "_rebuild_parameter") + value + b"\x85" + h.REDUCE
    return value


def identifiers():
    lie = "the loader's callback gets what the file says"
    kind = h.name("torch", "FloatStorage")
    for name, parts, words in (
        ("another_word", (h.text("module"), kind, h.text("0"), h.text("cpu"), b"K\4"), "persist"),
        ("four_parts", (h.text("storage"), kind, h.text("0"), h.text("cpu")), "persistent id"),
        ("six_parts", (h.text("storage"), kind, h.text("0"), h.text("cpu"), b"K\4", b"N"), "pers"),
        ("class_is_a_text", (h.text("storage"), h.text("FloatStorage"), h.text("0"),
                             h.text("cpu"), b"K\4"), "persistent id"),
        ("key_is_a_number", (h.text("storage"), kind, b"K\0", h.text("cpu"), b"K\4"), "persist"),
        ("key_climbs", (h.text("storage"), kind, h.text("../../0"), h.text("cpu"), b"K\4"), "pers"),
        ("key_is_negative", (h.text("storage"), kind, h.text("-1"), h.text("cpu"), b"K\4"), "pers"),
        ("key_of_ten_digits", (h.text("storage"), kind, h.text("0000000000"), h.text("cpu"),
                               b"K\4"), "persistent id"),
        ("numel_is_a_float", (h.text("storage"), kind, h.text("0"), h.text("cpu"),
                              b"G" + bytes(8)), "persistent id"),
        ("numel_is_true", (h.text("storage"), kind, h.text("0"), h.text("cpu"), b"\x88"), "pers"),
        ("record_is_not_there", (h.text("storage"), kind, h.text("7"), h.text("cpu"), b"K\4"),
         "missing"),
    ):
        yield tensor_row("id_" + name, lie, "corrupt", words, FORMS, persistent(*parts))
    yield tensor_row("id_is_a_text", lie, "corrupt", "persistent id", FORMS,
                     rebuilt(h.text("0") + b"Q", h.integer(0), sizes(4), sizes(1)))
    yield tensor_row("id_of_an_id", lie, "corrupt", "persistent id", FORMS, h.storage() + b"Q")
    two = h.weights([("a", h.tensor()), ("b", h.tensor(kind="IntStorage"))])
    yield archive_row("storage_of_two_classes", lie, "corrupt", "two ways", FORMS,
                      h.torch_file(two, [DATA]))
    two = h.weights([("a", h.tensor()), ("b", h.tensor((2,), (1,), numel=2))])
    yield archive_row("storage_of_two_sizes", lie, "corrupt", "two ways", FORMS,
                      h.torch_file(two, [DATA]))


def archives():
    for name, data, words in (
        ("record_half_as_long", [DATA[:8]], "wrong size"),
        ("record_64_bytes_longer", [DATA + bytes(64)], "wrong size"),
        ("record_one_byte_shorter", [DATA[:-1]], "wrong size"),
        ("record_empty", [b""], "wrong size"),
        ("record_missing", [], "missing"),
        ("record_unused", [DATA, DATA], "no tensor uses"),
    ):
        yield archive_row(name, SHORT, "corrupt", words, EXACT, h.torch_file(GOOD, data))
    swap = "torch swaps or ignores in silence what this record says"
    for name, options, words in (
        ("byteorder_big", {"byteorder": b"big"}, "byte order"),
        ("byteorder_empty", {"byteorder": b""}, "byte order"),
        ("byteorder_unknown", {"byteorder": b"middle"}, "byte order"),
        ("byteorder_in_capitals", {"byteorder": b"LITTLE"}, "byte order"),
        ("version_99", {"version": b"99\n"}, "version"),
        ("version_empty", {"version": b""}, "version"),
        ("version_negative", {"version": b"-3\n"}, "version"),
        ("version_of_5_kB", {"version": b"3\n" + bytes(5000)}, "must be small"),
    ):
        yield archive_row(name, swap, "corrupt", words, RECORDS,
                          h.torch_file(GOOD, [DATA], **options))
    base = h.records_of(GOOD, [DATA])
    yield archive_row("no_pickle", "an archive of another kind", "incomplete", "data.pkl", RECORDS,
                      h.torch_zip(base[1:]))
    yield archive_row("script_module", "TorchScript: code in the archive", "corrupt",
                      "torch does not write", RECORDS,
                      h.torch_zip(base + [("archive/code/__torch__.py", b"import os")]))
    yield archive_row("export_program", "torch.export: pickles of another kind", "corrupt",
                      "torch does not write", RECORDS,
                      h.torch_zip(base + [("archive/archive_format", b"pt2")]))
    legacy = b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    yield archive_row("legacy_stream", "the old form is five pickles in a row", "unsupported",
                      "legacy torch stream", "one format a file",
                      legacy + h.program(b"M\xe9\3") + h.evil_pickle("touch canary"))
    yield archive_row("legacy_tar", "weights_only went around by the tar form (CVE-2025-32434)",
                      "incomplete", "does not end as a zip", "one format a file", legacy_tar)
    for name, content in (
        ("text", b"hello\n"), ("page", b"<html>" + b"x" * 300), ("zeros", bytes(8192)),
        ("gzip", b"\x1f\x8b\x08" + bytes(50)), ("pointer", b"version https://git-lfs.github.com/"
                                                           b"spec/v1\noid sha256:00\nsize 1\n"),
    ):
        yield archive_row("content_" + name, "the suffix says one thing and the bytes another "
                          "(CVE-2025-1889, CVE-2025-10155)", "incomplete", "", "one format a file",
                          content)
    yield row("torch.pickle_under_a_zip_name", "CVE-2025-1889: a scanner goes by the suffix",
              "unsupported", "legacy torch stream", "one format a file",
              file(h.evil_pickle("touch canary"), "weights.pt"))
    yield row("torch.archive_as_safetensors", "CVE-2025-10155: a scanner goes by the suffix",
              "corrupt", "header", "one format a file",
              file(h.torch_file(h.evil_pickle("touch canary")), "model.safetensors"))


def legacy_tar():
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("pickle", "storages", "tensors", "sys_info"):
            data = h.evil_pickle("touch canary")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()
