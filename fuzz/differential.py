#!/usr/bin/env python3
"""fuzz/differential.py [BUILD]: compares our zip reader with Python's zipfile, file by file.

BUILD is a build folder with zip_probe (build/fuzz unless given). Takes the seeds and regressions of
the targets zip and zip_records and what libFuzzer kept of them in BUILD/corpus. Wherever ours
accepts a file, zipfile must accept it, find the same records at the same places with the same
sizes and CRCs, and agree on which data fit their CRCs. Where ours refuses a file that zipfile
accepts, the reason must be one of STRICTER. Prints the counts; ends with 1 on any other difference.

Not compared: time stamps, attributes and other fields that neither reader of checkpoints needs.
Python's standard library only.
"""

import collections
import io
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGETS = {"zip": (), "zip_records": ("--described",)}
AT_ONCE = 500  # files in one call of zip_probe

# Our refusals of archives that zipfile reads, by their first words, and why we refuse.
STRICTER = {
    "The file is too short": "no archive of torch is shorter than its end record",
    "The file does not end as a zip": "bytes behind the end record, or a comment (polyglots)",
    "A zip header field is wrong": "all header fields are what torch writes, in both headers",
    "The zip directory does not end where": "bytes before the archive (polyglots)",
    "The zip directory is too small": "a wrong number of records",
    "The zip directory holds bytes beyond": "a wrong number of records",
    "The zip directory ends inside": "a wrong number of records",
    "Zip records overlap or leave a gap": "records tile the file (zip bombs, hidden data)",
    "Bytes lie between the last zip record": "records tile the file",
    "A zip record has unknown flags": "encryption, patches, other tools",
    "A zip record points outside": "sizes are checked before they are used",
    "A zip record's extra field": "nothing may hide in extra fields",
    "A zip64 field is too short": "nothing may hide in extra fields",
    "A record's extra field": "nothing may hide in extra fields",
    "A record's name differs": "the two headers must name the same record (scanner evasion)",
    "A zip record lies outside the archive's folder": "torch puts all records into one folder",
    "A zip record lies in another folder": "torch puts all records into one folder",
    "A zip record has an unsafe name": "path traversal, control characters, invalid UTF-8",
    "Two zip records have the same name": "torch takes the last and says nothing",
    "A limit against resource bombs": "budgets",
}


def hexed(text):
    return bytes.fromhex(text)


def ours(probe, options, paths):
    """{path: answer of zip_probe}"""
    answers = {}
    for at in range(0, len(paths), AT_ONCE):
        some = [str(path) for path in paths[at : at + AT_ONCE]]
        run = subprocess.run([probe, *options, *some], capture_output=True, check=False)
        if run.returncode != 0:
            sys.exit(f"differential: zip_probe ends with {run.returncode}: {run.stderr[-2000:]}")
        for line in run.stdout.splitlines():
            answer = json.loads(line)
            answers[hexed(answer["file"][4:]).decode()] = answer
    return answers


def raw_name(info):
    return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")


def theirs(content):
    """The records in our probe's form, in the file's order; None if zipfile refuses the archive.
    The last field is None for data that do not fit their CRC."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = [record_of(archive, info, content) for info in archive.infolist()]
    except Exception:  # of a damaged archive it raises whatever it stumbles over
        return None
    return sorted(found, key=lambda record: record[3])


def record_of(archive, info, content):
    at = info.header_offset
    name_bytes, extra_bytes = struct.unpack_from("<HH", content, at + 26)
    crc = None
    try:
        if info.compress_type == zipfile.ZIP_STORED:  # we accept no other
            with archive.open(info) as data:
                crc = zlib.crc32(data.read())
    except zipfile.BadZipFile as error:
        if "Bad CRC-32" not in str(error):
            raise
    data_at = at + 30 + name_bytes + extra_bytes
    return [raw_name(info), info.file_size, info.CRC, at, data_at, crc]


def difference(mine, content):
    """What is wrong with the pair of answers; "" if nothing is."""
    python = theirs(content)
    if not mine["accepted"]:
        if python is None or any(mine["why"].startswith(words) for words in STRICTER):
            return ""
        return "refused for a reason that is not listed: " + mine["why"]
    if python is None:
        return "accepted, and zipfile refuses it"
    records = [[hexed(record[0]), *record[1:]] for record in mine["records"]]
    if len(records) != len(python):
        return f"{len(records)} records, zipfile has {len(python)}"
    for one, other in zip(records, python):
        if one[:5] != other[:5]:
            return f"{one[:5]}, zipfile has {other[:5]}"
        if (one[5] == one[2]) != (other[5] == other[2]):
            return f"{one[0]!r}: zipfile has another verdict on its CRC"
    return ""


def files_of(target, build):
    folders = [HERE / "corpus" / target, HERE / "regressions" / target, build / "corpus" / target]
    return [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]


def main():
    build = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "build" / "fuzz")
    probe = build / "zip_probe"
    if not probe.exists():
        sys.exit(f"differential: {probe} is not there; scripts/fuzz builds it")
    counts, wrong = collections.Counter(), []
    for target, options in TARGETS.items():
        paths = files_of(target, build)
        with tempfile.TemporaryDirectory() as place:
            where = [place] if options else []
            for name, mine in ours(probe, [*options, *where], paths).items():
                content = (Path(place, Path(name).name) if options else Path(name)).read_bytes()
                said = difference(mine, content)
                python = "refused" if theirs(content) is None else "accepted"
                kind = "accepted" if mine["accepted"] else "refused"
                counts[f"ours {kind}, zipfile {python}"] += 1
                if said:
                    wrong.append(f"{name}: {said}")
    for kind, count in sorted(counts.items()):
        print(f"{count:8} {kind}")
    for line in wrong[:20]:
        print("different: " + line)
    print(f"differential: {sum(counts.values())} archives, {len(wrong)} differences")
    sys.exit(1 if wrong or not counts else 0)


if __name__ == "__main__":
    main()
