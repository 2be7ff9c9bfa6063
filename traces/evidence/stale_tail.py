"""E11: DeepSpeed's FastFileWriter writes a checkpoint over a longer one of the same name.

The file is opened without O_TRUNC: what the new bytes do not cover stays, and the last bytes, fewer
than the alignment, are appended behind it. Two overwrites by the real class, in FOLDER/cut and
FOLDER/appended: once where the archive's length is a multiple of the alignment (by tensors of just
that size), once where it is not. The old save holds a longer list beside its
tensors (what a data sampler has seen, say); its values are 1.0, those of the new one 2.0.

The asynchronous I/O handle, which needs libaio, is stood in by os.pwrite; nothing else is.
How: flags in `FastFileWriter.__init__`, mode 'ab' in `_unaligned_drain` (io/fast_file_writer.py).
"""
import io
import mmap
import os
import zipfile

import torch
from world import FOLDER, deepspeed, first_line, say

ALIGNMENT, SEEN = 4096, 30_000


class Handle:
    """What FastFileWriter asks of DeepSpeed's aio_handle."""

    def get_alignment(self):
        return ALIGNMENT

    def async_pwrite(self, tensor, fd, offset):
        aligned = mmap.mmap(-1, tensor.numel())
        aligned.write(tensor.numpy().tobytes())
        return 0 if os.pwrite(fd, aligned, offset) == tensor.numel() else 1

    def wait(self):
        return 1


def save(state, path):
    from deepspeed.io import FastFileWriter, FastFileWriterConfig
    buffer = torch.zeros(64 * ALIGNMENT, dtype=torch.uint8)
    writer = FastFileWriter(path, FastFileWriterConfig(Handle(), buffer))
    torch.save(state, writer)
    writer.close()


def state_of(value, first, tensors, seen=0):
    """`first` elements in the first tensor, 256 in each other, and a list of so many numbers."""
    return {"seen": list(range(seen)), **{f"layer{i:02}": torch.full(
        (first if i == 0 else 256,), value) for i in range(tensors)}}


def length_of(first, tensors):
    held = io.BytesIO()
    torch.save(state_of(2.0, first, tensors), held)
    return len(held.getvalue())


def aligned_sizes():
    """(first, tensors) whose archive's length is a multiple of the alignment."""
    for tensors in range(2, 66):
        if length_of(512, tensors) % 64 == 0:
            return next((first, tensors) for first in range(512, 1537, 16)
                        if length_of(first, tensors) % ALIGNMENT == 0)
    raise AssertionError("no archive has such a length")


def overwrite(name, first, tensors):
    folder = os.path.join(FOLDER, name)
    os.makedirs(folder)
    path = os.path.join(folder, "pytorch_model.bin")
    save(state_of(1.0, first, tensors, SEEN), path)
    old = os.path.getsize(path)
    save(state_of(2.0, first, tensors), path)
    size, new = os.path.getsize(path), length_of(first, tensors)
    try:
        found = torch.load(path, weights_only=True)
        new_list, tensors = len(found.pop("seen")) == 0, found.values()
        stale = sum(bool((tensor == 1.0).all()) for tensor in tensors)
        loads = f"torch.load says nothing, and gives the {'new' if new_list else 'old'} list with " \
            f"{stale} of {len(tensors)} tensors of the old save"
    except Exception as error:
        loads = f"torch.load: {first_line(error)}"
    try:
        with zipfile.ZipFile(path) as archive:
            crc = archive.testzip() or "nothing"
    except Exception as error:
        crc = first_line(error)
    return size != new, f"{name}: {new:,} bytes saved over {old:,} give a file of {size:,}; {loads}; " \
        f"zipfile finds {crc}"


def main():
    deepspeed()
    from deepspeed.io import fast_file_writer
    fast_file_writer.UtilsBuilder = lambda: type("", (), {"load": lambda self: type(
        "", (), {"cast_to_byte_tensor": None})})()  # compiled, and not called by torch.save
    first, tensors = aligned_sizes()
    cases = [overwrite("cut", first, tensors), overwrite("appended", first + 200, tensors)]
    say(all(wrong for wrong, _ in cases), "; ".join(text for _, text in cases),
        files=[os.path.join(FOLDER, name, "pytorch_model.bin") for name in ("cut", "appended")])


if __name__ == "__main__":
    main()
