"""What the tests of `verify --replicas` share: recordings of which a file is altered, with right
CRCs, and what the program tells of them.

Python's standard library only. Not verified here: anything.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import compare_torch  # noqa: E402
import hostile as h  # noqa: E402
from program_case import ProgramCase  # noqa: E402

OPTIM, MODEL = "optim_states", "model_states"


class Altered:
    """A copy of a recording whose tensors and values can be changed, file by file."""

    def __init__(self, source):
        self.source, self.folder = source, h.ZeroFolder(source)

    def files(self, *parts):
        found = [each for each in sorted(self.folder.files) if all(p in each for p in parts)]
        assert found, parts
        return found

    def place(self, inside, find):
        """(record, byte offset, item size, elements) of the tensor that `find` picks."""
        tensor = find(compare_torch.load(str(self.source / inside)))
        width = compare_torch.ITEM_BYTES[tensor.dtype]
        count = 1
        for size in tensor.shape:
            count *= size
        return "data/" + tensor.storage.key, tensor.offset * width, width, count

    def element(self, inside, find, change, at=0):
        """change(bytes of element `at`) → its new bytes."""
        record, offset, width, _ = self.place(inside, find)
        records = self.folder.files[inside][1]
        data, begin = records[record], offset + at * width
        new = change(data[begin : begin + width])
        assert len(new) == width
        records[record] = data[:begin] + new + data[begin + width :]
        return self

    def whole(self, inside, find):
        """All elements with every byte inverted."""
        record, offset, width, count = self.place(inside, find)
        records = self.folder.files[inside][1]
        data, end = records[record], offset + width * count
        inverted = bytes(255 - byte for byte in data[offset:end])
        records[record] = data[:offset] + inverted + data[end:]
        return self

    def write(self, target):
        return self.folder.write(target)


class Case(ProgramCase):
    def told(self, status, source, *flags):
        """The differences, the verification."""
        result = self.run_program(status, "verify", source, "--json", *flags)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        self.assertEqual(lines[-1]["kind"], "verification")
        for each in lines[:-1]:
            self.assertEqual(each["kind"], "replica")
        return lines[:-1], lines[-1]

    def altered(self, name, inside="ckpt"):
        return Altered(self.recorded(name, inside))

    def found(self, altered, what, status=1, verdict="SUSPECT"):
        """The differences of one kind, after a look at the text form."""
        source = altered.write(self.place / "source")
        differences, verification = self.told(status, source, "--replicas")
        if verdict is not None:
            self.assertEqual(verification["verdict"], verdict, verification["findings"])
        self.run_program(status, "verify", source, "--replicas")
        kind = [each for each in differences if each["what"] == what]
        self.assertTrue(kind, differences)
        self.assertEqual(verification["replicas"][what]["differing"], len(kind))
        return kind

    def alone(self, difference, inside, copies=None):
        """One copy stands alone, and it is that file's."""
        self.assertTrue(difference["majority"], difference)
        self.assertEqual(len(difference["alone"]), 1, difference)
        [contrast] = difference["contrasts"]
        self.assertEqual(contrast["copy"], difference["alone"][0])
        self.assertEqual(contrast["file"], Path(inside).name, difference)
        if copies is not None:
            self.assertEqual(len(difference["copies"]), copies)
        return contrast
