"""E10: archives that no torch.save writes, given to torch.load(weights_only=True).

    odd_archives.py FOLDER      loads every FOLDER/NAME.bin, and says what became of it

Each holds one tensor `w` of four floats, -1, -0.5, 0 and 0.5, and one trick; `sound` has none.
"""
import glob
import os

import torch
from world import FOLDER, say

TRUE = [-1.0, -0.5, 0.0, 0.5]


def main():
    outcomes = {}
    for path in sorted(glob.glob(os.path.join(FOLDER, "*.bin"))):
        name = os.path.basename(path)[:-4]
        try:
            found = torch.load(path, weights_only=True)["w"].tolist()
            outcomes[name] = "loaded" if found == TRUE else "loaded, other values"
        except Exception:
            outcomes[name] = "refused"
    wrong = [name for name, word in outcomes.items() if word == "loaded, other values"]
    loaded = [name for name, word in outcomes.items() if word == "loaded"]
    refused = [name for name, word in outcomes.items() if word == "refused"]
    say(wrong and outcomes.get("sound") == "loaded",
        f"torch.load of {len(outcomes) - 1} odd archives, silently: other values in {len(wrong)} "
        f"({', '.join(wrong)}), loaded {len(loaded) - 1} ("
        f"{', '.join(name for name in loaded if name != 'sound')}); refused: {', '.join(refused)}",
        outcomes=outcomes)


if __name__ == "__main__":
    main()
