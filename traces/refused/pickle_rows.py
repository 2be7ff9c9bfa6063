"""Pickles that would run code, exhaust memory or confuse: read as data, and refused."""

import pickle
import struct

from row import edited, file, h, row

COMMAND = h.text("touch canary")
RUN = h.sequence(COMMAND) + h.REDUCE
NEVER = "no global is called, imported or looked up; what needs it is refused"
OPCODES = "only the opcodes that torch writes under protocol 2"
TYPES = "each opcode finds the types it works on"
BUDGET = "memory and time are bounded by the file's size"
WHOLE = "one PROTO, one value, one STOP at the end"

# Globals that run a program or reach the system when an ordinary unpickler calls them.
CALLED = (
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("os", "execv"),
    ("builtins", "eval"), ("builtins", "exec"), ("builtins", "compile"), ("builtins", "getattr"),
    ("builtins", "__import__"), ("builtins", "open"), ("builtins", "globals"),
    ("__builtin__", "eval"), ("__builtin__", "execfile"), ("__builtin__", "apply"),
    ("subprocess", "Popen"), ("subprocess", "check_output"), ("commands", "getoutput"),
    ("runpy", "run_path"), ("runpy", "_run_code"), ("importlib", "import_module"),
    ("importlib.machinery", "SourceFileLoader"), ("ctypes", "CDLL"), ("pty", "spawn"),
    ("shutil", "rmtree"), ("socket", "create_connection"), ("webbrowser", "open"),
    ("operator", "attrgetter"), ("operator", "methodcaller"), ("functools", "reduce"),
    ("types", "CodeType"), ("types", "FunctionType"), ("marshal", "loads"), ("code", "interact"),
    ("timeit", "timeit"), ("bdb", "Bdb.run"), ("pdb", "run"), ("sys", "exit"),
    ("multiprocessing.util", "spawnv_passfds"), ("torch.hub", "load"),
)
# The same by roads that scanners have missed: (module, attribute, evidence).
MISSED = (
    ("pip", "main", "CVE-2025-1716: a package installer as a gadget"),
    ("pip._internal", "main", "CVE-2025-1716, by its submodule"),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start", "CVE-2025-10157: a submodule"),
    ("torch", "load", "CVE-2025-32434: a safe loader that loads again"),
    ("torch.serialization", "load", "CVE-2025-32434: a safe loader that loads again"),
    ("torch.storage", "_load_from_bytes", "a loader in a loader: torch.load of the bytes"),
    ("torch.jit", "load", "a loader in a loader"),
    ("torch.jit._serialization", "load", "a loader in a loader"),
    ("torch.package", "PackageImporter", "code from an archive"),
    ("torch.ops", "load_library", "a shared library"),
    ("torch.classes", "load_library", "a shared library"),
    ("torch.utils.cpp_extension", "load_inline", "a compiler"),
    ("torch.utils.collect_env", "run", "a command line"),
    ("torch._inductor.codecache", "compile_file", "a compiler"),
    ("torch._dynamo.guards", "GuardBuilder.get", "eval in a method"),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression", "eval"),
    ("torch.jit.unsupported_tensor_ops", "execWrapper", "exec in a helper"),
    ("torch.utils.data.datapipes.utils.decoder", "basichandlers", "a loader in a loader"),
    ("torch.distributed.rpc.internal", "_run_function", "a loader in a loader"),
    ("numpy", "load", "a loader in a loader"),
    ("numpy.testing._private.utils", "runstring", "exec in a helper"),
    ("numpy.f2py.crackfortran", "getlincoef", "eval in a helper"),
    ("numpy.distutils.exec_command", "exec_command", "a command line"),
    ("pickle", "loads", "a loader in a loader"),
    ("_pickle", "loads", "a loader in a loader"),
    ("dill", "loads", "a loader in a loader"),
    ("cloudpickle", "loads", "a loader in a loader"),
    ("joblib", "load", "a loader in a loader"),
    ("shelve", "open", "a loader in a loader"),
    ("cProfile", "run", "exec by a profiler (CVE-2026-56315 names such modules)"),
    ("profile", "run", "exec by a profiler (CVE-2026-56315 names such modules)"),
    ("trace", "Trace.run", "exec by a tracer (CVE-2026-56315 names such modules)"),
    ("doctest", "debug_script", "exec by a debugger"),
    ("ensurepip", "_run_pip", "a package installer"),
    ("venv", "create", "a package installer"),
    ("idlelib.pyshell", "ModifiedInterpreter.runcode", "an interpreter"),
    ("lib2to3.pgen2.grammar", "Grammar.loads", "a loader in a loader"),
    ("distutils.spawn", "spawn", "a command line"),
    ("_posixsubprocess", "fork_exec", "a command line"),
    ("test.support.script_helper", "assert_python_ok", "a command line"),
    ("uuid", "_get_command_stdout", "a command line"),
    ("imaplib", "IMAP4_stream", "a command line"),
    ("pydoc", "pipepager", "a command line"),
    ("_osx_support", "_read_output", "a command line"),
    ("_aix_support", "_read_cmd_output", "a command line"),
    ("pkgutil", "resolve_name", "any name of any module"),
    ("zipimport", "zipimporter", "code from an archive"),
    ("inspect", "getattr_static", "any attribute"),
    ("urllib.request", "urlopen", "the network"),
    ("http.client", "HTTPSConnection", "the network"),
    ("ftplib", "FTP", "the network"),
    ("smtplib", "SMTP", "the network"),
    ("telnetlib", "Telnet", "the network"),
    ("requests", "get", "the network"),
    ("aiohttp", "ClientSession", "the network"),
    ("ssl", "get_server_certificate", "the network"),
    ("io", "open", "any file"),
    ("_io", "open", "any file"),
    ("codecs", "open", "any file"),
    ("pathlib", "Path.write_text", "any file"),
    ("tempfile", "mktemp", "any file"),
    ("logging.config", "listen", "the network"),
    ("signal", "raise_signal", "the process"),
    ("_signal", "raise_signal", "the process"),
    ("threading", "Thread", "the process"),
    ("_thread", "start_new_thread", "the process"),
    ("atexit", "register", "the process"),
    ("builtins", "delattr", "any attribute"),
    ("builtins", "setattr", "any attribute"),
    ("builtins", "__build_class__", "any class"),
    ("cffi", "FFI.dlopen", "a shared library"),
    ("sqlite3", "connect", "any file"),
    ("winreg", "SetValueEx", "the system"),
    ("platform", "popen", "a command line"),
    ("popen2", "popen2", "a command line"),
)


def stated(data_pkl, storages=()):
    return file(h.torch_file(data_pkl, storages))


def value(opcodes):
    """A state dict with one value."""
    return stated(h.weights([("w", opcodes)]))


def client(opcodes):
    """A recorded checkpoint whose client state holds the value."""
    return edited(lambda folder: folder.insert("hook", opcodes, "model_states"))


def pickle_row(name, threat, code, words, rule, make, **how):
    return row("pickle." + name, threat, code, words, rule, make, **how)


def rows():
    yield from globals_called()
    yield from roads()
    yield from protocols()
    yield from types()
    yield from bombs()


def globals_called():
    for module, attribute in CALLED:
        yield pickle_row(f"calls_{module}.{attribute}", "code execution by REDUCE", "hostile",
                         f"{module} {attribute}", NEVER,
                         value(h.name(module, attribute) + RUN))
    for module, attribute, evidence in MISSED:
        yield pickle_row(f"client_calls_{module}.{attribute}", evidence, "hostile",
                         f"{module} {attribute}", NEVER,
                         client(h.name(module, attribute) + RUN), to="universal")


def roads():
    code = "code execution without REDUCE on a plain name"
    system = h.name("os", "system")
    for name, body, words in (
        ("newobj", system + h.sequence(COMMAND) + b"\x81", "os system"),
        ("build_on_a_global", system + h.EMPTY_DICT + h.BUILD, "BUILD on a plain value"),
        ("global_as_a_value", system, "os system"),
        ("global_as_an_argument", h.call("collections", "OrderedDict", system), "os system"),
        ("global_as_a_key", h.mapping([(system, b"N")]), "os system"),
        ("global_as_a_state", h.call("a", "B") + system + h.BUILD, "os system"),
        ("call_of_a_call", h.call("builtins", "getattr", system, h.text("x")) + RUN, "called"),
        ("call_of_a_text", COMMAND + RUN, "called"),
        ("call_of_a_number", b"K\1" + RUN, "called"),
        ("call_of_none", b"N" + RUN, "called"),
        ("call_of_a_tensor", h.tensor() + RUN, "called"),
        ("storage_class_is_a_function", h.sequence(h.text("storage"), system, h.text("0"),
                                                   h.text("cpu"), b"K\4") + b"Q", "os system"),
    ):
        told = "corrupt" if "BUILD" in words else "hostile"
        yield pickle_row(name, code, told, words, NEVER, stated(h.weights([("w", body)]),))
    for name, body in (
        ("global_with_a_path", h.name("../../os", "system") + RUN),
        ("global_without_a_module", h.name("", "system") + RUN),
        ("global_with_a_control_character", h.name("o\x1bs", "system") + RUN),
        ("global_of_5000_bytes", h.name("a" * 5000, "b") + RUN),
        ("global_without_an_end", b"cos"),
    ):
        told = "corrupt" if "5000" in name or "end" in name else "hostile"
        yield pickle_row(name, "a name that is none", told, "global", NEVER, value(body))
    for name, body in (
        ("dotted_attribute", h.name("torch", "os.system") + RUN),
        ("unknown_class", h.name("evil", "Evil") + RUN),
        ("homoglyph_module", b"c" + "\u043es\nsystem\n".encode() + RUN),
    ):
        yield pickle_row(name, code, "corrupt", "", NEVER, value(body))
    yield pickle_row("canary_in_a_second_pickle", "what follows STOP", "corrupt", "follow the STOP",
                     WHOLE, stated(h.weights([]) + h.evil_pickle("touch canary")))
    for only in ("mp_rank_00_model_states", "pp_rank_0_mp", "pp_rank_1_mp"):
        make = edited(lambda folder, only=only: folder.insert("hook", system + RUN, only))
        yield pickle_row("client_state_of_" + only, code, "hostile", "os system", NEVER, make,
                         to="universal")


def protocols():
    other = "an opcode that this reader does not need"
    command = h.text("os")
    opcodes = (
        ("inst", h.MARK + COMMAND + b"ios\nsystem\n", "0x69"),
        ("obj", h.MARK + h.name("os", "system") + COMMAND + b"o", "0x6f"),
        ("newobj_ex", h.name("os", "system") + b")}\x92", "0x92"),
        ("stack_global", command + h.text("system") + b"\x93" + RUN, "0x93"),
        ("stack_global_of_built_texts", b"\x8c\2os\x94\x8c\6system\x94\x93" + RUN, "0x8c"),
        ("ext1", b"\x82\1", "0x82"),
        ("ext2", b"\x83\1\0", "0x83"),
        ("ext4", b"\x84\1\0\0\0", "0x84"),
        ("persid", b"Pos.system\n", "0x50"),
        ("pop", b"N0", "0x30"),
        ("pop_mark", b"((1", "0x31"),
        ("dup", b"N2", "0x32"),
        ("text_integer", b"I1\n", "0x49"),
        ("text_integer_true", b"I01\n", "0x49"),
        ("text_long", b"L1L\n", "0x4c"),
        ("text_float", b"F1.0\n", "0x46"),
        ("text_string", b"S'x'\n", "0x53"),
        ("text_unicode", b"Vx\n", "0x56"),
        ("text_put", b"}p0\n", "0x70"),
        ("text_get", b"}q\0g0\n", "0x67"),
        ("text_dict", b"(d", "0x64"),
        ("text_list", b"(l", "0x6c"),
        ("binstring", b"T\1\0\0\0x", "0x54"),
        ("short_binstring", b"U\1x", "0x55"),
        ("binbytes", b"B\1\0\0\0x", "0x42"),
        ("short_binbytes", b"C\1x", "0x43"),
        ("binbytes8_of_2_to_63", b"\x8e" + struct.pack("<Q", 2**63), "0x8e"),
        ("binunicode8_of_2_to_63", b"\x8d" + struct.pack("<Q", 2**63), "0x8d"),
        ("bytearray8_of_2_to_63", b"\x96" + struct.pack("<Q", 2**63), "0x96"),
        ("short_binunicode", b"\x8c\1x", "0x8c"),
        ("empty_set", b"\x8f", "0x8f"),
        ("additems", b"\x8f(K\1\x90", "0x8f"),
        ("frozenset", b"(\x91", "0x91"),
        ("memoize", b"}\x94", "0x94"),
        ("frame_of_2_to_63", b"\x95" + struct.pack("<Q", 2**63), "0x95"),
        ("next_buffer", b"\x97", "0x97"),
        ("readonly_buffer", b"}\x98", "0x98"),
        ("unknown_opcode", b"\xff", "0xff"),
        ("zero_opcode", b"\0", "0x00"),
    )
    for name, body, words in opcodes:
        yield pickle_row("opcode_" + name, other, "corrupt", words, OPCODES,
                         stated(h.program(body)))
    for number in (0, 1, 3, 4, 5):
        told = "hostile" if number == 1 else "corrupt"  # 1 has no opcode that torch does not write
        words = {0: "opcode", 1: "posix system"}.get(number, "protocol")
        yield pickle_row(f"protocol_{number}", "code execution under another protocol", told,
                         words, OPCODES,
                         stated(h.evil_pickle("touch canary", number)))
        if number > 1:
            sound = pickle.dumps({"w": 1}, number)
            yield pickle_row(f"protocol_{number}_of_plain_values", other, "corrupt", "protocol",
                             OPCODES, stated(sound))
    yield pickle_row("protocol_255", other, "corrupt", "protocol is not 2", OPCODES,
                     stated(h.program(b"}", 255)))
    yield pickle_row("protocol_twice", other, "corrupt", "protocol is not 2", WHOLE,
                     stated(b"\x80\2\x80\2}."))
    yield pickle_row("protocol_late", other, "corrupt", "protocol is not 2", WHOLE,
                     stated(b"}\x80\2."))
    yield pickle_row("protocol_missing", other, "corrupt", "protocol", WHOLE,
                     stated(h.weights([("w", h.tensor())])[2:], [h.floats(4)]))


def types():
    confusion = "SETITEM and its kin on the wrong type corrupt memory (CVE-2026-24747)"
    text = h.text
    for name, body, words in (
        ("setitem_on_a_list", b"]NNs", "SETITEM on a"),
        ("setitem_on_a_text", text("x") + b"NNs", "SETITEM on a"),
        ("setitem_on_a_tuple", b")NNs", "SETITEM on a"),
        ("setitem_on_a_number", b"K\1NNs", "SETITEM on a"),
        ("setitem_on_none", b"NNNs", "SETITEM on a"),
        ("setitem_on_a_global", h.name("a", "b") + b"NNs", "SETITEM on a"),
        ("setitem_on_a_storage", h.storage() + b"NNs", "SETITEM on a"),
        ("setitems_on_a_list", b"](NNu", "SETITEM on a"),
        ("setitems_odd", b"}(Nu", "key and no value"),
        ("append_on_a_dictionary", b"}Na", "APPEND on a"),
        ("append_on_a_tuple", b")Na", "APPEND on a"),
        ("appends_on_a_text", text("x") + b"(Ne", "APPEND on a"),
        ("appends_on_a_storage", h.storage() + b"(Ne", "APPEND on a"),
        ("build_on_a_dictionary", b"}}b", "BUILD on a plain value"),
        ("build_on_a_storage", h.storage() + b"}b", "BUILD on a plain value"),
        ("build_twice", h.call("a", "b") + b"}b}b", "BUILD twice"),
        ("reduce_without_a_tuple", h.name("a", "b") + b"]R", "not a tuple"),
        ("newobj_without_a_tuple", h.name("a", "b") + b"N\x81", "not a tuple"),
        ("stack_underflow", b"\x87", "stack is empty"),
        ("stack_underflow_over_a_mark", b"N(\x85", "stack is empty"),
        ("no_mark", b"}u", "no mark"),
        ("mark_left", b"}(", "one value at STOP"),
        ("two_values", b"}}", "one value at STOP"),
        ("memo_read_unwritten", b"h\7", "never written"),
        ("memo_read_2_to_32", b"j\xff\xff\xff\xff", "never written"),
        ("memo_slot_skipped", b"}q\1", "numbered one by one"),
        ("memo_slot_2_to_31", b"}r\0\0\0\x80", "numbered one by one"),
        ("memo_slot_2_to_32", b"}r\xff\xff\xff\xff", "numbered one by one"),
        ("memo_slot_twice", b"}q\0q\0", "numbered one by one"),
        ("memo_of_nothing", b"q\0", "stack is empty"),
        ("contains_itself", b"]q\0h\0a", "contains itself"),
        ("dictionary_contains_itself", b"}q\0" + text("w") + b"h\0s", "contains itself"),
        ("object_contains_itself", h.call("a", "b") + b"q\0h\0b", "contains itself"),
        ("unhashable_key", h.mapping([(b"]", b"N")]), "not hashable"),
        ("duplicate_keys", h.mapping([(text("w"), b"N")] * 2), "twice"),
        ("duplicate_keys_1_and_true", h.mapping([(b"K\1", b"N"), (b"\x88", b"N")]), "twice"),
    ):
        yield pickle_row(name, confusion, "corrupt", words, TYPES, stated(h.program(body)))
    for name, data, words in (
        ("empty", b"", "middle of an opcode"),
        ("stop_missing", b"\x80\2}", "middle of an opcode"),
        ("stop_alone", b"\x80\2.", "one value at STOP"),
        ("bytes_behind_stop", h.program(b"}") + b"x", "follow the STOP"),
        ("stop_twice", h.program(b"}") + b".", "follow the STOP"),
        ("cut_in_a_text", b"\x80\2X\5\0\0\0ab", "middle of an opcode"),
        ("cut_in_a_number", b"\x80\2J\1", "middle of an opcode"),
    ):
        yield pickle_row(name, "a stream that another reader goes on in", "corrupt", words, WHOLE,
                         stated(data))
    for name, data in (
        ("root_is_a_list", h.program(b"]")),
        ("root_is_a_number", h.program(b"K\1")),
        ("root_is_a_tensor", h.program(h.storage())),
        ("value_is_a_number", h.weights([("w", b"K\1")])),
        ("value_is_a_list_of_tensors", h.weights([("w", b"](" + h.tensor() + b"e")])),
        ("key_is_a_number", h.program(h.mapping([(b"K\1", b"N")]))),
    ):
        storages = [h.floats(4)] if b"FloatStorage" in data else []
        yield pickle_row(name, "a file of another kind", "corrupt", "",
                         "a state dict maps texts to tensors", stated(data, storages))


def bombs():
    grow = "a few bytes that cost gigabytes or seconds (expansion, recursion, quadratic work)"
    text = h.text

    def deep(count, opener, closer):
        return lambda: h.torch_file(h.program(opener * count + closer * (count - 1)))

    def program(make):
        return lambda: h.torch_file(h.program(make()))

    for name, code, words, content in (
        ("2_to_60_leaves", "corrupt", "", value(h.dag(60))),
        ("2_to_900_leaves", "corrupt", "", value(h.dag(900))),
        ("2_to_60_leaves_as_root", "corrupt", "", stated(h.program(h.dag(60)))),
        ("lists_doubled", "corrupt", "", stated(h.program(doubled_lists(30)))),
        ("dictionaries_doubled", "corrupt", "", stated(h.program(doubled_dictionaries(30)))),
        ("200_000_lists", "limit", "nesting", file(deep(200_000, b"]", b"a"))),
        ("200_000_tuples", "limit", "nesting",
         file(program(lambda: b")" + b"\x85" * 200_000))),
        ("1_001_dictionaries", "limit", "nesting",
         stated(h.program((b"}" + text("k")) * 1001 + b"}" + b"s" * 1001))),
        ("200_000_marks", "limit", "marks", file(program(lambda: b"(" * 200_000))),
        ("text_of_4_GiB", "limit", "string bytes", stated(h.program(b"X\xff\xff\xff\xff"))),
        ("text_of_100_MB", "limit", "string bytes",
         stated(h.program(b"X" + struct.pack("<I", 100_000_000) + b"x"))),
        ("text_of_16_MiB_missing", "corrupt", "middle of an opcode",
         stated(h.program(b"X" + struct.pack("<I", 16 << 20) + b"x"))),
        ("long4_of_2_GiB", "limit", "integer bytes",
         stated(h.program(b"\x8b" + struct.pack("<i", 2**31 - 1)))),
        ("long4_negative", "limit", "integer bytes", stated(h.program(b"\x8b\xff\xff\xff\xff"))),
        ("long4_of_1025_bytes", "limit", "integer bytes",
         stated(h.program(b"\x8b" + struct.pack("<i", 1025) + b"\1" * 1025))),
        ("7_000_000_dictionaries", "limit", "memory",
         file(program(lambda: b"(" + b"}" * 7_000_000 + b"t"))),
        ("7_000_000_empty_tuples", "limit", "memory",
         file(program(lambda: b"(" + b")" * 7_000_000 + b"t"))),
        ("2_000_000_objects", "limit", "memory",
         file(program(lambda: h.name("a", "b") + b"q\0(" + b"h\0)R" * 2_000_000 + b"t\x86"))),
        ("7_000_000_memo_reads", "corrupt", "contains itself",
         file(program(lambda: b"]q\0(" + b"h\0" * 7_000_000 + b"e"))),
        ("quadratic_appends", "corrupt", "", file(program(quadratic_appends))),
        ("one_text_100_000_times_a_key", "corrupt", "twice",
         file(program(lambda: text("k") + b"q\0}(" + b"h\0N" * 100_000 + b"u\x86"))),
        ("100_000_names", "corrupt", "",
         file(program(lambda: b"}(" + b"".join(text(f"{i:06}") + b"N" for i in range(100_000))
                      + b"u"))),
    ):
        yield pickle_row("bomb_" + name, grow, code, words, BUDGET, content)
    real = b"G" + struct.pack(">d", 1.5)
    for name, make in (
        ("2_to_60_leaves", lambda memo: h.dag(60, memo=memo)),
        ("2_to_20_numbers", lambda memo: h.dag(20, leaf=real, memo=memo)),
        ("2_to_19_texts_of_60_kB", lambda memo: h.dag(19, leaf=text("x" * 60_000), memo=memo)),
        ("200_000_lists", lambda memo: b"]" * 200_000 + b"a" * 199_999),
        ("tensor_of_2_to_40", lambda memo: h.tensor((2**40,), (0,), key="1", numel=5)),
    ):
        yield pickle_row("client_bomb_" + name, grow, "limit", "", BUDGET,
                         edited(lambda folder, make=make: in_client_state(folder, make)),
                         to="universal", inspect=name == "200_000_lists")


def in_client_state(folder, make):
    for inside, (_, records) in folder.files.items():
        if "model_states" in inside:
            data = records["data.pkl"]
            records["data.pkl"] = data[:-2] + h.text("bomb") + make(h.free_memo(data)) + b"u."


def doubled_lists(depth):
    """Lists that hold the list before twice."""
    body = b"]q\0"
    for level in range(depth):
        body += b"](" + b"h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
        body += b"\x86"
    return body


def doubled_dictionaries(depth):
    body = b"}q\0"
    for level in range(depth):
        here = b"h" + bytes([level])
        body += b"}(" + h.text("a") + here + h.text("b") + here + b"uq" + bytes([level + 1])
        body += b"\x86"
    return body


def quadratic_appends():
    """A list that grows by itself read from the memo: 3,000 lists of up to 3,000 items."""
    body = b"(]q\0"
    for _ in range(3000):
        body += b"h\0Na"
    return body + b"t"
