"""E12: save_checkpoint says True, and the checkpoint is not there.

    swallowed_error.py FOLDER [decoupled]

Two ways. DecoupledCheckpointEngine: its writer process has been killed; `save` returns. What commits
comes later and raises, or is only logged where the run ends with this save. And the folder of the tag
cannot be made (a file is in its place): `_create_checkpoint_file` catches the OSError and returns
False, which no caller looks at; torch.save then complains of something else.
"""
import os
import subprocess
import sys

import torch
from world import FOLDER, engine_of, first_line, say

SAVE = os.path.join(FOLDER, "save")


def decoupled():
    """A whole run, whose last lines are a save and the end of the script."""
    os.environ.update(CROSS_SIZE="1", CROSS_RANK="0", LOCAL_SIZE="1")  # as DeepSpeed's launcher does
    engine = engine_of(torch.nn.Linear(4, 3), checkpoint={"writer": {
        "type": "PYTHON", "decoupled": True, "data_parallel": "REPLICA"}})
    writer = engine.checkpoint_engine.ckpt_process
    writer.kill()
    writer.join()
    print("save_checkpoint returned", engine.save_checkpoint(SAVE, "saved"), flush=True)


def folder_in_the_way():
    with open(os.path.join(FOLDER, "blocked"), "w"):
        pass
    engine = engine_of(torch.nn.Linear(4, 3))
    made = engine._create_checkpoint_file(FOLDER, "blocked/tag", False)
    try:
        return made, f"returns {engine.save_checkpoint(FOLDER, 'blocked/tag')}"
    except Exception as error:
        return made, first_line(error)


def main():
    done = subprocess.run([sys.executable, "-B", __file__, FOLDER, "decoupled"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    written = sorted(os.listdir(os.path.join(SAVE, "saved"))) if os.path.isdir(
        os.path.join(SAVE, "saved")) else []
    files = [name for name in written if name.endswith(".pt")]
    true = "save_checkpoint returned True" in done.stdout
    logged = [line for line in done.stdout.splitlines() if "during commit" in line]
    made, told = folder_in_the_way()
    say(true and not files and made is False,
        f"dead writer: save_checkpoint returns {true}, {len(files)} files are written, the script's "
        f"exit status is {done.returncode}" + (", a warning is logged" if logged else "") +
        f"; folder that cannot be made: _create_checkpoint_file returns {made}, and save_checkpoint: "
        f"{told}", save=SAVE, status=done.returncode)


if __name__ == "__main__":
    decoupled() if sys.argv[2:] == ["decoupled"] else main()
