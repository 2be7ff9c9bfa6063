"""E8: a parameter named `layer[0].weight`: ds_to_universal finds none of its own fragments.

Trained and saved by DeepSpeed on one rank; then its converter, and its `_merge_zero_shards` on two
fragments written by its own `dump_param_fragment`. The converter ends well, and the parameter's
moments and step are not in what it has written.

How: `_merge_zero_shards` (checkpoint/ds_to_universal.py) puts the name unescaped into a pattern of
glob and a regular expression.
"""
import os

import torch
from world import FOLDER, engine_of, first_line, named, say, to_universal

NAME = "layer[0].weight"


def main():
    model = named(NAME, 24)
    model._parameters["plain"] = torch.nn.Parameter(torch.ones(8))
    model.forward = lambda x: sum((p * x).sum() for p in model._parameters.values())
    engine_of(model).save_checkpoint(os.path.join(FOLDER, "save"), "saved")
    from deepspeed.checkpoint import ds_to_universal
    for rank in range(2):
        ds_to_universal.dump_param_fragment(FOLDER + "/fragments", 0, rank, "fp32", torch.ones(12),
                                            NAME, 0, 12)
    merged = ds_to_universal._merge_zero_shards(f"{FOLDER}/fragments/{NAME}", "fp32", 1)
    ended = "it ends well"
    try:
        to_universal(f"{FOLDER}/save/saved", FOLDER + "/universal")
    except Exception as error:
        ended = first_line(error)
    states = sorted(os.listdir(f"{FOLDER}/universal/zero/{NAME}"))
    lost = sorted({"exp_avg.pt", "exp_avg_sq.pt", "step.pt"} - set(states))
    say(merged == [] and lost, f"_merge_zero_shards of two fragments of {NAME} returns {merged}; "
        f"ds_to_universal: {ended}, and leaves {', '.join(lost) or 'nothing'} out",
        save=FOLDER + "/save", universal=FOLDER + "/universal")


if __name__ == "__main__":
    main()
