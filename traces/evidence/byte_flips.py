"""E2: every byte of a torch.save file turned over (XOR 0xFF), then torch.load(weights_only=True).

    byte_flips.py FOLDER [EVERY]

Of two tensors, 16,412 bytes of payload. Loaded, and other tensors than were saved: silent. Loaded
and the same: harmless. Anything raised: an error. EVERY: each so-manieth byte alone.

How: torch is built without miniz's check of the CRCs, which are in the file.
"""
import io
import os
import sys
import time
import zipfile

import torch
from world import FOLDER, say


def bits(state):
    return [(name, tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy()
             .tobytes()) for name, tensor in state.items()]


def outcome(data, expected):
    try:
        return "harmless" if bits(torch.load(io.BytesIO(data), weights_only=True)) == expected \
            else "silent"
    except Exception:
        return "error"


def python_sees(data):
    """Does Python's own zipfile find it?"""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.testzip() is not None
    except Exception:
        return True


def main(every):
    torch.manual_seed(1)
    state = {"weight": torch.randn(64, 64), "bias": torch.randn(7)}
    path = os.path.join(FOLDER, "pytorch_model.bin")
    torch.save(state, path)
    with open(path, "rb") as file:
        whole = file.read()
    expected, counts, seen = bits(state), {"silent": 0, "error": 0, "harmless": 0}, 0
    offsets, began = range(0, len(whole), every), time.monotonic()
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset] ^= 0xFF
        word = outcome(bytes(damaged), expected)
        counts[word] += 1
        seen += word == "silent" and every > 1 and python_sees(bytes(damaged))
    share = 100 * counts["silent"] / len(offsets)
    also = f", of which Python's zipfile finds {seen}" if every > 1 else ""
    say(share > 50, f"torch {torch.__version__}: {len(offsets):,} bytes of {len(whole):,} turned "
        f"over, one at a time: {counts['silent']:,} ({share:.1f} %) load silently with other "
        f"tensors{also}; {counts['error']:,} errors, {counts['harmless']:,} harmless "
        f"({time.monotonic() - began:.1f} s)", file=path, **counts)


if __name__ == "__main__":
    main(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
