"""E1: a rank dies while it writes its shard; `latest` names the torn checkpoint all the same.

Two ranks, bf16, ZeRO stage 1. The first save is whole. In the second, rank 1's torch.save writes
through a file that kills the process (SIGKILL) after a few bytes: a power cut, an out-of-memory
kill. FOLDER/save is left as it is then, and loaded again by two fresh ranks.

How: `save_checkpoint` (runtime/engine.py) writes `latest` on rank 0 before its only barrier.
"""
import os
import signal

import torch
from world import FOLDER, engine_of, first_line, run_ranks, say, train

SAVE = os.path.join(FOLDER, "save")
SHARD = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


class DyingFile:
    """Takes what torch.save writes; behind `left` bytes the process is killed."""

    def __init__(self, path, left):
        self.file, self.left = open(path, "wb", buffering=0), left

    def write(self, data):
        written = self.file.write(bytes(data)[:self.left])
        self.left -= written
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def flush(self):
        pass


def job(rank):
    torch.manual_seed(1)
    engine = engine_of(torch.nn.Linear(4, 3), rank, 2, bf16={"enabled": True})
    engine.save_checkpoint(SAVE)
    train(engine, 1)
    if rank == 1:
        write = torch.save
        torch.save = lambda value, path, **how: write(value, DyingFile(path, 9), **how)
    engine.save_checkpoint(SAVE)


def reload(rank):
    engine = engine_of(torch.nn.Linear(4, 3), rank, 2, 0, "again", bf16={"enabled": True})
    try:
        engine.load_checkpoint(SAVE)
    except Exception as error:
        with open(os.path.join(FOLDER, f"reload{rank}"), "w") as file:
            file.write(first_line(error))
        os._exit(1)


if __name__ == "__main__":
    ends = run_ranks(job, 2)
    with open(os.path.join(SAVE, "latest")) as file:
        latest = file.read()
    size = os.path.getsize(os.path.join(SAVE, "global_step2", SHARD))
    whole = os.path.getsize(os.path.join(SAVE, "global_step1", SHARD))
    again = run_ranks(reload, 2)
    message = ""
    for rank in (1, 0):
        path = os.path.join(FOLDER, f"reload{rank}")
        if os.path.exists(path):
            with open(path) as file:
                message = message or f"rank {rank}: {file.read()}"
    say(latest == "global_step2" and size < whole and any(again) and ends[1] == -signal.SIGKILL,
        f"latest = {latest}, {SHARD} there holds {size} of {whole} bytes; load_checkpoint: "
        f"{message or 'ends well'}", save=SAVE, shard=SHARD)
