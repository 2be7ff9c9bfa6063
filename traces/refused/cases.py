"""The corpus: every row of every family. `python3 cases.py` prints them as a table.

Python's standard library only. Not verified here: that the rows are refused; tests/
refused_corpus.py does it.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import folder_rows  # noqa: E402
import manifest_rows  # noqa: E402
import pickle_rows  # noqa: E402
import safetensors_rows  # noqa: E402
import sound_rows  # noqa: E402
import tensor_rows  # noqa: E402
import zip_rows  # noqa: E402

FAMILIES = (zip_rows, pickle_rows, tensor_rows, safetensors_rows, manifest_rows, folder_rows,
            sound_rows)


def rows():
    found = [row for family in FAMILIES for row in family.rows()]
    twice = [name for name, count in Counter(row.name for row in found).items() if count > 1]
    assert not twice, twice
    return found


def families():
    """Family → number of rows."""
    return Counter(row.name.split(".")[0] for row in rows())


if __name__ == "__main__":
    for each in rows():
        print(f"{each.name}\t{each.code or 'accepted'}\t{each.threat}\t{each.rule}")
    print(", ".join(f"{count} {family}" for family, count in families().items()))
