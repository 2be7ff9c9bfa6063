"""Folders with a manifest that does not fit, names other folders, or is a bomb."""

import hashlib
import os

from row import files, h, row

ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
MODEL = h.safetensors({"w": ENTRY}, h.floats(4))
FIT = ("model.safetensors", len(MODEL), "sha256:" + hashlib.sha256(MODEL).hexdigest())
RULE = "MANIFEST.json is in the one form in which it is written, and every file is as it says"
FORGED = "a manifest that makes a damaged folder look whole, or reads other files"


def folder(text):
    return files(lambda: {"model.safetensors": MODEL,
                          "MANIFEST.json": text() if callable(text) else text})


def told(*listed, **members):
    return h.manifest(listed, **members)


def manifest_row(name, threat, words, text, code="corrupt", verdict=None):
    return row("manifest." + name, threat, code, words, RULE, folder(text), inspect=False,
               verdict=verdict)


def long_hole(where):
    source = folder("")(where)
    os.truncate(source / "MANIFEST.json", (128 << 20) + 1)
    return source


def rows():
    path, size, hashed = FIT
    sound = told(FIT)
    for name, words, text in (
        ("hash_differs", "instead of", told((path, size, "sha256:" + "0" * 64))),
        ("size_differs", "instead of", told((path, size + 1, hashed))),
        ("size_2_to_63", "instead of", told((path, 2**63 - 1, hashed))),
        ("size_2_to_64", "", told((path, 2**64, hashed))),
        ("size_negative", "out of range", told((path, -1, hashed))),
        ("size_fraction", "out of range", told((path, 0.5, hashed))),
        ("hash_malformed", "", told((path, size, "sha256"))),
        ("hash_with_a_path", "", told((path, size, "../../x:00"))),
        ("self_hash_wrong", "hash it carries", told(FIT, self_hash="sha256:" + "0" * 64)),
        ("self_hash_missing", "", sound.replace("self_hash", "shelf_hash")),
        ("one_byte_changed", "hash it carries", sound.replace("0.1.0", "0.1.1")),
        ("other_kind", "no manifest", told(FIT, kind="manifest")),
        ("schema_2", "does not know", told(FIT, schema=2)),
        ("member_too_many", "", told(FIT, note="x")),
        ("files_is_an_object", "", told(FIT, files={})),
        ("entry_is_a_text", "", told(FIT, files=["model.safetensors"])),
        ("path_climbs", "", told(FIT, ("../../../etc/passwd", 1, hashed))),
        ("path_absolute", "", told(FIT, ("/etc/passwd", 1, hashed))),
        ("path_empty", "", told(FIT, ("", 1, hashed))),
        ("path_with_nul", "", told(FIT, ("a\0b", 1, hashed))),
        ("path_twice", "", told(FIT, FIT)),
        ("unsorted", "not sorted", told(FIT, ("a", 0, hashed))),
        ("other_spacing", "form in which it is written", sound.replace("\n ", "\n  ")),
        ("duplicate_key", "twice", sound.replace('"schema": 1', '"schema": 1,\n "schema": 1')),
        ("empty", "JSON", ""),
        ("not_utf8", "", sound.encode().replace(b"0.1.0", b"0.1.\xff")),
        ("of_nul_bytes", "JSON", "\0" * 4096),
        ("list", "no JSON object", "[]"),
    ):
        yield manifest_row(name, FORGED, words, text,
                           "mismatch" if words == "instead of" else "corrupt")
    grow = "JSON of great depth, width or length"
    for name, words, text in (
        ("bomb_depth", "nested", lambda: '{"files":[{' + '"a":[' * 1_000_000),
        ("bomb_width", "", lambda: '{"files":[' + "0," * 8_000_000 + "0]}"),
        ("bomb_entries", "", lambda: '{"files":[' + "{}," * 70_000 + "{}]}"),
        ("bomb_text", "more than 65536 bytes", lambda: sound.replace("0.1.0", "0" * 30_000_000)),
        ("bomb_keys", "", lambda: "{" + ",".join(f'"{i}":0' for i in range(1_500_000)) + "}"),
    ):
        yield manifest_row(name, grow, words, text)
    yield row("manifest.longer_than_is_read", grow, "limit", "large", RULE, long_hole,
              inspect=False)
    yield manifest_row("file_missing", FORGED, "", told(FIT, ("z", 1, hashed)), "mismatch",
                       "INCOMPLETE")
    yield row("manifest.file_too_many", "a file that came later", "mismatch", "stowaway", RULE,
              files({"model.safetensors": MODEL, "MANIFEST.json": sound, "stowaway.pt": b"x"}),
              inspect=False, verdict="SUSPECT")
