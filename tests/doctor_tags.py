"""Which other tag of a save folder `isoshard doctor` and `isoshard verify` name.

A part of tests/doctor.py. Python's standard library only. Not verified: an order by anything but
the last number in a tag's name.
"""

import shutil

import doctor_faults as faults
from doctor_case import Case


class Tags(Case):
    def other_tags(self, source):
        _, told = self.doctor(1, source)
        return [(each["tag"], each["whole"]) for each in told["other_tags"]]

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
        self.assertIn('--tag "global_step20"', text)
        self.assertIn('not whole: "global_step21"', text)
        self.assertIn('--tag "global_step20"', self.run_program(1, "verify", source).stdout)
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
        told = self.run_program(1, "doctor", source).stdout.split("other tags")[1]
        self.assertNotIn("isoshard verify", told)
        for step in range(4, 24):
            shutil.rmtree(source / f"global_step{step}")
        self.assertEqual(self.other_tags(source), [])
