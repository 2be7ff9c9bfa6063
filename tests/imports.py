#!/usr/bin/env python3
"""imports.py PROGRAM: the program itself imports nothing that runs a program or opens a socket.

`nm -D` lists what the dynamic linker must find for PROGRAM. None of it may start a process, load
code or reach the network, so that a pickle or an HDF5 file can bring none of it about through our
own code: what is read is data, which nothing executes (checkpoint/format/pickle.h). What each
library that comes along imports of the same kind is printed, so that a new one is seen. Skipped
(77) where nm is not installed or the program is linked with a sanitizer, which brings its own.

Not verified here: that a library which imports such a function never calls it; tests/
refused_corpus.py and tests/golden_hostile.py look at the calls.
"""

import re
import shutil
import subprocess
import sys

FORBIDDEN = re.compile(
    r"(system|popen|exec(l|lp|le|v|vp|ve|vpe)|fexecve|execveat|posix_spawnp?|v?fork|_Fork|clone|"
    r"dlopen|dlmopen|dlsym|dlvsym|socket|socketpair|connect|bind|listen|accept4?|sendto|recvfrom|"
    r"getaddrinfo|gethostbyname(_r|2)?|res_query|ptrace|wordexp|syscall)$"
)
LIBC = re.compile(r"(libc|ld-linux[\w-]*|linux-vdso)\.so|libpthread\.so|libdl\.so")


def imports(path):
    """Names that the dynamic linker must find elsewhere, without their versions."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True,
                            check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if line.strip()}


def forbidden(path):
    return sorted(name for name in imports(path) if FORBIDDEN.match(name))


def needed(path):
    """Libraries that PROGRAM itself names."""
    listed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True,
                            check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", listed)


def libraries(path):
    """(name, path) of every library that comes along, the C library aside."""
    listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*(\S+) => (/\S+)", listed, re.M)
    return [(name, place) for name, place in found if not LIBC.match(name)]


def main():
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    program = sys.argv[1]
    if not all(map(shutil.which, ("nm", "readelf", "ldd"))):
        print("skipped: nm, readelf or ldd is not installed")
        return 77
    named = imports(program)
    if any(name.startswith(("__asan_", "__tsan_", "__ubsan_")) for name in named):
        print("skipped: a sanitizer's run-time library is linked in")
        return 77
    direct = needed(program)
    for name, place in libraries(program):
        brings = forbidden(place)
        if brings:
            print(f"{name}{'' if name in direct else ' (by another library)'}: {' '.join(brings)}")
    found = forbidden(program)
    if found:
        print(f"FAILED: {program} imports {' '.join(found)}")
        return 1
    print(f"imports.py: {len(named)} imports of the program, none of them forbidden")
    return 0


if __name__ == "__main__":
    sys.exit(main())
