"""One case of the corpus, and the short ways to make it. Python's standard library only.

  Row    what is tried, why it is dangerous, what must be said of it, and the rule it breaks
  file   a single file of weights           tree   a DeepSpeed checkpoint with one edit
"""

import shutil
import sys
from collections import namedtuple
from pathlib import Path

TRACES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TRACES.parent / "tests"))
import hostile as h  # noqa: E402, F401
from damage_case import place_special  # noqa: E402, F401

# name     "family.what"
# threat   who did this before or what it is after; with the CVE's number where there is one
# code     of the error, as `--json` prints it; "" where the source is sound
# words    a piece of the message: of what, entry, expected or found
# rule     what the source breaks
# make     folder → the SOURCE that it has put into the folder
# to       what `convert` is asked for: universal or fp32
# inspect  whether the headers, which are all that inspect reads, show it
# verdict  of verify; None: the one that belongs to the code
Row = namedtuple("Row", "name threat code words rule make to inspect verdict")

VERDICTS = {
    "corrupt": "CORRUPT",
    "mismatch": "CORRUPT",
    "incomplete": "INCOMPLETE",
    "not_found": "INCOMPLETE",
    "hostile": "HOSTILE",
    "limit": "HOSTILE",
    "": "COMPLETE",
}


def row(name, threat, code, words, rule, make, to="fp32", inspect=True, verdict=None):
    return Row(name, threat, code, words, rule, make, to, inspect, verdict or VERDICTS.get(code))


def file(content, name="pytorch_model.bin"):
    """Makes a file of these bytes, or of what this function returns."""

    def make(folder):
        (folder / name).write_bytes(content() if callable(content) else content)
        return folder / name

    return make


def files(contents):
    """Makes a folder of these files: name → bytes or text."""

    def make(folder):
        source = folder / "model"
        for name, content in contents().items() if callable(contents) else contents.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            content = content.encode() if isinstance(content, str) else content
            (source / name).write_bytes(content)
        return source

    return make


def recorded(name="z1_bf16_dp2", inside="ckpt"):
    return TRACES / "deepspeed" / name / inside


def edited(edit, name="z1_bf16_dp2", inside="ckpt"):
    """A recorded checkpoint whose pickles and payloads an edit(ZeroFolder) has changed."""

    def make(folder):
        checkpoint = h.ZeroFolder(recorded(name, inside))
        edit(checkpoint)
        return checkpoint.write(folder / "source")

    return make


def tree(edit, name="z1_bf16_dp2", inside="ckpt"):
    """A copy of a recorded checkpoint that an edit(folder, tag folder) has changed."""

    def make(folder):
        source = folder / "source"
        shutil.copytree(recorded(name, inside), source)
        pointer = next(source.glob("latest*"))
        edit(source, source / pointer.read_text().strip())
        return source

    return make
