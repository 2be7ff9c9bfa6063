#!/usr/bin/env python3
"""tests/replicas_hostile.py PROGRAM TRACES: `verify --replicas` and `--deep` on files that do harm.

Certificates of other forms, words that a terminal would obey, a pickle of few bytes that is many
values; and what --deep reads. Python's standard library only.

Not verified: terminals; what is printed has no character that is not printable.
"""

import hashlib
import json
import resource
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hostile as h  # noqa: E402
from program_case import run_tests  # noqa: E402
from replica_case import MODEL, Case  # noqa: E402


class Hostile(Case):
    """Files that someone has made to do harm."""

    def harmless(self, output):
        """A terminal shows it, and obeys none of it; no line is the file's own."""
        for character in output:
            self.assertTrue(character == "\n" or (character.isprintable()), repr(character))
        verdicts = [line for line in output.splitlines() if line.startswith("VERIFIED")]
        self.assertEqual(verdicts, [])

    def test_client_state_that_a_terminal_would_obey(self):
        for evil in ("\u202e\u009b2J\x7f", "x" + 300 * "\u00e9", 99 * "a" + 60 * "\u00e9"):
            with self.subTest(evil=evil):
                altered = self.altered("z3_bf16_dp3")
                altered.folder.set_after("epoch", h.text(evil), only=altered.files(MODEL)[1])
                source = altered.write(self.place / "source")
                self.harmless(self.run_program(0, "verify", source, "--replicas").stdout)

    def test_names_that_a_terminal_would_obey(self):
        evil = "k\x1b[2J\nVERIFIED  all of it" + 120 * "\u00e9"
        altered = self.altered("z3_bf16_dp3")
        for number, each in enumerate(altered.files(MODEL)):
            schedule = h.mapping([(h.text(evil), h.text(evil + str(number)))])
            altered.folder.set_after("lr_scheduler", schedule, only=each)
        self.found(altered, "values of ranks", verdict=None)
        self.harmless(self.run_program(1, "verify", self.place / "source", "--replicas").stdout)

    def test_few_bytes_that_are_many_values(self):
        """70 long keys hold one dictionary of 70 long keys, which hold one list of 100 numbers."""
        altered = self.altered("z3_bf16_dp3")
        for each in altered.files(MODEL):
            slot = h.free_memo(altered.folder.files[each][1]["data.pkl"])
            shared = h.EMPTY_LIST + h.MARK + 100 * h.integer(1) + h.APPENDS
            for level in range(2):
                place = struct.pack("<I", slot + level)
                pairs = [(h.text(f"{key:03}" + 180 * "k"), b"j" + place) for key in range(1, 70)]
                shared = h.mapping([(h.text("000"), shared + b"r" + place), *pairs])
            altered.folder.insert("universal_checkpoint_info", shared, only=each)
            self.assertLess(len(altered.folder.files[each][1]["data.pkl"]), 50_000)
        source = altered.write(self.place / "source")
        result = self.run_program(
            None, "verify", source, "--replicas", "--json",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)))
        told = json.loads(result.stdout.splitlines()[-1])
        self.assertEqual(len(told["not_compared"]), 3, told)
        for line in told["not_compared"]:
            self.assertIn("A limit against resource bombs was reached: values", line)


class Deep(Case):
    def ours(self):
        out = self.place / "out"
        self.run_program(0, "reshard", self.recorded(), out, "--to", "dp=3", "--quiet")
        return out, out / (out / "latest").read_text().strip()

    def test_twice_and_all(self):
        out, tag = self.ours()
        _, plain = self.told(0, out)
        (tag / "notes").mkdir()
        _, told = self.told(0, out, "--deep")
        self.assertEqual((told["verdict"], told["digest"]), ("VERIFIED", plain["digest"]))
        files = [each for each in tag.rglob("*") if each.is_file()]
        deep = told["deep"]
        self.assertTrue(deep["twice"])
        self.assertEqual(deep["dropped"] + deep["kept"], len(files))
        self.assertEqual(deep["other_files"], 2)  # certificate and manifest
        self.assertIn("6 sections as the source had them", told["certificate"])
        self.assertGreater(told["replicas"]["values of ranks"]["sets"], 10)

    def recertified(self, change):
        """A folder of ours whose certificate change() has altered, under a right manifest."""
        out, tag = self.ours()
        path = tag / "certificate.json"
        certificate = json.loads(path.read_text())
        change(certificate)
        path.write_text(json.dumps(certificate))
        listed = json.loads((tag / "MANIFEST.json").read_text())["files"]
        for each in listed:
            if each["path"] == path.name:
                data = path.read_bytes()
                each["size_bytes"] = len(data)
                each["hash"] = "sha256:" + hashlib.sha256(data).hexdigest()
        (tag / "MANIFEST.json").write_text(
            h.manifest([(e["path"], e["size_bytes"], e["hash"]) for e in listed]))
        return out

    def test_a_certificate_that_names_another_source(self):
        def change(certificate):
            certificate["source"]["digests"]["weights"] = "iso1:" + 64 * "0"

        out = self.recertified(change)
        self.told(0, out, "--replicas")
        _, told = self.told(1, out, "--deep")
        self.assertEqual(told["verdict"], "CORRUPT")
        self.assertIn("weights: the source had", json.dumps(told["findings"]))

    def test_certificates_of_other_forms(self):
        for part in ("source", "target", "sections"):
            for value in ([], [[]], "x", 1, None, {}, {"digests": []}, {"digests": "x"}):
                with self.subTest(part=part, value=value):
                    self.setUp()
                    out = self.recertified(lambda c: c.update({part: value}))
                    verdict = ("VERIFIED", "CORRUPT") if part == "target" else ("VERIFIED",)
                    result = self.run_program(None, "verify", out, "--deep", "--json")
                    told = json.loads(result.stdout.splitlines()[-1])
                    self.assertIn(told["verdict"], verdict)
                    self.assertEqual(result.returncode, told["verdict"] != "VERIFIED", result)

    def test_what_a_certificate_says_is_quoted(self):
        evil = "iso1:\x1b[2J\nVERIFIED  all of it"

        def target(certificate):
            certificate["target"]["digests"]["weights"] = evil

        def source(certificate):
            certificate["source"]["digests"]["weights"] = evil

        def forced(certificate):
            certificate["forced"] = [evil]

        for change, status in ((target, 1), (source, 1), (forced, 0)):
            with self.subTest(change=change.__name__):
                self.setUp()
                out = self.recertified(change)
                text = self.run_program(status, "verify", out, "--deep").stdout
                self.assertIn("\\u{1b}[2J", text)
                own = [line for line in text.splitlines() if "VERIFIED  all" in line]
                self.assertEqual([line for line in own if line.strip().startswith("VERIFIED")], [])
                self.assertNotIn("\x1b", text)

    def test_weights_alone(self):
        out = self.place / "w"
        self.run_program(0, "convert", self.recorded(), out, "--to", "fp32", "--quiet")
        for source in (out, out / "model.safetensors"):
            _, told = self.told(0, source, "--deep")
            self.assertTrue(told["deep"]["twice"])


if __name__ == "__main__":
    outcome, seconds = run_tests(__doc__)
    print(f"{outcome.testsRun} tests in {seconds:.1f} s")
    sys.exit(0 if outcome.wasSuccessful() else 1)
