"""E4: torch.save on a full disk, over an earlier good file.

    full_disk.py FOLDER      FOLDER is a file system of 1 MiB (tmpfs)

The first save fits; the second does not. What is told, and what lies under the final name then?
"""
import os

import torch
from world import FOLDER, first_line, say

PATH = os.path.join(FOLDER, "pytorch_model.bin")


def main():
    torch.save({"weight": torch.ones(100_000)}, PATH)
    told = "nothing"
    try:
        torch.save({"weight": torch.ones(1_000_000)}, PATH)
    except Exception as error:
        told = first_line(error)
    size = os.path.getsize(PATH)
    try:
        torch.load(PATH, weights_only=True)
        readable = "can still be loaded"
    except Exception as error:
        readable = "can no longer be loaded"
    says = any(word in told.lower() for word in ("no space", "disk", "enospc"))
    say(readable != "can still be loaded" and not says, f"torch.save says '{told}'; under the final "
        f"name lie {size:,} bytes that {readable}: the good checkpoint is gone, too")


if __name__ == "__main__":
    main()
