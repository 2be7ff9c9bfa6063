#!/usr/bin/env python3
"""tests/only.py PROGRAM TRACES: --only REGEX selects parameters and buffers by name.

One digest of a selection over all forms of a checkpoint; an fp32 file of a selection holds that
alone, and the certificate names the rest; tied names stay together; what cannot be cut is refused.
"""

import sys

from program_case import ProgramCase, run_tests


class Only(ProgramCase):
    def digest(self, source, *only):
        lines = self.run_program(0, "digest", source, *only).stdout.splitlines()
        return lines[0].split()[0], [line for line in lines if line.startswith("absent")]

    def test_one_digest_over_all_forms(self):
        forms = [self.recorded("z2_bf16_dp4"), self.recorded("z2_bf16_dp4", "universal")]
        for form in forms:
            root, absent = self.digest(form, "--only", "blocks.1")
            self.assertEqual(root, self.digest(forms[0], "--only", r"^blocks\.1\.")[0])
            self.assertNotEqual(root, self.digest(forms[0], "--only", "blocks.0")[0])
            self.assertNotEqual(root, self.digest(forms[0])[0])
            self.assertIn("absent: some names only were asked for  hyper", absent)

    def test_fp32_of_a_selection(self):
        source, out = self.recorded("z2_bf16_dp4"), self.place / "out"
        self.run_program(0, "convert", source, out, "--to", "fp32", "--only", "head|running")
        header, _ = self.safetensors(out)
        self.assertEqual(header.pop("__metadata__")["alias:head.weight"], "embed.weight")
        self.assertEqual(set(header), {"embed.weight", "running"})
        skipped = self.certificate(out)["skipped"]
        self.assertIn('"count": not asked for by --only', skipped)
        self.assertEqual(len(skipped), 12)
        self.assertTrue(self.run_program(0, "verify", out).stdout.startswith("VERIFIED"))

    def test_what_cannot_be_selected(self):
        source, out = self.recorded("z2_bf16_dp4"), self.place / "out"
        for arguments in (
            ["convert", source, out, "--to", "universal", "--only", "head"],
            ["convert", source, out, "--to", "fp32", "--only", "no such name"],
            ["convert", source, out, "--to", "fp32", "--only", "("],
            ["reshard", source, out, "--to", "dp=2", "--only", "head"],
            ["verify", source, "--only", "head"],
        ):
            self.run_program(2, *arguments)
            self.assertFalse(out.exists())


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
