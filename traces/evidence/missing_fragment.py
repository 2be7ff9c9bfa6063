"""E9: of three fragments of a parameter the middle one is gone; the other two are joined.

A parameter of 24 elements on three ranks, ZeRO stage 1, saved by DeepSpeed and cut into fragments by
its own `extract_zero_shards`. The fragment of rank 1 is then deleted, and `_merge_zero_shards` asked.
FOLDER/save lacks rank 1's optimizer file in the end: the same loss, one step earlier.

How: `_merge_zero_shards` (checkpoint/ds_to_universal.py) takes what a pattern finds.
"""
import os

import torch
from world import FOLDER, engine_of, first_line, named, run_ranks, say, to_universal

SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def job(rank):
    engine_of(named("weight", 24), rank, 3).save_checkpoint(os.path.join(FOLDER, "save"), "saved")


def main():
    run_ranks(job, 3)
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.checkpoint.deepspeed_checkpoint import DeepSpeedCheckpoint
    checkpoint, fragments = DeepSpeedCheckpoint(f"{FOLDER}/save/saved"), FOLDER + "/fragments"
    ds_to_universal._inject_missing_state(checkpoint)
    for rank in range(3):
        ds_to_universal.extract_zero_shards(fragments, checkpoint, (0, 0, rank))
    whole = ds_to_universal._merge_zero_shards(fragments + "/weight", "fp32", 1)[0].numel()
    os.remove(fragments + "/weight/0/fp32.01")
    found = ds_to_universal._merge_zero_shards(fragments + "/weight", "fp32", 1)[0].numel()
    try:
        ds_to_universal._merge_zero_shards(fragments + "/weight", "fp32", 1, [torch.Size([24])])
        shaped = "joins them, too"
    except Exception as error:
        shaped = first_line(error)
    os.remove(f"{FOLDER}/save/saved/{SHARD}")
    ended = "it ends well"
    try:
        to_universal(f"{FOLDER}/save/saved", FOLDER + "/universal")
    except Exception as error:
        ended = first_line(error)
    say((whole, found) == (24, 16), f"_merge_zero_shards joins {found} of {whole} elements without "
        f"an error; with a shape: {shaped}; ds_to_universal without {SHARD}: {ended}",
        save=FOLDER + "/save", shard=SHARD)


if __name__ == "__main__":
    main()
