"""E6: torch.load(weights_only=True) on what DeepSpeed saves.

A model that DeepSpeed trains and saves at stages 0 to 3 on one rank. What torch refuses to load
without running code must be loaded with weights_only=False, which runs whatever a file says.
"""
import glob
import os
import re

import torch
from world import FOLDER, engine_of, say


def main():
    found = {"optimizer": [0, 0], "model": [0, 0]}  # files of the kind, and refused among them
    asked = set()
    for stage in range(4):
        save = os.path.join(FOLDER, f"stage{stage}")
        engine_of(torch.nn.Linear(4, 3), bf16={"enabled": True},
                  zero_optimization={"stage": stage}).save_checkpoint(save)
        for path in glob.glob(os.path.join(save, "*", "*.pt")):
            counts = found["optimizer" if "optim_states" in path else "model"]
            counts[0] += 1
            try:
                torch.load(path, weights_only=True)
            except Exception as error:
                counts[1] += 1
                asked |= set(re.findall(r"GLOBAL ([\w.]+)", str(error)))
    import deepspeed
    unsafe = 0
    for path in glob.glob(os.path.join(os.path.dirname(deepspeed.__file__), "**", "*.py"),
                          recursive=True):
        with open(path, errors="replace") as file:
            unsafe += len(re.findall(r"weights_only=False", file.read()))
    counted = ", ".join(f"{kind} files refused: {bad} of {all_}" for kind, (all_, bad) in found.items())
    say(found["optimizer"][0] == found["optimizer"][1] > 0,
        f"stages 0 to 3, {counted} (they name {', '.join(sorted(asked))}); DeepSpeed's source says "
        f"weights_only=False at {unsafe} places", folder=FOLDER)


if __name__ == "__main__":
    main()
