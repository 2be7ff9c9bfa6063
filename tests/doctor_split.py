"""Files whose end was appended behind an older one (E11 of docs/EVIDENCE.md): `isoshard doctor`.

A part of tests/doctor.py. Python's standard library only. Not verified: blocks of other sizes than
a few sectors or a power of two up to 1 MiB; files of more than 1 GiB.
"""

import json
import re

import doctor_faults as faults
from doctor_case import Case


class Split(Case):
    RECORDINGS = ("z0_bf16_dp2", "z1_bf16_dp2", "z2_bf16_dp4", "z3_bf16_dp2_frozen")

    def test_an_end_that_was_appended_to_the_older_file(self):
        """E11: blocks are written over the older file, of any length; what fills none goes behind
        its end."""
        grades = set()
        for name in self.RECORDINGS:
            for each in sorted(path.name for path in self.copy(name)[1].glob("*.pt")):
                source, tag = self.copy(name)
                path, new = tag / each, (tag / each).read_bytes()
                for old in (faults.other_save(path), faults.other_save(path, 4096), new,
                            bytes(len(new))):
                    for block in (512, 1536, 4096):
                        if len(new) < block:
                            continue
                        with self.subTest(recording=name, file=each, block=block, old=len(old)):
                            path.write_bytes(old)
                            faults.append_end(path, new, block)
                            # Proven where the older file is broken, and its end record is there.
                            front = len(new) // block * block
                            broken = path.read_bytes()[: len(old)] not in (old, new)
                            proven = broken and any(old) and len(old) - 22 >= front
                            grade = "PROVEN" if proven else "SUSPECT"
                            grades.add(grade)
                            found = self.ill("stale-tail", source, grade=grade,
                                             words=(each, "two pieces"))
                            front, back = map(int, re.search(r"head -c (\d+), then tail -c (\d+)",
                                                             found[0]["next"]).groups())
                            data = path.read_bytes()
                            self.assertEqual(data[:front] + data[-back:], new)
        self.assertEqual(grades, {"PROVEN", "SUSPECT"})

    def test_an_end_that_does_not_fit_is_not_called_so(self):
        source, tag = self.copy()
        path = sorted(tag.glob("*optim*"))[1]
        new = path.read_bytes()
        for at in (64, len(new) // 512 * 512, len(new) - 200, len(new) - 60, len(new) - 6):
            with self.subTest(at=at):
                faults.append_end(path, new[:at] + bytes([new[at] ^ 1]) + new[at + 1:], 512)
                told = self.doctor(1, source)[0]
                self.assertNotIn("two pieces", json.dumps(told))
                path.write_bytes(new)
