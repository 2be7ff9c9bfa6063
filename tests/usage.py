#!/usr/bin/env python3
"""tests/usage.py PROGRAM TRACES: what a tired person or a script does wrong is told, with status 2.

Nothing is guessed from a bad option or config, no answer is lost without a word, no file is written
that was not meant, and the process ends by its own will under tight limits and signals.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time

from program_case import CONFIG, ProgramCase, run_tests


class Usage(ProgramCase):
    def setUp(self):
        super().setUp()
        self.source = self.recorded("z2_bf16_dp4")

    def test_a_config_that_does_not_say_the_target(self):
        config = self.place / "config.json"
        for text in (
            {"zero_optimization": {"stage": "auto"}},
            {"zero_optimization": {"stage": 2.0}},
            {"zero_optimization": {"stage": 9}},
            {"zero_optimization": {"stage": -1}},
            {"zero_optimization": True},
            {"zero_optimization": {"stage": 1}, "sequence_parallel_size": "2"},
            {"sequence_parallel_size": 0},
            {"tensor_parallel": {"autotp_size": "2"}},
        ):
            config.write_text(json.dumps(text))
            told = self.run_program(
                2, "reshard", self.source, "out", "--to-config", config, "--world", 4
            )
            self.assertIn("does not say what the run is", told.stderr)
        config.write_text('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}')
        for verb in (["reshard", self.source, "out"], ["inspect", self.source]):
            told = self.run_program(2, *verb, "--to-config", config, "--world", 4)
            self.assertIn("a key twice; DeepSpeed refuses it", told.stderr)
            self.assertIn('"zero_optimization"', told.stderr)
        config.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        self.run_program(0, "reshard", self.source, "out", "--to-config", config, "--world", 4)

    def test_what_the_training_script_gave(self):
        given = {"note": "made by the oracle", "epoch": 2, "nested": {"a": [1, 2.5, None, True]}}
        source = self.recorded()
        text = self.run_program(0, "inspect", source, "--clean-client-state").stdout
        self.assertEqual(text.splitlines()[-1], "client state " + json.dumps(given).replace(
            ": ", ":").replace(", ", ","))
        line = self.run_program(0, "inspect", source, "--clean-client-state",
                                "--json").stdout.splitlines()[-1]
        self.assertEqual(json.loads(line),
                         {"kind": "client_state", "schema": 1, "value": given})
        self.assertNotIn("client state", self.run_program(0, "inspect", source).stdout)

    def test_options_that_cannot_be_meant(self):
        for arguments in (
            ["reshard", self.source, "out", "--to", "dp=2,dp=3"],
            ["reshard", self.source, "out", "--to", "dp=2", "--world", "8"],
            ["reshard", self.source, "out", "--to", "dp=2", "--tag-out", "latest"],
            ["reshard", self.source, "out", "--to", "dp=2", "--tag-out", ".hidden"],
            ["convert", self.source, "out", "--to", "fp32", "--like", "abc"],
            ["digest", self.source, "--expect", ""],
            ["digest", self.source, "--expect", "iso1:abc"],
            ["verify", self.source, "--expect", ""],
            ["diff", self.source, self.source, "--only", "no such name"],
            ["inspect", self.source, "--only", "no such name"],
            ["verify", self.source / "latest"],
            ["verify", self.source / "global_step3" / "mp_rank_00_model_states.pt"],
            ["verify", self.source.parent / "case.json"],
        ):
            self.run_program(2, *arguments)
            self.assertEqual(list(self.place.iterdir()), [])

    def test_an_answer_that_cannot_be_written(self):
        for arguments in (["digest", self.source], ["inspect", self.source], ["help"]):
            with open("/dev/full", "w") as full:
                told = self.run_program(2, *arguments, stdout=full)
            self.assertIn("could not be written", told.stderr)
            self.run_program(2, *arguments, preexec_fn=lambda: os.close(1), stdout=None)

    def test_a_log_that_is_none(self):
        (self.place / "notes").write_text("precious\n")
        for log in ("notes", "missing/log", "/dev/full", "."):
            self.run_program(2, "convert", self.source, "out", "--to", "fp32", "--log-file", log)
            self.assertEqual([each.name for each in self.place.iterdir()], ["notes"])
        self.assertEqual((self.place / "notes").read_text(), "precious\n")
        for target in ("a", "b"):
            self.run_program(0, "convert", self.source, target, "--to", "fp32", "--log-file", "log")
        self.assertIn("Done! b", (self.place / "log").read_text())

    def test_a_target_that_is_a_link_to_nowhere(self):
        (self.place / "link").symlink_to("nowhere")
        for flags in ([], ["--overwrite"]):
            told = self.run_program(2, "convert", self.source, "link", "--to", "fp32", *flags)
            self.assertIn("neither file nor folder", told.stderr)
            self.assertEqual([each.name for each in self.place.iterdir()], ["link"])

    def test_weights_in_several_files_with_buffers(self):
        for form in ("safetensors", "bin"):
            arguments = ["--to", "fp32", "--format", form, "--max-shard-size", "2KB"]
            self.run_program(0, "convert", self.source, form, *arguments)
            told = self.run_program(0, "verify", form)
            self.assertTrue(told.stdout.startswith("VERIFIED"), told)

    def test_renamed_files_are_remembered(self):
        source, tag = self.place / "source", "global_step3"
        subprocess.run(["cp", "-r", self.recorded("z3_bf16_dp3"), source], check=True)
        name = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
        first, second = (source / tag / name.format(rank) for rank in (0, 1))
        first.rename(self.place / "other")
        second.rename(first)
        (self.place / "other").rename(second)
        self.run_program(2, "reshard", source, "out", "--to", "dp=2")
        self.run_program(0, "reshard", source, "out", "--to", "dp=2", "--allow-renamed")
        self.assertEqual(len(self.certificate(self.place / "out")["inferred"]), 2)
        told = self.run_program(0, "verify", source, "--allow-renamed")
        self.assertIn("it was saved as", told.stdout)

    def test_little_room_for_threads(self):
        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (room << 20, room << 20))

        for room in (40, 44, 48, 60, 100):
            result = subprocess.run(
                [CONFIG.program, "reshard", self.source, f"out{room}", "--to", "dp=3"],
                cwd=self.place, capture_output=True, check=False, preexec_fn=limit,
            )
            self.assertIn(result.returncode, (0, 2, 127), result)
            self.assertFalse([each for each in self.place.iterdir() if each.name[0] == "."])

    def test_a_signal_while_planning(self):
        process = subprocess.Popen(
            [CONFIG.program, "reshard", self.source, "out", "--to", "dp=1000000", "--dry-run"],
            cwd=self.place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(timeout=60), 128 + signal.SIGTERM)

    def test_deepspeeds_own_flags(self):
        """What it will do is said when nothing is refused any more."""
        source, target = self.recorded() / "global_step3", self.place / "universal"
        flags = ["ds_to_universal", "--input_folder", source, "--output_folder", target]
        self.assertNotIn("***", self.run_program(2, *flags).stdout)
        text = self.run_program(0, *flags, "--inject_missing_state").stdout
        self.assertIn("*** 1. Extracting ZeRO fragments", text)
        expected = self.run_program(0, "digest", self.recorded()).stdout
        self.assertEqual(self.run_program(0, "digest", target).stdout, expected)

    def test_help_of_a_verb(self):
        self.assertIn("--to", self.run_program(0, "help", "convert").stdout)
        self.run_program(0, "plan", "--help")


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
