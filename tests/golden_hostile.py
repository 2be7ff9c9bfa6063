#!/usr/bin/env python3
"""golden_hostile.py PROGRAM TRACES [unittest arguments]: golden --check trusts no HDF5 file.

HDF5 files can name other files: external links, external storage and virtual datasets have read
whatever a program's user may read (Keras CVE-2026-1669). isoshard writes golden.h5 and never
opens one by the HDF5 library: --check makes the file again and compares bytes. Here golden.h5 is
each such file, a hole of 3 GiB, and a device: status 1 or 2 within 1 s of processor time and
256 MiB, and, by strace, no file opened but those of the folder and the system's own (class Traced;
skipped, with 77 if it is asked for alone, where nothing can be traced).

Python's standard library only. Not verified here: faults of the HDF5 library in writing.
"""

import json
import os
import re
import resource
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from damage_case import KILOBYTES, SECONDS, Outcome, place_special  # noqa: E402
from program_case import CONFIG, ProgramCase, run_tests  # noqa: E402
from tracing import TracedCase, status_of, traced  # noqa: E402

UNDEFINED = b"\xff" * 8
SYSTEM = ("/lib", "/usr", "/etc/ld.so", "/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/ssl")


# ---- HDF5 files by hand: the format's version 2 superblock and object headers --------------------


def lookup3(data):
    """Bob Jenkins' hashlittle with initial value 0, HDF5's checksum of metadata."""
    mask = 0xFFFFFFFF

    def rot(x, k):
        return (x << k | x >> (32 - k)) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    while len(data) > 12:
        x, y, z = struct.unpack_from("<3I", data)
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        for k, shift in enumerate((4, 6, 8, 16, 19, 4)):
            p, q, r = ((a, b, c), (b, c, a), (c, a, b))[k % 3]
            p = (p - r) & mask ^ rot(r, shift)
            r = (r + q) & mask
            a, b, c = ((p, q, r), (r, p, q), (q, r, p))[k % 3]
        data = data[12:]
    if not data:
        return c
    x, y, z = struct.unpack("<3I", data.ljust(12, b"\0"))
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    c = (c ^ b) - rot(b, 14) & mask
    a = (a ^ c) - rot(c, 11) & mask
    b = (b ^ a) - rot(a, 25) & mask
    c = (c ^ b) - rot(b, 16) & mask
    a = (a ^ c) - rot(c, 4) & mask
    b = (b ^ a) - rot(a, 14) & mask
    return (c ^ b) - rot(b, 24) & mask


def summed(data):
    return data + struct.pack("<I", lookup3(data))


def header(*messages):
    """An object header of (type, data) messages."""
    body = b"".join(struct.pack("<BHB", kind, len(data), 0) + data for kind, data in messages)
    return summed(b"OHDR\2\1" + struct.pack("<H", len(body)) + body)


def hdf5(link, *objects):
    """A file whose root group has one link, and the further bytes behind the root group."""
    root = header((2, b"\0\0" + UNDEFINED * 2), (10, b"\0\0"), (6, link))
    size = 48 + len(root) + sum(map(len, objects))
    first = b"\x89HDF\r\n\x1a\n\2\x08\x08\0" + struct.pack("<Q8sQQ", 0, UNDEFINED, size, 48)
    return summed(first) + root + b"".join(objects)


def hard_link(name, address):
    return b"\1\0" + bytes([len(name)]) + name + struct.pack("<Q", address)


def external_link(file, path):
    told = b"\0" + file + b"\0" + path + b"\0"
    return hdf5(b"\1\x08\x40\x05whole" + struct.pack("<H", len(told)) + told)


def dataset(layout, *further):
    """A dataset of 1024 bytes under the root group, behind which its helpers begin at `at`."""
    link = hard_link(b"whole", 0)
    at = 48 + len(header((2, b"\0\0" + UNDEFINED * 2), (10, b"\0\0"), (6, link)))
    space = (1, b"\2\1\0\1" + struct.pack("<Q", 1024))
    kind = (3, b"\x10\0\0\0" + struct.pack("<IHH", 1, 0, 8))
    fill = (5, b"\3\x0a")

    def whole(heap):
        messages = [space, kind, fill, *(each(heap) for each in further), layout(heap)]
        return header(*messages)

    return at, link[:-8] + struct.pack("<Q", at), whole, at + len(whole(0))


def external_dataset(file):
    """The raw data lie in another file."""
    def slots(heap):
        slot = struct.pack("<QQQ", 8, 0, 1024)
        return 7, struct.pack("<B3xHHQ", 1, 1, 1, heap) + slot

    at, link, whole, heap = dataset(lambda _: (8, b"\3\1" + UNDEFINED + struct.pack("<Q", 1024)),
                                    slots)
    names = (bytes(8) + file + b"\0").ljust(64, b"\0")
    local = b"HEAP\0\0\0\0" + struct.pack("<QQQ", 64, 1, heap + 32) + names
    return hdf5(link, whole(heap), local)


def virtual_dataset(file):
    """The data are parts of datasets of another file."""
    at, link, whole, heap = dataset(lambda heap: (8, b"\4\3" + struct.pack("<QI", heap, 1)))
    everything = struct.pack("<III", 3, 1, 0) + struct.pack("<I", 0)
    block = summed(b"\0" + struct.pack("<Q", 1) + file + b"\0/data\0" + everything * 2)
    stored = struct.pack("<HHIQ", 1, 1, 0, len(block)) + block + bytes(-len(block) % 8)
    rest = 4096 - 16 - len(stored)
    collection = b"GCOL\1\0\0\0" + struct.pack("<Q", 4096) + stored
    collection += struct.pack("<HHIQ", 0, 0, 0, rest) + bytes(rest - 16)
    return hdf5(link, whole(heap), collection)


# ---- the tests -----------------------------------------------------------------------------------


def others(secret):
    """Name → the bytes of a file that names another one."""
    return {
        "external link": external_link(bytes(secret), b"/whole"),
        "external link to a device": external_link(b"/dev/zero", b"/whole"),
        "external dataset": external_dataset(bytes(secret)),
        "virtual dataset": virtual_dataset(bytes(secret)),
    }


class Folder(ProgramCase):
    def setUp(self):
        super().setUp()
        self.folder = self.place / "golden"
        self.run_program(0, "golden", "--out", self.folder, "--topology", "dp=2,stage=1",
                         "--steps", "1", "--quiet")
        self.secret = self.place / "secret"
        self.secret.write_bytes(b"s" * 1024)

    def replaced(self, content):
        (self.folder / "golden.h5").write_bytes(content)


class GoldenHostile(Folder):
    def differs(self, status=1):
        """--check says no, within limits."""
        before = sorted((path, path.lstat().st_size, path.lstat().st_mtime_ns)
                        for path in self.place.rglob("*"))
        result = Outcome(["golden", "--check", self.folder, "--json"], self.place)
        self.assertEqual(result.status, status, result)
        self.assertLess(result.seconds, SECONDS, result)
        self.assertLess(result.kilobytes, KILOBYTES, result)
        self.assertIn("golden.h5", result.out)
        after = sorted((path, path.lstat().st_size, path.lstat().st_mtime_ns)
                       for path in self.place.rglob("*"))
        self.assertEqual(before, after)
        if status == 1:
            told = [json.loads(line) for line in result.out.splitlines() if line[:1] == "{"]
            self.assertEqual(told[-1]["list"], [{"file": "golden.h5", "is": "different"}])

    def test_the_folder_itself_is_equal(self):
        self.assertEqual(Outcome(["golden", "--check", self.folder], self.place).status, 0)

    def test_files_that_name_other_files(self):
        for name, content in others(self.secret).items():
            with self.subTest(name):
                self.replaced(content)
                self.differs()

    def test_hostile_bytes_of_the_right_size(self):
        """So that it is the bytes that tell, and not the size alone."""
        size = (self.folder / "golden.h5").stat().st_size
        for name, content in others(self.secret).items():
            with self.subTest(name):
                self.replaced(content.ljust(size, b"\0"))
                self.differs()

    def test_hole_of_3_gib(self):
        os.truncate(self.folder / "golden.h5", 3 << 30)
        self.differs()

    def test_empty(self):
        self.replaced(b"")
        self.differs()

    def test_no_regular_file(self):
        for kind in ("fifo", "device", "socket", "dangling", "loop"):
            with self.subTest(kind):
                (self.folder / "golden.h5").unlink()
                place_special(self.folder / "golden.h5", kind)
                self.differs(2)


class Traced(TracedCase, Folder):
    """What a check opens outside the golden folder, or for writing, and what it starts."""

    def opened(self):
        lines = traced(self.place / "trace", [CONFIG.program, "golden", "--check", self.folder],
                       cwd=self.place)
        found = []
        for number, line in enumerate(lines):
            if re.search(r"\b(execve|v?fork|socket|connect|clone3?)\(", line):
                found += [line] if number > 0 and "CLONE_THREAD" not in line else []
            named = re.search(r'open\w*\([^"]*"([^"]*)", (.*)\) = \d', line)
            if named is None:
                continue
            path, flags = named.groups()
            ours = path.startswith(str(self.folder))
            if re.search("O_WRONLY|O_RDWR|O_CREAT", flags) or not (
                    ours or path.startswith(SYSTEM) or "O_DIRECTORY" in flags):
                found.append(line)
        return found

    def test_the_folder_itself(self):
        self.assertEqual(self.opened(), [])

    def test_files_that_name_other_files(self):
        size = (self.folder / "golden.h5").stat().st_size
        for name, content in others(self.secret).items():
            for padded in (content, content.ljust(size, b"\0")):
                with self.subTest(name, bytes=len(padded)):
                    self.replaced(padded)
                    self.assertEqual(self.opened(), [])

    def test_plugins_of_the_environment_are_not_loaded(self):
        """HDF5_PLUGIN_PATH names a folder of shared libraries."""
        (self.place / "plugins").mkdir()
        os.environ["HDF5_PLUGIN_PATH"] = str(self.place / "plugins")
        self.addCleanup(os.environ.pop, "HDF5_PLUGIN_PATH")
        self.replaced(external_link(bytes(self.secret), b"/whole"))
        self.assertEqual(self.opened(), [])


def main():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    outcome, seconds = run_tests(__doc__)
    print(f"golden_hostile.py: {outcome.testsRun} tests, {seconds:.1f} s")
    return status_of(outcome)


if __name__ == "__main__":
    sys.exit(main())
