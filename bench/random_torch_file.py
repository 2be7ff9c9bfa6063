"""Files of torch.save without torch, with random contents: checkpoints of any size, for tests.

Beside sparse_torch_file.py, whose storages are holes. The lower half of a master's bits is zero, so
that its bfloat16 copy is its upper half. Python's standard library only.

Not verified: anything; random bits are NaN, infinite or denormal as often as chance has it.
"""
import random

import sparse_torch_file as sparse

BLOCK = 1 << 20


class Torch(sparse.Torch):
    """As sparse_torch_file.Torch, with data in every storage."""

    def random(self, numel, rank, kind):
        rolls = random.Random(f"{rank} {kind} {numel}")
        data = bytearray()
        while len(data) < 4 * numel:
            data += rolls.randbytes(min(BLOCK, 4 * numel - len(data)))
        if kind == "fp32":
            data[0::4] = data[1::4] = bytes(numel)
        return sparse.Tensor(sparse.Storage("Float", numel, data), 0, (numel,))

    def zero(self, tensor, begin, end):
        tensor.storage.data[4 * begin:4 * end] = bytes(4 * (end - begin))

    def low_precision(self, tensor):
        """All of the tensor's storage."""
        numel = tensor.storage.numel
        data = bytearray(2 * numel)
        data[0::2], data[1::2] = tensor.storage.data[2::4], tensor.storage.data[3::4]
        return sparse.Tensor(sparse.Storage("BFloat16", numel, data), 0, tensor.shape)

    def join(self, tensors):
        joined = super().join(tensors)
        joined.storage.data = b"".join(tensor.storage.data for tensor in tensors)
        return joined
