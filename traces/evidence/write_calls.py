"""E3: torch.save over an earlier checkpoint, as system calls.

    write_calls.py FOLDER            saves FOLDER/pytorch_model.bin twice, the second time under strace
    write_calls.py FOLDER save       the save alone

How: the final name is opened with O_TRUNC: the old file is gone before the new one is there; and
nothing is made durable. 77 where strace cannot trace.
"""
import os
import re
import shutil
import subprocess
import sys

import torch
from world import FOLDER, say

PATH = os.path.join(FOLDER, "pytorch_model.bin")


def main():
    torch.save({"weight": torch.ones(64, 64)}, PATH)
    if sys.argv[2:] == ["save"]:
        return
    log = os.path.join(FOLDER, "calls")
    calls = "openat,write,writev,pwrite64,fsync,fdatasync,rename,renameat,renameat2"
    if not shutil.which("strace") or subprocess.call(
            ["strace", "-f", "-qq", "-y", "-o", log, "-e", "trace=" + calls, sys.executable, "-B",
             __file__, FOLDER, "save"]):
        print("strace cannot trace here")
        sys.exit(77)
    with open(log) as file:
        lines = [line for line in file if PATH in line]
    opened = [line for line in lines if "openat(" in line and "O_TRUNC" in line]
    count = {call: sum(f" {call}(" in line for line in lines) for call in calls.split(",")}
    flags = re.search(r"O_WRONLY[A-Z_|]*", opened[0]).group() if opened else "no O_TRUNC"
    synced = count["fsync"] + count["fdatasync"]
    renamed = count["rename"] + count["renameat"] + count["renameat2"]
    say(opened and not synced and not renamed,
        f"torch.save opens the final name with {flags}; {count['write'] + count['writev']} writes, "
        f"{synced} fsync, {renamed} rename")


if __name__ == "__main__":
    main()
