"""Archives that lie: two readings of one file, sizes that are not there, names that climb."""

import io
import struct
import zipfile
import zlib

from row import file, h, row

DATA = h.floats(4)
GOOD = h.weights([("w", h.tensor())])
BASE = h.records_of(GOOD, [DATA])
NAMES = [name for name, _ in BASE]
PICKLE, STORAGE = NAMES.index("archive/data.pkl"), NAMES.index("archive/data/0")
PLAIN = h.torch_zip(BASE)
AT = h.ZipPlaces(PLAIN)
TILE = "records tile the file: no gap, no overlap, nothing before, between or behind"
TWICE = "header, descriptor and directory agree on every field"
ENDS = "the end records agree with each other and with the file's length"
NAME = "one folder, plain unique relative names"
STORED = "records are stored, not compressed or encrypted"
EVIL = h.evil_pickle("touch canary")


def with_(record=STORAGE, **tricks):
    """The sound archive with one record that lies."""
    records = list(BASE)
    records[record] = h.Record(NAMES[record], BASE[record][1], **tricks)
    return h.torch_zip(records)


def further(name, content=b"x"):
    return h.torch_zip(BASE + [(name, content)])


def patch(at, form, *values):
    return h.patched(PLAIN, at, form, *values)


def as_python_writes(records, **how):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **how) as archive:
        for name, data in records:
            archive.writestr(name, data)
    return out.getvalue()


def with_hidden_pickle():
    """A second local record that a reader of the directory never sees and a stream reader does."""
    hidden = h.torch_zip([("archive/data.pkl", EVIL)])
    return hidden[: h.ZipPlaces(hidden).directory] + PLAIN


def deflated():
    return with_(method=8, raw=zlib.compress(DATA)[2:-4])


def bomb():
    raw = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = raw.compress(bytes(50_000_000)) + raw.flush()
    records = list(BASE)
    records[STORAGE] = h.Record(NAMES[STORAGE], bytes(50_000_000), method=8, raw=packed)
    return h.torch_zip(records)


def zip64_extra(*values):
    return struct.pack("<HH", 1, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values)


def directory_of_billions():
    """A hole of a gigabyte that the end record calls a directory."""
    return patch(AT.end64 + 24, "QQQ", 5_000_000, 5_000_000, 1 << 40)


def file_of_entries(count):
    """Directory entries that all point at one header: a small file of many records."""
    one = h.torch_zip([("archive/data/0", DATA)])
    at = h.ZipPlaces(one)
    entry = one[at.directory : at.end64]
    body = one[: at.directory] + entry * count
    return (
        body
        + struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 45, 0, 0, count, count,
                      len(entry) * count, at.directory)
        + struct.pack("<IIQI", 0x07064B50, 0, len(body), 1)
        + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
                      len(entry) * count, at.directory, 0)
    )


def hidden_by_extra():
    """The local header's extra field swallows the next record's header."""
    return patch(AT.local[STORAGE] + 28, "H", 0xFFFF)


def zip_row(name, threat, code, words, rule, content, **how):
    return row("zip." + name, threat, code, words, rule, file(content), **how)


def rows():
    yield from doubled()
    yield from contradicting()
    yield from around()
    yield from ends()
    yield from named()
    yield from packed()
    yield from truncated()


def doubled():
    last = "torch takes the last of two records of one name without a word"
    scan = "a scanner reads one record and the loader the other (CVE-2025-1944)"
    yield zip_row("duplicate_storage", last, "hostile", "same name", NAME,
                  further("archive/data/0", DATA))
    yield zip_row("duplicate_pickle", scan, "hostile", "same name", NAME,
                  further("archive/data.pkl", EVIL))
    yield zip_row("duplicate_pickle_first", scan, "hostile", "same name", NAME,
                  h.torch_zip([("archive/data.pkl", EVIL)] + BASE))
    yield zip_row("duplicate_version", last, "hostile", "same name", NAME,
                  further("archive/version", b"3\n"))
    yield zip_row("pickle_in_another_folder", scan, "corrupt", "another folder", NAME,
                  further("other/data.pkl", EVIL))
    yield zip_row("name_in_another_case", scan, "corrupt", "does not write", NAME,
                  further("archive/DATA.PKL", EVIL))
    yield zip_row("two_folders_of_one_spelling", scan, "corrupt", "another folder", NAME,
                  further("archive\u200b/data.pkl", EVIL))


def contradicting():
    scan = "local and central header differ, each is read by somebody (CVE-2025-1944)"
    bits = "flag bits stop a scanner and not the loader (CVE-2025-1945)"
    crc = "a wrong CRC ends a scan early and torch does not look at it (CVE-2025-10156)"
    local, central = AT.local[STORAGE], AT.central[STORAGE]
    yield zip_row("local_name_differs", scan, "corrupt", "name differs", TWICE,
                  with_(local_name="archive/data/1"))
    yield zip_row("local_name_longer", scan, "corrupt", "name length", TWICE,
                  with_(local_name="archive/data/00"))
    yield zip_row("local_name_is_the_pickle", scan, "corrupt", "name", TWICE,
                  with_(PICKLE, local_name="archive/data.pk1"))
    yield zip_row("local_version_differs", scan, "corrupt", "version needed", TWICE,
                  patch(local + 4, "H", 20))
    yield zip_row("local_flags_differ", bits, "corrupt", "flags", TWICE,
                  patch(local + 6, "H", 0x0800))
    yield zip_row("local_method_differs", scan, "corrupt", "method", TWICE,
                  patch(local + 8, "H", 8))
    yield zip_row("local_time_differs", scan, "corrupt", "time", TWICE,
                  patch(local + 10, "H", 1))
    yield zip_row("local_crc_beside_descriptor", scan, "corrupt", "CRC", TWICE,
                  patch(local + 14, "I", zlib.crc32(DATA)))
    yield zip_row("local_size_beside_descriptor", scan, "corrupt", "compressed size", TWICE,
                  patch(local + 18, "I", len(DATA)))
    yield zip_row("local_signature_wrong", scan, "corrupt", "signature", TWICE,
                  patch(local, "I", 0x04034B51))
    yield zip_row("extra_swallows_the_next_record", scan, "corrupt", "outside the file", TILE,
                  hidden_by_extra())
    yield zip_row("extra_moves_the_data", "torch follows the local extra length, four such bytes "
                  "shift a tensor in silence", "corrupt", "extra field", TILE,
                  patch(local + 28, "H", struct.unpack_from("<H", PLAIN, local + 28)[0] - 4))
    yield zip_row("extra_holds_code", "data hidden in the alignment fill", "corrupt",
                  "alignment fill", TILE, patch(local + 30 + 14 + 4, "8s", b"import o"))
    yield zip_row("descriptor_size_lies", scan, "corrupt", "descriptor", TWICE,
                  with_(local_size=8))
    yield zip_row("descriptor_crc_lies", crc, "corrupt", "CRC in the descriptor", TWICE,
                  patch(AT.descriptor[STORAGE] + 4, "I", 7))
    yield zip_row("descriptor_without_signature", scan, "corrupt", "descriptor signature", TWICE,
                  patch(AT.descriptor[STORAGE], "I", zlib.crc32(DATA)))
    yield zip_row("central_size_lies", scan, "corrupt", "wrong", TWICE, with_(central_size=8))
    yield zip_row("central_size_2_GB", scan, "corrupt", "outside the file", TWICE,
                  with_(central_size=2**31))
    yield zip_row("crc_wrong_everywhere", crc, "corrupt", "CRC", "every payload has its CRC",
                  with_(crc=1), inspect=False)
    yield zip_row("crc_of_the_pickle_wrong", crc, "corrupt", "CRC", "every payload has its CRC",
                  with_(PICKLE, crc=1))
    yield zip_row("crc_zero_as_unchecked", crc, "corrupt", "CRC", "every payload has its CRC",
                  with_(crc=0), inspect=False)
    yield zip_row("payload_bit_flipped", "torch is built without CRC checks: 91 % of damaged "
                  "bytes load in silence", "corrupt", "CRC", "every payload has its CRC",
                  patch(AT.payload[STORAGE], "B", 1), inspect=False)
    yield zip_row("encrypted_flag", bits, "corrupt", "flags", STORED, with_(flags=0x0809))
    yield zip_row("strong_encryption_flag", bits, "corrupt", "flags", STORED, with_(flags=0x0848))
    yield zip_row("masked_header_flag", bits, "corrupt", "flags", STORED, with_(flags=0x2808))
    yield zip_row("patched_data_flag", bits, "corrupt", "flags", STORED, with_(flags=0x0828))
    yield zip_row("all_flags", bits, "corrupt", "flags", STORED, with_(flags=0xFFFF))
    yield zip_row("no_flags", "a descriptor is there and no flag says so", "corrupt", "flags",
                  TWICE, with_(flags=0))
    yield zip_row("central_time_set", "another program's archive with torch's end", "corrupt",
                  "time", TWICE, with_(time=0x1234))
    yield zip_row("central_version_set", "another program's archive with torch's end", "corrupt",
                  "versions", TWICE, with_(version=20))
    yield zip_row("attributes_of_a_link", "an entry that unpackers make a symbolic link",
                  "corrupt", "attributes", TWICE, with_(attributes=0o120777 << 16))
    yield zip_row("central_extra", "bytes of the directory that no CRC covers", "corrupt",
                  "extra field", TWICE, with_(central_extra=b"\xff\xff\4\0abcd"))
    yield zip_row("central_comment", "bytes of the directory that no CRC covers", "corrupt",
                  "comment", TWICE, with_(central_comment=b"hello"))
    yield zip_row("central_signature_wrong", scan, "corrupt", "signature", TWICE,
                  patch(central, "I", 0x02014B51))
    yield zip_row("central_disk", "a record on another disk", "corrupt", "disk", TWICE,
                  patch(central + 34, "H", 1))


def around():
    both = "a polyglot: one file, two programs, two meanings"
    yield zip_row("prefix_of_a_program", both, "corrupt", "overlap or leave a gap", TILE,
                  h.torch_zip(BASE, before=b"MZ" + bytes(62)))
    yield zip_row("prefix_of_a_script", both, "corrupt", "zip64 locator", TILE,
                  b"#!/bin/sh\n" + PLAIN)
    yield zip_row("prefix_of_a_pickle", both, "unsupported", "legacy torch stream",
                  "one format a file", EVIL + PLAIN)
    yield zip_row("prefix_of_a_hidden_record", "a reader by stream runs a record that the "
                  "directory does not have", "corrupt", "zip64 locator", TILE,
                  with_hidden_pickle())
    yield zip_row("suffix_byte", both, "incomplete", "does not end as a zip", TILE, PLAIN + b"x")
    yield zip_row("suffix_zeros", "torch loads a file with a stale tail", "incomplete",
                  "does not end as a zip", TILE, PLAIN + bytes(512))
    yield zip_row("suffix_archive", both, "corrupt", "zip64 locator", TILE, PLAIN + PLAIN)
    yield zip_row("suffix_pickle", both, "incomplete", "does not end as a zip", TILE, PLAIN + EVIL)
    yield zip_row("stale_tail", "a shorter save over a longer one without truncation", "corrupt",
                  "", TILE, h.torch_file(h.weights([("v", h.tensor())]), [DATA])[: AT.local[4]]
                  + PLAIN[AT.local[3] :])
    yield zip_row("gap_between_records", both, "corrupt", "zip64 locator", TILE,
                  PLAIN[: AT.local[1]] + bytes(64) + PLAIN[AT.local[1] :])
    yield zip_row("gap_before_the_directory", both, "corrupt", "", TILE,
                  h.torch_zip(BASE, directory_shift=64))
    yield zip_row("record_without_entry", "bytes that only a stream reader sees", "corrupt",
                  "overlap or leave a gap", TILE, without_entry(STORAGE))
    yield zip_row("overlap_of_two_records", "two names, one payload", "corrupt",
                  "overlap or leave a gap", TILE, with_(offset=0))
    yield zip_row("overlap_full", "42 kB that inflate to 5.5 GB (D. Fifield's overlap)", "corrupt",
                  "", TILE, lambda: h.inflating_overlap(500, bytes(1 << 20), False))
    yield zip_row("overlap_quoted", "the same, each record quoting the next header", "corrupt",
                  "", TILE, lambda: h.inflating_overlap(500, bytes(1 << 20), True))
    yield zip_row("header_beyond_the_file", "a read outside the file", "corrupt",
                  "outside the file", TILE, with_(offset=10**9))
    yield zip_row("header_in_a_payload", "a header that the payload brings along", "corrupt",
                  "overlap or leave a gap", TILE, with_(offset=64))


def without_entry(record):
    """The archive without one directory entry; counts and sizes fit again."""
    begin = AT.central[record]
    entry = PLAIN[begin : AT.central[record + 1]]
    data = PLAIN[:begin] + PLAIN[begin + len(entry) :]
    count, size = len(BASE) - 1, AT.end64 - AT.directory - len(entry)
    data = h.patched(data, AT.end64 - len(entry) + 24, "QQQ", count, count, size)
    data = h.patched(data, AT.locator - len(entry) + 8, "Q", AT.end64 - len(entry))
    return h.patched(data, AT.end - len(entry) + 8, "HHI", count, count, size)


def ends():
    lie = "a reader that believes counts and sizes allocates or reads what is not there"
    yield zip_row("comment", "a comment can hold a second end record", "incomplete",
                  "does not end as a zip", ENDS, h.torch_zip(BASE, comment=b"hello"))
    yield zip_row("comment_with_an_end_record", "two readings of one file", "corrupt",
                  "", ENDS, h.torch_zip(BASE, comment=h.torch_zip([("archive/data.pkl", EVIL)])))
    yield zip_row("comment_length_lies", lie, "corrupt", "comment length", ENDS,
                  patch(AT.end + 20, "H", 5))
    yield zip_row("count_too_large", lie, "corrupt", "ends inside a record", ENDS,
                  h.torch_zip(BASE, count=len(BASE) + 1))
    yield zip_row("count_too_small", lie, "corrupt", "beyond its last record", ENDS,
                  h.torch_zip(BASE, count=len(BASE) - 1))
    yield zip_row("count_2_to_40", lie, "limit", "zip records", ENDS,
                  h.torch_zip(BASE, count=2**40))
    yield zip_row("count_5_million", lie, "corrupt", "too small", ENDS,
                  h.torch_zip(BASE, count=5_000_000))
    yield zip_row("directory_of_a_terabyte", lie, "corrupt", "", ENDS, directory_of_billions())
    yield zip_row("counts_of_the_two_ends_differ", lie, "corrupt", "number of records", ENDS,
                  patch(AT.end + 8, "HH", 3, 3))
    yield zip_row("count_on_this_disk_differs", lie, "corrupt", "number of records", ENDS,
                  patch(AT.end + 8, "H", 3))
    yield zip_row("disk_number", lie, "corrupt", "disk", ENDS, patch(AT.end + 4, "H", 1))
    yield zip_row("zip64_sizes_differ", lie, "corrupt", "directory size", ENDS,
                  patch(AT.end64 + 40, "Q", 1))
    yield zip_row("zip64_offset_differs", lie, "corrupt", "directory offset", ENDS,
                  patch(AT.end64 + 48, "Q", 1))
    yield zip_row("zip64_offset_2_to_63", lie, "corrupt", "", ENDS,
                  h.patched(patch(AT.end64 + 48, "Q", 2**63), AT.end + 16, "I", 0xFFFFFFFF))
    yield zip_row("zip64_size_wraps", lie, "corrupt", "", ENDS,
                  h.patched(patch(AT.end64 + 40, "QQ", 2**64 - 1, 2**64 - 1), AT.end + 12, "II",
                            0xFFFFFFFF, 0xFFFFFFFF))
    yield zip_row("zip64_record_size_lies", lie, "corrupt", "size", ENDS,
                  patch(AT.end64 + 4, "Q", 2**63))
    yield zip_row("zip64_signature_wrong", lie, "corrupt", "signature", ENDS,
                  patch(AT.end64, "I", 0))
    yield zip_row("locator_points_elsewhere", lie, "corrupt", "zip64 locator", ENDS,
                  patch(AT.locator + 8, "Q", 0))
    yield zip_row("locator_of_two_disks", lie, "corrupt", "disks", ENDS,
                  patch(AT.locator + 16, "I", 2))
    yield zip_row("directory_elsewhere", lie, "corrupt", "does not end where", ENDS,
                  h.torch_zip(BASE, directory_shift=-1))
    yield zip_row("zip64_field_for_a_small_record", "two sizes for one record", "corrupt",
                  "extra field", TWICE, with_(central_extra=zip64_extra(16, 16)))
    yield zip_row("zip64_field_missing", lie, "corrupt", "zip64 field is too short", TWICE,
                  patch(AT.central[STORAGE] + 20, "II", 0xFFFFFFFF, 0xFFFFFFFF))
    yield zip_row("zip64_field_2_to_64", lie, "corrupt", "", TWICE,
                  with_(central_size=0xFFFFFFFF, central_extra=zip64_extra(2**64 - 1, 2**64 - 1)))
    yield zip_row("one_header_for_50_000_records", lie, "corrupt", "overlap or leave a gap", TILE,
                  lambda: file_of_entries(50_000))
    yield zip_row("no_records", "an archive of nothing", "incomplete", "no data.pkl",
                  "torch's records are there", h.torch_zip([]))
    yield zip_row("end_record_alone", "an archive of nothing", "incomplete", "no data.pkl",
                  "torch's records are there", b"PK\5\6" + bytes(18))


def named():
    climb = "unpacked or joined to a path, the name leaves the folder"
    odd = "the name means another thing elsewhere, or cannot be shown"
    for name, threat, path in (
        ("parent", climb, "archive/../../escape"),
        ("parent_first", climb, "../escape"),
        ("parent_folder_as_prefix", climb, "../archive/data/1"),
        ("absolute", climb, "/tmp/isoshard-escape"),
        ("backslashes", climb, "archive\\..\\escape"),
        ("drive", climb, "archive/C:\\escape"),
        ("nul", odd, "archive/data.pkl\0.txt"),
        ("escape_sequence", odd, "archive/\x1b[2J"),
        ("newline", odd, "archive/data\n/9"),
        ("next_line", odd, "archive/data\u0085/9"),
        ("not_utf8", odd, b"archive/\xff\xfe"),
        ("overlong_slash", climb, b"archive/..\xc0\xaf..\xc0\xafescape"),
        ("surrogate", odd, b"archive/\xed\xa0\x80"),
        ("empty", odd, ""),
        ("empty_component", odd, "archive//data/9"),
        ("dot_component", odd, "archive/./data/9"),
        ("component_of_256_bytes", odd, "archive/" + "a" * 256),
        ("65_508_bytes", odd, "archive/" + "a" * 65_500),
    ):
        yield zip_row("name_" + name, threat, "hostile", "unsafe name", NAME, further(path))
    for name, path in (
        ("device", "archive/CON"),
        ("stream", "archive/data.pkl:evil"),
        ("tilde", "archive/~root"),
        ("right_to_left", "archive/\u202egnp.lkp"),
        ("zero_width", "archive/data/\u200b0"),
        ("homoglyph", "archive/d\u0430ta/0"),
        ("full_width_slash", "archive/data\uff0f0"),
        ("combining", "archive/data/0\u0301"),
        ("key_with_zeros", "archive/data/00"),
        ("key_not_ascii", "archive/data/\u0660"),
        ("key_with_a_sign", "archive/data/-1"),
        ("module_of_python", "archive/code/__torch__.py"),
        ("second_pickle", "archive/constants.pkl"),
        ("debug_pickle", "archive/code/__torch__.py.debug_pkl"),
    ):
        yield zip_row("name_" + name, odd, "corrupt", "archive has a", NAME, further(path, EVIL))
    yield zip_row("name_without_folder", odd, "corrupt", "outside", NAME, further("loose"))
    yield zip_row("folder_entry", odd, "hostile", "empty", NAME, further("archive/", b""))


def packed():
    inflate = "inflating costs what the file does not say"
    yield zip_row("deflated", inflate, "corrupt", "must be stored", STORED, deflated)
    yield zip_row("deflated_bomb", inflate, "corrupt", "must be stored", STORED, bomb)
    yield zip_row("method_lzma", inflate, "corrupt", "must be stored", STORED, with_(method=14))
    yield zip_row("method_of_encryption", inflate, "corrupt", "must be stored", STORED,
                  with_(method=99))
    yield zip_row("written_deflated_by_another_program", inflate, "corrupt", "must be stored",
                  STORED, as_python_writes(BASE, compression=zipfile.ZIP_DEFLATED))
    yield zip_row("pickle_deflated", inflate, "corrupt", "must be stored", STORED,
                  with_(PICKLE, method=8, raw=zlib.compress(GOOD)[2:-4]))
    yield zip_row("packed_size_differs", inflate, "corrupt", "size", STORED, with_(raw=DATA * 2))


def truncated():
    cut = "a writer that died, or a download that ended"
    places = {
        "to_nothing": 0,
        "in_the_first_signature": 3,
        "behind_the_first_header": AT.local[0] + 30,
        "before_the_first_payload": AT.payload[0],
        "before_the_first_descriptor": AT.descriptor[0],
        "before_the_second_record": AT.local[1],
        "in_the_storage": AT.payload[STORAGE] + 8,
        "before_the_storages_descriptor": AT.descriptor[STORAGE],
        "before_the_directory": AT.directory,
        "in_the_directory": AT.central[STORAGE] + 20,
        "before_the_zip64_end": AT.end64,
        "before_the_locator": AT.locator,
        "before_the_end": AT.end,
        "in_the_end": AT.end + 10,
        "by_one_byte": len(PLAIN) - 1,
    }
    for name, at in places.items():
        yield zip_row("cut_" + name, cut, "incomplete", "", "the file is whole", PLAIN[:at])
    yield zip_row("head_cut", cut, "unsupported", "", "the file is whole", PLAIN[64:])
    yield zip_row("middle_cut", cut, "corrupt", "", "the file is whole",
                  PLAIN[: AT.payload[STORAGE]] + PLAIN[AT.descriptor[STORAGE] :])
    yield zip_row("middle_zeroed", "blocks that the disk never wrote", "corrupt", "",
                  "the file is whole", patch(AT.local[STORAGE], "64s", bytes(64)))
