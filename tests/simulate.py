#!/usr/bin/env python3
"""tests/simulate.py PROGRAM TRACES: simulated runs from the command line, and what they write.

`simulate` counts, judges and can be had again; `golden` writes a checkpoint that the other verbs
read and an HDF5 file that h5py reads, with the same values in both; `golden --check` finds what
changed.
"""

import html
import json
import shlex
import signal
import struct
import subprocess
import sys
import time

from program_case import CONFIG, ProgramCase, run_tests


# h5py may be another Python's than the one that runs this.
def has_h5py(python):
    return subprocess.run([python, "-c", "import h5py"], capture_output=True).returncode == 0


H5PY = next(filter(has_h5py, (sys.executable, "/usr/bin/python3")), None)
READ = """
import h5py, json, sys
file = h5py.File(sys.argv[1], "r")
name = "model.embed_tokens.weight"
print(json.dumps({
    "losses": [float(x).hex() for x in file["losses"][:]],
    "whole": file["whole"][name]["fp32"][:].tobytes().hex(),
    "pieces": [[int(file["ranks"][rank][name]["fp32"].attrs["begin"]),
                file["ranks"][rank][name]["fp32"][:].tobytes().hex()]
               for rank in sorted(file["ranks"]) if name in file["ranks"][rank]],
    "events": file["trace"].shape[0], "rows": file["trace"][:].tolist(),
    **{key: value.decode() if isinstance(value, bytes) else value
       for key, value in file["trace"].attrs.items()}}))
"""


class Simulate(ProgramCase):
    def test_runs_are_counted_judged_and_had_again(self):
        arguments = ["simulate", "--cases", 12, "--seed", 6, "--steps", 6, "--json"]
        first = json.loads(self.run_program(0, *arguments).stdout.splitlines()[-1])
        self.assertEqual((first["cases"], first["failed"], first["seed"]), (12, 0, 6))
        self.assertGreater(first["files_resharded"], 0)
        again = json.loads(self.run_program(0, *arguments, "--workers", 1).stdout.splitlines()[-1])
        self.assertEqual(again["trace_hash"], first["trace_hash"])
        other = json.loads(
            self.run_program(0, *arguments[:4], 4, *arguments[5:]).stdout.splitlines()[-1])
        self.assertNotEqual(other["trace_hash"], first["trace_hash"])

    def test_lives_with_faults_are_one_run(self):
        arguments = ["simulate", "--cases", 12, "--seed", 3, "--steps", 8, "--faults", "all"]
        page = self.place / "page.html"
        told = json.loads(self.run_program(
            0, *arguments, "--json", "--report", page).stdout.splitlines()[-1])
        self.assertEqual((told["cases"], told["failed"]), (12, 0))
        self.assertGreater(told["crashes"], 0)
        self.assertGreater(told["saves"], 0)
        self.assertGreater(told["struck"]["death"] + told["struck"]["disk"], 0)
        none = self.run_program(0, "simulate", "--cases", 2, "--topologies", "dense.dp2",
                                "--faults", "drop").stderr
        self.assertIn("no fault has struck", none)
        text = page.read_text(encoding="utf-8")
        for part in ("12 cases, 0 failed", "isoshard replay --seed 3 --case 0", "<svg", "</html>"):
            self.assertIn(part, text)
        self.assertNotIn("http://", text.replace("http://www.w3.org/2000/svg", ""))
        self.assertNotIn("<script", text)
        words = self.run_program(0, "replay", "--seed", 3, "--case", 1, "--steps", 8, "--faults",
                                 "all").stdout
        self.assertIn("equal to the run on one rank", words)
        self.assertIn("life    on", words)
        self.assertIn("no such fault", self.run_program(2, *arguments[:-1], "fire").stderr)
        self.assertIn("no fault is named", self.run_program(2, *arguments[:-1], "").stderr)
        self.run_program(2, *arguments, "--report", self.place / "nowhere" / "page.html")

    def test_a_failure_is_told_shown_and_had_again(self):
        page = self.place / "page.html"
        arguments = ["--seed", 3, "--steps", 8, "--topologies", "dense.dp2", "--faults", "death",
                     "--mutant", "ColdMoments"]
        result = self.run_program(1, "simulate", "--cases", 12, *arguments, "--json", "--report",
                                  page)
        told = json.loads(result.stdout.splitlines()[-1])
        self.assertGreater(told["failed"], 0)
        [replay] = [line for line in result.stderr.splitlines()
                    if line.startswith("isoshard replay ")]
        self.assertEqual(replay, told["replay"])
        self.assertIn(told["reason"].splitlines()[0], result.stderr)
        again = self.run_program(1, *shlex.split(replay)[1:])
        self.assertIn(told["reason"].splitlines()[0], again.stdout)
        self.assertNotIn("equal to the run on one rank", again.stdout)
        self.run_program(0, *[word for word in shlex.split(replay)[1:]
                              if word not in ("--mutant", "ColdMoments")])
        text = page.read_text(encoding="utf-8")
        for part in (f"12 cases, {told['failed']} failed", 'class="bad"', "<svg",
                     html.escape(replay, quote=False),
                     html.escape(told["reason"].splitlines()[0], quote=False)):
            self.assertIn(part, text)
        self.assertIn("--faults makes lives", self.run_program(
            2, "simulate", "--mutant", "ColdMoments").stderr)
        self.assertIn("no such mutant", self.run_program(
            2, "simulate", "--mutant", "Odd", "--faults", "death").stderr)

    def test_what_has_no_files_says_why(self):
        words = self.run_program(0, "replay", "--seed", 1, "--case", 0, "--topologies",
                                 "dp=2,sp=2,tp=2", "--steps", 3).stdout
        self.assertIn("in memory alone: dp2.sp2.tp2 stage", words)
        self.assertIn("mutually exclusive", words)
        for topology, part in (("sp=3", "UlyssesSPAttentionHF (ValueError: 4 mod 3 = 1"),
                               ("dp=2,sp=2,tp=2", "mutually exclusive"),
                               ("tp=2,ep=2,stage=3", "does not read")):
            model = "mixtral" if "ep" in topology else "llama"
            text = self.run_program(2, "golden", "--topology", topology, "--model", model, "--out",
                                    self.place / "none").stderr
            self.assertIn(part, text)
            self.assertIn("in memory", text)
            self.assertFalse((self.place / "none").exists())

    def test_a_cosine_follows_the_optimizers_rate(self):
        def made(name, lr, ratio):
            path = self.place / "cosine.json"
            path.write_text(json.dumps({
                "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
                "optimizer": {"type": "adamw", "params": {"lr": lr}},
                "scheduler": {"type": "WarmupCosineLR", "params": {
                    "total_num_steps": 10, "warmup_num_steps": 4, "warmup_type": "linear",
                    "warmup_min_ratio": ratio}},
                "checkpoint": {"load_universal": True, "tag_validation": "Ignore"}}))
            result = self.run_program(0, "golden", "--topology", "dp=2", "--model", "tiny",
                                      "--config", path, "--out", self.place / name)
            for key in ("checkpoint.load_universal", "checkpoint.tag_validation"):
                self.assertIn(key, result.stdout + result.stderr)
            return self.run_program(0, "digest", self.place / name / "ckpt").stdout.split()[0]
        self.assertEqual(
            len({made("a", 0.02, 0.25), made("b", 0.04, 0.25), made("c", 0.02, 0.0)}), 3)

    def test_a_deepspeed_config_steers_a_run(self):
        path = self.place / "ds.json"
        path.write_text(json.dumps({
            "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "overlap_comm": True}, "steps_per_print": 10,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.5}}}))
        target = self.place / "steered"
        told = self.run_program(0, "golden", "--topology", "dp=2", "--model", "tiny", "--config",
                                path, "--out", target)
        self.assertIn("zero_optimization.overlap_comm", told.stderr)
        self.assertIn("steps_per_print", told.stderr)
        shown = self.run_program(0, "inspect", target / "ckpt").stdout
        self.assertIn("ZeRO-3", shown)
        self.run_program(0, "golden", "--check", target)
        self.assertIn("contradict", self.run_program(
            2, "trace", "--topology", "dp=2,stage=1", "--config", path).stderr)
        path.write_text("{")
        self.assertIn("no JSON", self.run_program(2, "trace", "--config", path).stderr)
        path.write_text(json.dumps({"optimizer": {"type": "Muon"}}))
        self.assertIn("optimizer.type", self.run_program(2, "trace", "--config", path).stderr)

    def test_a_trace_is_printed_and_drawn(self):
        topology = ["trace", "--topology", "dp=2,pp=2,stage=1"]
        printed = self.run_program(0, *topology).stdout.splitlines()
        self.assertRegex(printed[1], r"^ *\d+–\d+ +\d+  \w+")
        calls = [json.loads(line) for line in
                 self.run_program(0, *topology, "--json").stdout.splitlines()]
        summary = calls.pop()
        self.assertEqual((summary["kind"], summary["calls"]), ("trace_summary", len(calls)))
        self.assertEqual(len(printed) - 1 - len(calls), 1 + len({c["verb"] for c in calls}))
        path = self.place / "trace.json"
        self.run_program(0, *topology, "--ranks-per-node", 2, "--out", path)
        events = json.loads(path.read_text())["traceEvents"]
        slices = [e for e in events if e["ph"] == "X"]
        self.assertEqual(len(slices), len(calls))
        self.assertEqual({(e["pid"], e["tid"]) for e in slices}, {(0, 0), (0, 1), (1, 2), (1, 3)})
        self.assertEqual(
            sorted((c["rank"], c["verb"], f"{c['begin']} to {c['end']}") for c in calls),
            sorted((e["tid"], e["name"], e["args"]["ticks"]) for e in slices))
        for rank in range(4):  # one behind the other
            own = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == rank)
            self.assertTrue(all(a[1] <= b[0] for a, b in zip(own, own[1:])))
        # Every message has one arrow, from the sender to the receiver; a collective of n ranks n−1.
        starts = {e["id"]: e for e in events if e["ph"] == "s"}
        ends = {e["id"]: e for e in events if e["ph"] == "f"}
        self.assertEqual(starts.keys(), ends.keys())
        messages = [(starts[i]["tid"], ends[i]["tid"]) for i in starts
                    if starts[i]["name"] == "send"]
        self.assertEqual(sorted(messages), sorted((c["peer"], c["rank"]) for c in calls
                                                  if c["verb"] == "receive"))
        groups = {}
        for c in calls:
            if c["verb"] not in ("send", "receive"):
                groups.setdefault((c["group"], c["call"]), []).append(c["rank"])
        self.assertEqual(len(starts), len(messages) + sum(len(g) - 1 for g in groups.values()))
        for i, start in starts.items():
            self.assertLessEqual(start["ts"], ends[i]["ts"])
            for flow in (start, ends[i]):  # inside a slice of its own name
                self.assertTrue(any(e["tid"] == flow["tid"] and e["name"] == flow["name"] and
                                    e["ts"] < flow["ts"] < e["ts"] + e["dur"] for e in slices))

    def test_one_case_in_words(self):
        told = self.run_program(0, "replay", "--seed", 3, "--case", 5, "--steps", 6).stdout
        self.assertIn("equal to the run on one rank", told)
        self.assertIn("legs", told)

    def test_the_demonstration_has_equal_columns(self):
        rows = [line.split() for line in
                self.run_program(0, "simulate", "--demo", "elastic").stdout.splitlines()]
        rows = [row for row in rows if row[0].isdigit()]
        self.assertEqual(len(rows), 18)
        for row in rows:
            self.assertEqual(row[1], row[2])

    def test_topologies(self):
        names = [line.split()[0] for line in
                 self.run_program(0, "topologies").stdout.splitlines()]
        self.assertIn("ulysses.dp2.sp4", names)
        self.run_program(0, "simulate", "--topologies", "awkward", "--cases", 2, "--steps", 2)
        told = self.run_program(2, "simulate", "--topologies", "no such family").stderr
        self.assertIn("isoshard topologies", told)
        told = self.run_program(2, "simulate", "--topologies", "dp=3,ep=2").stderr
        self.assertIn("3 mod 2 = 1", told)
        self.run_program(2, "simulate", "--topologies", "dp=3,stage=1")
        for text in ("world<=8,tp=2", "world<=0", "world<=65", "dp=0", "dp=5000", ""):
            self.run_program(2, "simulate", "--topologies", text)
        for text in ("pp=9", "dp=16,ep=16"):
            self.run_program(0, "simulate", "--topologies", text, "--cases", 2, "--steps", 1)

    def test_numbers_that_cannot_be_meant(self):
        for option in ("--seed", "--cases", "--steps", "--reshard-every", "--workers"):
            for text in ("-1", "99999999999999999999", "", "1e3", "x"):
                self.run_program(2, "simulate", option, text)
        self.run_program(2, "replay", "--case", "-1")
        self.run_program(2, "simulate", "--demo", "elastic", "--seed", 9)
        self.run_program(2, "golden", "--check", "x", "--topology", "dp=2")
        self.run_program(2, "help", "bogus")
        for verb in ("simulate", "replay", "topologies", "golden"):
            self.assertIn("--help", self.run_program(0, verb, "--help").stdout)

    def test_a_signal_ends_it_and_is_no_failed_case(self):
        for arguments in (["simulate", "--cases", "100000", "--no-progress"],
                          ["replay", "--case", "1", "--steps", "100000"],
                          ["golden", "--steps", "10000", "--out", str(self.place / "golden")]):
            process = subprocess.Popen([str(CONFIG.program), *arguments], stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True)
            time.sleep(0.7)
            process.send_signal(signal.SIGTERM)
            out, error = process.communicate(timeout=30)
            self.assertEqual(process.returncode, 128 + signal.SIGTERM, (arguments, out, error))
            self.assertIn("interrupted by signal 15", error)
            self.assertNotIn("failed", out + error)
        self.assertEqual([path.name for path in self.place.iterdir()], [])

    def golden(self, topology, *more):
        folder = self.place / "golden"
        self.run_program(0, "golden", "--topology", topology, "--out", folder, *more)
        return folder

    def test_a_golden_checkpoint_is_a_checkpoint(self):
        folder = self.golden("dp=2,tp=2,stage=3", "--steps", 2)
        told = self.run_program(0, "verify", folder / "ckpt").stdout
        self.assertTrue(told.startswith("VERIFIED"))
        self.run_program(0, "reshard", folder / "ckpt", "out", "--to", "tp=1,dp=3,stage=1")
        self.run_program(0, "diff", folder / "ckpt", "out")
        self.run_program(2, "golden", "--out", folder)  # it is there already
        self.run_program(2, "golden", "--topology", "dp=2,ep=2", "--out", "none")
        self.run_program(2, "golden", "--topology", "pp=2,stage=2", "--out", "none")

    def test_a_golden_pipeline_is_a_checkpoint(self):
        (self.place / "cfg.json").write_text(json.dumps({
            "train_micro_batch_size_per_gpu": 1, "pipeline": {"stages": 2},
            "zero_optimization": {"stage": 1}}))
        self.run_program(2, "golden", "--topology", "pp=1", "--config", "cfg.json", "--out", "no")
        folder = self.golden("dp=2", "--config", "cfg.json", "--model", "llama-tied")
        told = self.run_program(0, "inspect", folder / "ckpt").stdout
        self.assertIn("trained layers 2 3, tied embed", told)
        told = self.run_program(0, "verify", folder / "ckpt").stdout
        self.assertTrue(told.startswith("VERIFIED"))
        self.run_program(0, "reshard", folder / "ckpt", "one", "--to", "pp=1,dp=3")
        self.run_program(0, "diff", folder / "ckpt", "one")

    def test_a_golden_folder_is_checked(self):
        folder = self.golden("dp=3,stage=2")
        self.assertIn("0 differ, 0 more", self.run_program(0, "golden", "--check", folder).stdout)
        path = folder / "ckpt" / "global_step3" / "mp_rank_00_model_states.pt"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        (folder / "more").write_text("")
        told = self.run_program(1, "golden", "--check", folder).stdout
        self.assertIn('different  "ckpt/global_step3/mp_rank_00_model_states.pt"', told)
        self.assertIn('unexpected "more"', told)

    def test_h5py_reads_it(self):
        if H5PY is None:
            self.skipTest("h5py is not installed")
        folder = self.golden("dp=3,stage=1", "--model", "tiny")
        read = subprocess.run([H5PY, "-c", READ, str(folder / "golden.h5")],
                              capture_output=True, text=True, check=True)
        found = json.loads(read.stdout)
        told = json.loads((folder / "golden.json").read_text())
        self.assertEqual([float.fromhex(x) for x in found["losses"]],
                         [float.fromhex(x) for x in told["losses"]])
        whole = bytes.fromhex(found["whole"])
        joined = bytearray(len(whole))
        for begin, piece in found["pieces"]:
            joined[4 * begin:4 * begin + len(piece) // 2] = bytes.fromhex(piece)
        self.assertEqual(bytes(joined), whole)
        shown = self.run_program(0, "show", folder / "ckpt", "model.embed_tokens.weight", "--json")
        first = struct.unpack("<f", whole[:4])[0]
        self.assertIn(f"{first:.6g}"[:7], shown.stdout)
        self.assertEqual(found["columns"],
                         "rank,verb,group,sequence,dtype,count,peer,begin,end,site")
        names = {key: found[key].split(",") for key in ("columns", "verbs", "dtypes", "sites")}
        at = {key: names["columns"].index(key[:-1]) for key in ("verbs", "dtypes", "sites")}
        told = {(names["verbs"][row[at["verbs"]]], names["dtypes"][row[at["dtypes"]]],
                 names["sites"][row[at["sites"]]].split(":")[0]) for row in found["rows"]}
        self.assertIn(("all_reduce", "int64", "trainer_step.cc"), told)
        self.assertGreater(found["events"], 10)


if __name__ == "__main__":
    outcome, _ = run_tests(__doc__)
    sys.exit(0 if outcome.wasSuccessful() else 1)
