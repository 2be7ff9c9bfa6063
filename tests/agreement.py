#!/usr/bin/env python3
"""tests/agreement.py PROGRAM TRACES: a source that does not agree with itself is not converted.

DeepSpeed's own universal form of a round-robin run swaps 12 of 13 masters; nothing is resharded
from it without --force, and then the certificate says so. A folder of ours that lost its manifest
is refused as unfinished.
"""

import shutil
import sys

import hostile as h
from program_case import ProgramCase, run_tests


class Agreement(ProgramCase):
    def test_deepspeeds_wrong_universal_form(self):
        source, out = self.recorded("z2_rr_dp3", "universal"), self.place / "out"
        refused = self.run_program(2, "reshard", source, out, "--to", "dp=2")
        self.assertIn("in 12 of 13 parameters", refused.stderr)
        self.assertIn("convert it again with isoshard", refused.stderr)
        self.assertEqual(list(self.place.iterdir()), [])
        self.run_program(0, "reshard", source, out, "--to", "dp=2", "--force")
        told = self.certificate(out)["forced"]
        self.assertEqual(len(told), 1)
        self.assertIn("in 12 of 13 parameters", told[0])

    def test_our_universal_form_of_the_same(self):
        source, ours = self.recorded("z2_rr_dp3"), self.place / "u" / "x"
        self.run_program(0, "convert", source, ours, "--to", "universal")
        self.run_program(0, "reshard", ours, self.place / "out", "--to", "dp=2")
        self.assertNotIn("forced", self.certificate(self.place / "out"))

    def test_a_folder_without_its_manifest(self):
        ours = self.place / "u" / "x"
        self.run_program(0, "convert", self.recorded(), ours, "--to", "universal")
        (ours / "MANIFEST.json").unlink()
        refused = self.run_program(2, "reshard", ours, self.place / "out", "--to", "dp=3")
        self.assertIn("MANIFEST.json", refused.stderr)
        self.run_program(0, "reshard", ours, self.place / "out", "--to", "dp=3", "--force")
        self.assertIn("no MANIFEST.json", self.certificate(self.place / "out")["forced"][0])

    def test_a_folder_that_is_not_as_its_manifest_says(self):
        ours = self.place / "u" / "x"
        self.run_program(0, "convert", self.recorded(), ours, "--to", "universal")
        zero = ours / "zero"
        shutil.copy(zero / "blocks.1.norm.bias" / "exp_avg.pt",
                    zero / "blocks.0.norm.bias" / "exp_avg.pt")
        refused = self.run_program(2, "reshard", ours, self.place / "out", "--to", "dp=3")
        self.assertIn("1 file changed since the folder was published", refused.stderr)
        self.run_program(0, "reshard", ours, self.place / "out", "--to", "dp=3", "--force")
        self.assertIn("1 file changed", self.certificate(self.place / "out")["forced"][0])

    def test_weights_of_ours_that_were_damaged(self):
        ours = self.place / "w"
        self.run_program(0, "convert", self.recorded(), ours, "--to", "fp32")
        path = ours / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 64
        path.write_bytes(data)
        refused = self.run_program(2, "convert", ours, self.place / "out", "--to", "fp32")
        self.assertIn("model.safetensors", refused.stderr)

    def test_a_tied_name_whose_frozen_target_was_excluded(self):
        """The save leaves out the first name of a tied frozen weight only (erratum 46)."""
        running = b"h\x10"  # as the pickle names the string that it has met
        for key in (h.text("tied.weight"), running):
            with self.subTest(key=key):
                self.tied_to_a_frozen_name(key, running)

    def root_of_running(self, folder):
        return self.run_program(0, "digest", folder, "--only", "^running$").stdout.split()[0]

    def tied_to_a_frozen_name(self, key, running):
        folder = h.ZeroFolder(self.recorded("z2_bf16_dp4_nofrozen"))
        pair = key + h.text("blocks.0.norm.weight") + b"s"
        for inside, (_, records) in folder.files.items():
            if "model_states" not in inside:
                continue
            data = records["data.pkl"]
            at = data.index(h.text("head.weight"), data.index(b"shared_params"))
            data = data[:at] + pair + data[at:]
            if key == running:  # no buffer any more: then it has bytes of its own
                at = data.index(running, data.index(b"buffer_names"))
                data = data[:at] + data[at + len(running) :]
            records["data.pkl"] = data
        source = folder.write(self.place / "source")
        verdict = self.run_program(0, "verify", source)
        self.assertIn("frozen and was excluded from the save", verdict.stdout)
        for number, to in enumerate((["convert", "fp32"], ["convert", "universal"],
                                     ["reshard", "dp=2"], ["reshard", "dp=2,stage=3"])):
            out = self.place / f"{len(key)}.{number}"
            self.run_program(0, to[0], source, out, "--to", to[1])
            self.run_program(0, "digest", out)
            if key == running:
                self.assertEqual(self.root_of_running(out), self.root_of_running(source), to)


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
