"""E7: a parameter whose name climbs out of the folder: ds_to_universal writes where it points.

Two parameters, one named `../../../../escaped`, the other by an absolute path, are trained and saved
by DeepSpeed. Its converter is then asked for FOLDER/out/made/universal; what it writes outside
FOLDER/out is told.

How: `dump_param_fragment` (checkpoint/ds_to_universal.py) joins folder and name, and makes the path.
"""
import os

import torch
from world import FOLDER, engine_of, first_line, named, say, to_universal

NAMES = ("../../../../escaped", os.path.join(FOLDER, "absolute"))


def main():
    model = named(NAMES[0], 8)
    model._parameters[NAMES[1]] = torch.nn.Parameter(torch.ones(4))
    model.forward = lambda x: sum((p * x).sum() for p in model._parameters.values())
    engine = engine_of(model)
    engine.save_checkpoint(os.path.join(FOLDER, "save"), "saved")
    allowed = os.path.join(FOLDER, "out")
    os.makedirs(os.path.join(allowed, "made"))
    before = {os.path.join(at, name) for at, _, names in os.walk(FOLDER) for name in names}
    ended = "it ends well"
    try:
        to_universal(os.path.join(FOLDER, "save", "saved"),
                     os.path.join(allowed, "made", "universal"))
    except Exception as error:
        ended = first_line(error)
    after = {os.path.join(at, name) for at, _, names in os.walk(FOLDER) for name in names}
    outside = sorted(os.path.relpath(path, FOLDER) for path in after - before
                     if not path.startswith(allowed + os.sep))
    roots = sorted({path.split(os.sep)[0] for path in outside})
    say(len(roots) == 2, f"told to write below out/made/universal, ds_to_universal writes "
        f"{len(outside)} files outside out/, below {' and '.join(roots) or 'nothing'}; {ended}",
        save=os.path.join(FOLDER, "save"))


if __name__ == "__main__":
    main()
