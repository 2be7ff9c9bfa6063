"""What tests/doctor.py and its parts share: one diagnosis, and how it is judged.

Python's standard library only. Not verified here: anything.
"""

import json
import shutil

from program_case import ProgramCase

FIGURES = {"clean": 0, "found": 0, "bytes read": 0}


class Case(ProgramCase):
    def doctor(self, status, *arguments):
        """The findings, the whole object."""
        result = self.run_program(status, "doctor", *arguments, "--json")
        told = json.loads(result.stdout.splitlines()[-1])
        self.assertEqual(status == 1, bool(told["findings"]))
        return told["findings"], told

    def well(self, *arguments):
        findings, told = self.doctor(0, *arguments)
        FIGURES["clean"] += 1
        self.assertIsNone(told["verdict"])
        return told

    def ill(self, rule, *arguments, grade="PROVEN", alone=True, words=()):
        findings, _ = self.doctor(1, *arguments)
        rules = [(each["rule"], each["grade"]) for each in findings]
        self.assertIn((rule, grade), rules)
        if alone:
            self.assertEqual({each["rule"] for each in findings}, {rule}, findings)
        for finding in findings:
            for part in ("found", "proof", "fault", "safe", "next"):
                self.assertTrue(finding[part], (part, finding))
            self.assertTrue(finding["file"], finding)
        text = json.dumps(findings)
        for word in words:
            self.assertIn(word, text)
        FIGURES["found"] += 1
        return findings

    def copy(self, name="z1_bf16_dp2", inside="ckpt"):
        """A copy of a recording, and its tag folder."""
        target = self.place / "source"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.recorded(name, inside), target)
        pointer = "latest" if inside == "ckpt" else "latest_universal"
        return target, target / (target / pointer).read_text().strip()

    def resharded(self, name, to="dp=12"):
        out = self.place / "out"
        shutil.rmtree(out, ignore_errors=True)
        self.run_program(0, "reshard", self.recorded(name), out, "--to", to, "--quiet")
        tag = out / (out / "latest").read_text().strip()
        for paper in ("MANIFEST.json", "certificate.json"):
            (tag / paper).unlink()
        return out, tag
