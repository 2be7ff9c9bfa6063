"""E5: `latest` is empty, as a crash between its truncation and its write leaves it.

How: `load_checkpoint` (runtime/engine.py) joins the folder and an empty tag.
"""
import os

import torch
from world import FOLDER, engine_of, first_line, say

SAVE = os.path.join(FOLDER, "save")


def main():
    engine = engine_of(torch.nn.Linear(4, 3))
    engine.save_checkpoint(SAVE)
    with open(os.path.join(SAVE, "latest"), "w"):
        pass
    told, error = "ends well", None
    try:
        told = f"returns {engine.load_checkpoint(SAVE)[0]}"
    except Exception as caught:
        told, error = first_line(caught), caught
    say(error is not None and "latest" not in str(error),
        f"load_checkpoint of a folder with an empty latest: {told}", save=SAVE)


if __name__ == "__main__":
    main()
