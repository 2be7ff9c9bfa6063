#!/usr/bin/env python3
"""tests/agreement.py PROGRAM TRACES: a source that does not agree with itself is not converted.

DeepSpeed's own universal form of a round-robin run swaps 12 of 13 masters; nothing is resharded
from it without --force, and then the certificate says so. A folder of ours that lost its manifest
is refused as unfinished.
"""

import json
import subprocess
import sys

from program_case import CONFIG, ProgramCase, run_tests


class Agreement(ProgramCase):
    def run_program(self, *arguments):
        return subprocess.run(
            [CONFIG.program, *map(str, arguments)], capture_output=True, text=True, check=False
        )

    def test_deepspeeds_wrong_universal_form(self):
        source, out = self.recorded("z2_rr_dp3", "universal"), self.place / "out"
        refused = self.run_program("reshard", source, out, "--to", "dp=2")
        self.assertEqual(refused.returncode, 2, refused)
        self.assertIn("in 12 of 13 parameters", refused.stderr)
        self.assertIn("convert it again with isoshard", refused.stderr)
        self.assertEqual(list(self.place.iterdir()), [])
        forced = self.run_program("reshard", source, out, "--to", "dp=2", "--force")
        self.assertEqual(forced.returncode, 0, forced)
        with open(next(out.glob("*/certificate.json"))) as file:
            told = json.load(file)["forced"]
        self.assertEqual(len(told), 1)
        self.assertIn("in 12 of 13 parameters", told[0])

    def test_our_universal_form_of_the_same(self):
        source, ours = self.recorded("z2_rr_dp3"), self.place / "u" / "x"
        made = self.run_program("convert", source, ours, "--to", "universal")
        self.assertEqual(made.returncode, 0, made)
        again = self.run_program("reshard", ours, self.place / "out", "--to", "dp=2")
        self.assertEqual(again.returncode, 0, again)
        with open(next((self.place / "out").glob("*/certificate.json"))) as file:
            self.assertNotIn("forced", json.load(file))

    def test_a_folder_without_its_manifest(self):
        ours = self.place / "u" / "x"
        made = self.run_program("convert", self.recorded(), ours, "--to", "universal")
        self.assertEqual(made.returncode, 0, made)
        (ours / "MANIFEST.json").unlink()
        refused = self.run_program("reshard", ours, self.place / "out", "--to", "dp=3")
        self.assertEqual(refused.returncode, 2, refused)
        self.assertIn("MANIFEST.json", refused.stderr)
        forced = self.run_program("reshard", ours, self.place / "out", "--to", "dp=3", "--force")
        self.assertEqual(forced.returncode, 0, forced)


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
