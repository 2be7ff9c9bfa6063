"""Which other tag of a save folder `isoshard doctor` and `isoshard verify` name.

A part of tests/doctor.py. Python's standard library only. Not verified: an order by anything but
the last number in a tag's name.
"""

import os
import shutil

import doctor_faults as faults
import hostile as h
from doctor_case import Case


class Tags(Case):
    def other_tags(self, source):
        _, told = self.doctor(1, source)
        return [(each["tag"], each["state"] == "whole") for each in told["other_tags"]]

    def test_the_newest_whole_tag_is_named(self):
        """After a torn save nothing names the whole one before it (E1)."""
        source, tag = self.copy()
        for step in (20, 100, 9, 21):
            shutil.copytree(tag, source / f"global_step{step}")
        for torn in (100, 21):
            next((source / f"global_step{torn}").glob("*rank_1*optim*")).write_bytes(b"PK")
        (source / "latest").write_text("global_step100")
        self.assertEqual(self.other_tags(source),
                         [("global_step21", False), ("global_step20", True)])
        text = self.run_program(1, "doctor", source).stdout
        self.assertIn('whole is "global_step20"', text)
        self.assertIn('not whole: "global_step21"', text)
        self.assertIn('whole is "global_step20"', self.run_program(1, "verify", source).stdout)
        for broken in ("", "global_step101"):
            (source / "latest").write_text(broken)
            self.assertEqual(self.other_tags(source)[-1], ("global_step20", True))
        mark = source / "global_step20" / f".isoshard-{faults.NONCE}"
        mark.touch()
        self.assertEqual(self.other_tags(source)[-1], ("global_step9", True))

    def test_no_tag_is_named_where_none_is_whole(self):
        source, tag = self.copy()
        for step in range(4, 24):
            shutil.copytree(tag, source / f"global_step{step}")
        for path in source.glob("*/*rank_1*optim*"):
            path.write_bytes(b"")
        tags = self.other_tags(source)
        self.assertEqual(tags[0], ("global_step23", False))
        self.assertEqual(len(tags), 16)
        told = self.run_program(1, "doctor", source).stdout
        self.assertIn("none of the 16 other tags", told)
        for step in range(4, 24):
            shutil.rmtree(source / f"global_step{step}")
        self.assertEqual(self.other_tags(source), [])

    def torn(self, name="z1_bf16_dp2"):
        """A save folder whose latest tag is torn, and a copy of it as it was before."""
        source, tag = self.copy(name)
        before = source / "global_step2"
        shutil.copytree(tag, before)
        next(tag.glob("*rank_0*optim*")).write_bytes(b"")
        return source, before

    def test_a_tag_with_a_fault_of_its_own_is_not_named(self):
        """Faults that the reader of a checkpoint lets pass."""
        source, before = self.torn("z3_bf16_dp3")
        next(before.glob("*rank_1*model*")).unlink()
        self.assertEqual(self.other_tags(source), [("global_step2", False)])
        source, before = self.torn()
        self.assertEqual(self.other_tags(source), [("global_step2", True)])
        (before / "extra_model_states.pt").write_bytes(
            h.torch_file(h.program(h.call("posix", "system", h.text("true")))))
        self.assertEqual(self.other_tags(source), [("global_step2", False)])

    def test_a_tag_that_its_manifest_contradicts_is_not_named(self):
        out = self.place / "out"
        for harm in (lambda tag: (tag / "certificate.json").unlink(),
                     lambda tag: (tag / "MANIFEST.json").write_text("{\n"),
                     lambda tag: (tag / "certificate.json").write_text("{}")):
            shutil.rmtree(out, ignore_errors=True)
            self.run_program(0, "reshard", self.recorded(), out, "--to", "dp=3", "--quiet")
            before = out / "global_step2"
            shutil.copytree(out / "global_step3", before)
            next((out / "global_step3").glob("*rank_0*optim*")).write_bytes(b"")
            self.assertEqual(self.other_tags(out), [("global_step2", True)])
            harm(before)
            self.assertEqual(self.other_tags(out), [("global_step2", False)])

    def test_links_and_folders_that_may_not_be_listed(self):
        source, before = self.torn()
        elsewhere = self.place / "elsewhere"
        shutil.rmtree(elsewhere, ignore_errors=True)
        before.rename(elsewhere)
        before.symlink_to(elsewhere)
        closed = source / "lost+found"
        closed.mkdir(mode=0)
        (source / "runs" / "global_step9").mkdir(parents=True)
        (source / "runs" / "latest").write_text("global_step9")
        self.assertEqual(self.other_tags(source), [("global_step2", True)])
        closed.rmdir()

    def test_a_tag_that_may_not_be_read_is_not_called_torn(self):
        source, before = self.torn()
        if os.geteuid() == 0:
            self.skipTest("root may read all")
        next(before.glob("*optim*")).chmod(0)
        _, told = self.doctor(1, source)
        self.assertEqual([each["state"] for each in told["other_tags"]], ["not looked at"])

    def test_a_pointer_one_level_down(self):
        source, _ = self.copy()
        inner = self.place / "runs" / "inner"
        shutil.rmtree(inner.parent, ignore_errors=True)
        shutil.copytree(source, inner)
        (inner / "latest").write_text("")
        self.assertEqual(self.other_tags(inner.parent), [("global_step3", True)])
        self.assertIn('whole is "global_step3"',
                      self.run_program(1, "verify", inner.parent).stdout)
