"""DeepSpeed and universal folders: ranks that contradict, shards that are not there, names that
climb, and other things where files must be."""

import os
import shutil
import struct

from row import edited, h, place_special, recorded, row, tree

INVENTORY = "the files are those of every rank, once, of one step"
RANGES = "the slices of all ranks tile every parameter"
NAMES = "names are plain relative paths (docs/CONTRACTS.md §6)"
POINTER = "latest holds the name of one folder beside it"
KINDS = "a checkpoint is made of regular files and folders"
NUMBERS = "counts and sizes are in range and their products do not wrap"
OLD = "blocks.0.norm.weight"


def zero_row(name, threat, code, words, rule, make, **how):
    return row("folder." + name, threat, code, words, rule, make, to="universal", **how)


def universal_row(name, threat, code, words, rule, edit, **how):
    return row("folder.universal_" + name, threat, code, words, rule,
               tree(edit, inside="universal"), **how)


def optim(tag, rank):
    return next(tag.glob(f"*pp_rank_{rank}_mp*optim_states.pt"))


def rows():
    yield from worlds()
    yield from shards()
    yield from slices()
    yield from pointers()
    yield from kinds()
    yield from names()
    yield from universals()


def worlds():
    lie = "one file counts other ranks than the rest"

    def world(key, value, only=""):
        return edited(lambda folder: folder.set_after(key, value, only=only))

    for name, value, code, words in (
        ("0", b"K\0", "corrupt", ""), ("1", b"K\1", "mismatch", ""),
        ("3", b"K\3", "incomplete", ""),
        ("negative", b"J\0\0\0\x80", "corrupt", ""),
        ("10_million", h.integer(10_000_000), "incomplete", ""),
        ("2_to_31", h.integer(2**31 - 1), "corrupt", ""),
        ("2_to_32_and_2", h.integer(2**32 + 2), "corrupt", ""),
        ("2_to_63", h.integer(2**63 - 1), "corrupt", ""),
        ("2_to_80", h.integer(2**80), "corrupt", ""),
        ("none", b"N", "corrupt", ""), ("text", h.text("2"), "corrupt", ""),
    ):
        yield zero_row("dp_world_size_" + name, lie, code, words, INVENTORY,
                       world("dp_world_size", value))
    for name, key, value, code in (
        ("mp_world_size_2", "mp_world_size", b"K\2", "mismatch"),
        ("mp_world_size_0", "mp_world_size", b"K\0", "corrupt"),
        ("mp_world_size_negative", "mp_world_size", h.integer(-1), "corrupt"),
        ("mp_world_size_2_to_62", "mp_world_size", h.integer(2**62), "corrupt"),
        ("tp_degree_0", "tp_degree", b"K\0", "corrupt"),
        ("tp_degree_2_to_62", "tp_degree", h.integer(2**62), "corrupt"),
        ("pp_degree_2_to_33", "pp_degree", h.integer(2**33 + 1), "corrupt"),
        ("pp_degree_negative", "pp_degree", h.integer(-1), "corrupt"),
        ("stage_2_to_32_and_1", "zero_stage", b"", "corrupt"),
    ):
        if key == "zero_stage":
            make = edited(lambda folder: folder.replace(b"K\1\x85", h.integer(2**32 + 1) + b"\x85",
                                                        "optim"))
        else:
            make = world(key, value)
        yield zero_row(name, lie, code, "", INVENTORY, make)
    for name, value, code in (
        ("0", b"K\0", "corrupt"), ("negative", h.integer(-2), "corrupt"),
        ("3", b"K\3", "corrupt"), ("2_to_63", h.integer(2**63 - 1), "corrupt"),
        ("text", h.text("2"), "corrupt"),
    ):
        yield zero_row("partition_count_" + name, lie, code, "partition_count", INVENTORY,
                       edited(lambda folder, value=value: folder.set_after(
                           "partition_count", value, b"K\2", "optim", 2, b"]")))
    yield zero_row("partition_count_of_one_rank", lie, "corrupt", "partition_count", INVENTORY,
                   edited(lambda folder: folder.set_after("partition_count", b"K\1", b"K\2",
                                                          "pp_rank_1", 1, b"]")))
    for name, value, code in (
        ("1", b"K\1", "corrupt"), ("negative", h.integer(-1), "corrupt"),
        ("508", h.integer(508), "corrupt"), ("2_to_63", h.integer(2**63 - 1), "corrupt"),
        ("none", b"N", "corrupt"),
    ):
        yield zero_row("group_paddings_" + name, "padding that is data, or data that is padding",
                       code, "padding", RANGES,
                       edited(lambda folder, value=value: folder.set_after(
                           "group_paddings", value, b"K\0", "pp_rank_0", 1, b"]")))
    for key, value in (("global_steps", b"K\4"), ("ds_version", h.text("99.0"))):
        yield zero_row(key + "_of_one_rank", "two saves in one folder", "mismatch", "", INVENTORY,
                       edited(lambda folder, key=key, value=value: of_rank_1(folder, key, value),
                              "z3_bf16_dp2_frozen"))
    yield zero_row("step_of_one_rank", "two saves in one folder", "mismatch", "step", INVENTORY,
                   edited(lambda folder: payload(folder, "pp_rank_1", "data/0",
                                                 struct.pack("<f", 4))))


def of_rank_1(folder, key, value):
    old = b"K\3" if key == "global_steps" else h.text("0.19.8")
    folder.set_after(key, value, old, "pp_rank_1_mp_rank_00_model")


def payload(folder, only, record, data):
    for inside, (_, records) in folder.files.items():
        if only in inside:
            records[record] = data


def shards():
    torn = "DeepSpeed publishes before every rank has written, and loads what is there"
    for name in ("z1_bf16_dp2", "z2_bf16_dp4", "z3_bf16_dp2_frozen"):
        yield zero_row(f"optimizer_shard_missing_{name}", torn, "incomplete", "rank 1", INVENTORY,
                       tree(lambda _, tag: optim(tag, 1).unlink(), name))
    yield zero_row("model_file_missing", torn, "incomplete", "mp_rank_00", INVENTORY,
                   tree(lambda _, tag: (tag / "mp_rank_00_model_states.pt").unlink()))
    yield zero_row("all_optimizer_files_missing", torn, "incomplete", "", INVENTORY,
                   tree(lambda _, tag: [path.unlink() for path in tag.glob("*optim*")]))
    yield zero_row("shard_cut", torn, "incomplete", "does not end", INVENTORY,
                   tree(lambda _, tag: os.truncate(optim(tag, 1), 3000)))
    yield zero_row("shard_of_9_bytes", torn, "incomplete", "too short", INVENTORY,
                   tree(lambda _, tag: os.truncate(optim(tag, 1), 9)))
    yield zero_row("shard_doubled", "a rank twice and another lost", "mismatch", "swapped",
                   INVENTORY, tree(lambda _, tag: shutil.copy(optim(tag, 0), optim(tag, 1))))
    yield zero_row("shards_exchanged", "each rank gets the other's state", "mismatch", "swapped",
                   INVENTORY, tree(exchange))
    yield zero_row("shard_too_many", "left over from a larger world", "mismatch", "rank_11",
                   INVENTORY, tree(lambda _, tag: shutil.copy(optim(tag, 1), tag / optim(
                       tag, 1).name.replace("pp_rank_1", "pp_rank_11"))))
    yield zero_row("shard_of_another_stage", "two runs in one folder", "corrupt", "", INVENTORY,
                   tree(lambda _, tag: shutil.copy(
                       next(recorded("z3_bf16_dp2_frozen").rglob("*rank_0_mp*optim*")), tag)))
    yield zero_row("model_file_of_another_model", "two runs in one folder", "mismatch", "",
                   INVENTORY, tree(lambda _, tag: shutil.copy(
                       next(recorded("z1_adagrad_dp2").rglob("mp_rank_00_model*")), tag)),
                   inspect=False, verdict="SUSPECT")
    for name, new in (
        ("of_ten_million", "pp_rank_9999999_"), ("of_20_digits", "pp_rank_10000000000000000001_"),
        ("negative", "pp_rank_-1_"), ("with_zeros", "pp_rank_01_"),
    ):
        told = "mismatch" if name == "with_zeros" else "incomplete"
        yield zero_row("rank_" + name, "a rank that is none", told, "", INVENTORY,
                       tree(lambda _, tag, new=new: optim(tag, 1).rename(
                           tag / optim(tag, 1).name.replace("pp_rank_1_", new))))


def exchange(_, tag):
    one, two = optim(tag, 0), optim(tag, 1)
    one.rename(tag / "aside")
    two.rename(one)
    (tag / "aside").rename(two)


def slices():
    lie = "a slice that lies over another, or outside"
    old = b"K\x82h[K\1u"  # embed.weight: 130 elements from 1 on

    def slice_of(numel, start):
        new = h.integer(numel) + b"h[" + h.integer(start) + b"u"
        return edited(lambda folder: folder.replace(old, new, "pp_rank_0"))

    for name, numel, start, code in (
        ("overlaps", 130, 0, "corrupt"), ("leaves_a_hole", 130, 2, "corrupt"),
        ("shorter", 129, 1, "corrupt"), ("longer", 131, 1, "corrupt"),
        ("outside", 130, 500, "corrupt"), ("start_negative", 130, -1, "corrupt"),
        ("numel_negative", -130, 1, "corrupt"), ("numel_2_to_63", 2**63 - 1, 1, "corrupt"),
        ("start_2_to_63", 130, 2**63 - 1, "corrupt"), ("sum_wraps", 2**62, 2**62, "corrupt"),
        ("numel_2_to_80", 2**80, 1, "corrupt"), ("numel_0", 0, 1, "corrupt"),
    ):
        yield zero_row("slice_" + name, lie, code, "", RANGES, slice_of(numel, start))
    grow = "sizes whose product wraps around 2^63 or 2^64"
    for recording in ("z1_bf16_dp2", "z3_bf16_dp2_frozen"):
        for name, sizes in (
            ("2_to_62", (2**62,)), ("2_to_62_thrice", (2**62, 2**62, 2**62)),
            ("2_to_63", (2**63 - 1,)), ("negative", (-1,)), ("2_to_40", (2**40,)), ("zero", (0,)),
        ):
            yield zero_row(f"shape_{name}_{recording}", grow, "corrupt", "", NUMBERS,
                           edited(lambda folder, sizes=sizes: h.grow_shapes(folder, sizes),
                                  recording))


def pointers():
    lead = "joined to a path, the pointer leads out of the folder"

    def point(content):
        return tree(lambda source, _: (source / "latest").write_bytes(content))

    for name, content, code in (
        ("empty", b"", "incomplete"), ("blank", b" \n\t\n", "incomplete"),
        ("parent", b"..", "hostile"), ("grandparent", b"../..", "hostile"),
        ("etc", b"../../../../../../etc", "hostile"), ("absolute", b"/etc", "hostile"),
        ("root", b"/", "hostile"), ("itself", b".", "hostile"),
        ("slashes", b"global_step3//", "hostile"), ("up_again", b"global_step3/..", "hostile"),
        ("nul", b"global_step3\0.txt", "hostile"), ("escape", b"\x1b[31mglobal_step3", "hostile"),
        ("two_lines", b"global_step3\n/etc", "hostile"), ("not_utf8", b"\xff\xfe", "hostile"),
        ("utf16", "global_step3".encode("utf-16"), "hostile"),
        ("256_bytes", b"x" * 256, "hostile"), ("4096_bytes", b"x/" * 2048, "hostile"),
        ("1_MiB", b"x" * (1 << 20), "limit"), ("1_MiB_of_blanks", b" " * (1 << 20), "limit"),
        ("of_nothing", b"global_step4", "not_found"), ("a_file", b"latest", "not_found"),
        ("right_to_left", "\u202e3pets_labolg".encode(), "not_found"),
    ):
        yield zero_row("latest_" + name, lead, code, "latest", POINTER, point(content))
    yield zero_row("latest_universal_climbs", lead, "hostile", "latest_universal", POINTER,
                   tree(lambda source, _: (source / "latest_universal").write_text("../.."),
                        inside="universal"))
    for kind, code in (("folder", "unreadable"), ("fifo", "hostile"), ("dangling", "not_found"),
                       ("loop", "unreadable"), ("device", "hostile"), ("socket", "hostile")):
        yield zero_row("latest_is_" + kind, "another thing where a file must be", code, "", POINTER,
                       tree(lambda source, _, kind=kind: replaced(source / "latest", kind)))


def replaced(path, kind):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    place_special(path, kind)


def kinds():
    other = "a read that never ends, or of another file"
    for kind in ("folder", "fifo", "dangling", "loop", "device", "socket", "empty"):
        code = {"empty": "incomplete", "dangling": "not_found", "folder": "unreadable",
                "loop": "unreadable"}.get(kind, "hostile")
        for what in ("optim", "model"):
            yield zero_row(f"{what}_file_is_{kind}", other, code, "", KINDS,
                           tree(lambda _, tag, kind=kind, what=what: replaced(
                               next(tag.glob(f"*{what}_states.pt")), kind)))
    yield zero_row("tag_is_a_file", other, "not_found", "global_step3", KINDS,
                   tree(lambda _, tag: (shutil.rmtree(tag), tag.write_text("x"))))
    yield zero_row("tag_is_a_fifo", other, "not_found", "global_step3", KINDS,
                   tree(lambda _, tag: replaced(tag, "fifo")))
    yield zero_row("tag_is_a_link_to_itself", other, "unreadable", "global_step3", KINDS,
                   tree(lambda _, tag: replaced(tag, "loop")))
    yield zero_row("file_of_a_terabyte", "a hole that is read as data", "incomplete",
                   "does not end", KINDS,
                   tree(lambda _, tag: os.truncate(optim(tag, 1), 1 << 40)))


def names():
    climb = "ds_to_universal joins parameter names to paths and writes outside its folder"

    def named(name, recording="z1_bf16_dp2"):
        return edited(lambda folder: folder.rename(OLD, name), recording)

    for title, name in (
        ("climbs", "../../escape"), ("dots", ".."), ("dot", "."),
        ("absolute", "/tmp/isoshard-escape"), ("root", "/"), ("empty", ""), ("slashes", "a//b"),
        ("slash_behind", "a/"), ("up_again", "a/../b"), ("here_again", "a/./b"), ("nul", "a\0b"),
        ("newline", "a\nb"), ("escape", "a\x1b[31mb"), ("delete", "a\x7fb"),
        ("next_line", "a\u0085b"), ("256_bytes", "x" * 256), ("256_bytes_inside", "a/" + "y" * 256),
        ("256_bytes_of_letters", "é" * 128), ("5000_bytes", "a" * 5000), ("not_utf8", b"\xff\xfe"),
        ("overlong", b"a\xc0\xafb"), ("surrogate", b"\xed\xa0\x80"),
    ):
        yield zero_row("parameter_" + title, climb, "hostile", "name", NAMES, named(name))
    for title, name in (("climbs", "../../escape"), ("nul", "a\0b"), ("absolute", "/etc/x")):
        yield zero_row(f"parameter_{title}_stage_3", climb, "hostile", "name", NAMES,
                       named(name, "z3_bf16_dp2_frozen"))
    for title, key in (("optimizer_state", "exp_avg"),):
        yield zero_row(title + "_climbs", climb, "hostile", "", NAMES,
                       edited(lambda folder, key=key: folder.replace(
                           h.text(key), h.text("../../escape"), "optim")))
        yield zero_row(title + "_named_like_the_master", "one file for two states", "corrupt", "",
                       NAMES, edited(lambda folder, key=key: folder.replace(
                           h.text(key), h.text("fp32"), "optim")))


def universals():
    half = "a conversion that did not end, or was put together"

    def state(edit):
        return lambda _, tag: edit(tag / "zero" / OLD)

    for name, code, words, rule, edit in (
        ("state_missing", "incomplete", "fp32", INVENTORY,
         state(lambda path: (path / "fp32.pt").unlink())),
        ("parameter_missing", "incomplete", OLD, INVENTORY, state(shutil.rmtree)),
        ("global_state_missing", "incomplete", "optimizer_state.pt", INVENTORY,
         lambda _, tag: (tag / "zero" / "optimizer_state.pt").unlink()),
        ("model_file_missing", "incomplete", "mp_rank_00", INVENTORY,
         lambda _, tag: (tag / "mp_rank_00_model_states.pt").unlink()),
        ("state_of_another_shape", "corrupt", "shape", INVENTORY,
         state(lambda path: shutil.copy(path.parent / "scale" / "fp32.pt", path / "fp32.pt"))),
        ("state_is_a_fifo", "hostile", "named pipe", KINDS,
         state(lambda path: replaced(path / "fp32.pt", "fifo"))),
        ("state_is_a_device", "hostile", "a device", KINDS,
         state(lambda path: replaced(path / "fp32.pt", "device"))),
        ("state_runs_code", "hostile", "system", NAMES,
         state(lambda path: (path / "fp32.pt").write_bytes(h.torch_zip(
             h.records_of(h.evil_pickle("touch canary"), [], "fp32"))))),
        ("moment_runs_code", "hostile", "system", NAMES,
         state(lambda path: (path / "exp_avg.pt").write_bytes(h.torch_zip(
             h.records_of(h.evil_pickle("touch canary"), [], "exp_avg"))))),
    ):
        yield universal_row(name, half, code, words, rule, edit)
    # A moment is no part of fp32 weights: verify tells it, convert to fp32 need not.
    yield universal_row("moment_missing", half, "", "exp_avg", INVENTORY,
                        state(lambda path: (path / "exp_avg.pt").unlink()), verdict="INCOMPLETE")
    yield universal_row("states_exchanged", half, "mismatch", "", INVENTORY,
                        state(lambda path: shutil.copy(path / "exp_avg.pt", path / "fp32.pt")))
    yield universal_row("parameter_too_many", half, "mismatch", "", INVENTORY, state(
        lambda path: shutil.copytree(path, path.with_name("further.weight"))))
    yield universal_row("folder_of_itself", half, "", "", KINDS,
                        lambda _, tag: (tag / "zero" / "loop").symlink_to("."))
    yield universal_row("folders_300_deep", "a walk by recursion", "", "", KINDS,
                        lambda _, tag: deep(tag / "zero"))


def deep(folder):
    here = os.getcwd()
    os.chdir(folder)
    for _ in range(300):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)
