#!/usr/bin/env python3
"""Does the real DeepSpeed accept what isoshard writes, and do both give the same next step?

    peer.py [--venv DIR] [--program PATH] [--versions 0.19.8,…] [--cases REGEX] [--out DIR]
    peer.py --report-only [--out DIR]
    peer.py --export | --parallel [--venv DIR] [--program PATH] [--cases REGEX]
    peer.py --errata [--report-only] [--versions …] [--cases REGEX] [--out DIR]
    peer.py --evidence [--venv DIR] [--program PATH] [--cases REGEX]

Real engines in real processes (CPU, gloo, one process a rank) load what isoshard wrote from the
checkpoints of traces/deepspeed. Each case becomes a line of OUT/results.jsonl, the last run of a
case counts, and from these lines docs/peer_report.md and docs/peer_matrix.svg are written; the
report says which cases are not there. Groups of facts:

    aa         the same run twice gives the same bits, else the comparisons below mean nothing
    control    what round robin saves equals what the same run saves without it
    universal  DeepSpeed loads our universal form, at the same and at another topology
    reshard    DeepSpeed loads our resharded save folder by a plain load_checkpoint
    loader     where DeepSpeed itself is wrong, whatever it is given
    matrix     each recorded checkpoint through DeepSpeed's tools and through ours
    reading    what this version of DeepSpeed saves, converted by its tools and by ours

--export asks the real transformers instead whether it loads what `isoshard export` wrote
(scripts/peer_hf.py, in the same environment, with transformers installed); --parallel whether
DeepSpeed loads and trains on what was resharded between tensor-parallel, expert-parallel and
pipeline degrees and migrated (scripts/peer_parallel.py).

With --errata no file of ours takes part: every script of traces/repro is run under every version
and docs/errata_matrix.md is written (peer_errata.py). The regular expression is then matched on
'row script'; the exit status is 0 if every cell is filled and none an error, else 2.

With --evidence torch and DeepSpeed meet what goes wrong with checkpoints (a rank that dies while it
saves, a wrong byte, a full disk), and isoshard meets the same: docs/EVIDENCE.md, some minutes
(peer_evidence.py). The regular expression is matched on 'E1 torn_save'.

Without --venv an environment is made in build/peer/venv (5 GB, a few minutes). Further versions of
DeepSpeed are laid over it (`pip install --target`) in the folder beside it. Not part of
scripts/test. Exit status: 0 every fact about our files is right, 1 one is not, 2 could not run.

Not verified: other models, GPUs, NVMe, several nodes; that two steps stay equal after the first.
"""
import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time

import peer_errata
import peer_evidence
import peer_facts
import peer_plan
import peer_report
from peer_tools import RECORDINGS, REFERENCE, ROOT, Peer

VERSIONS = (REFERENCE, "0.18.9", "0.16.9")
TRANSFORMERS = "transformers==5.6.2"
PINS = "torch==2.13.0 numpy packaging psutil ninja setuptools wheel".split()


def plan(version):
    sources = [name for name in sorted(os.listdir(RECORDINGS)) if "_to_" not in name]
    return peer_plan.plan(version, REFERENCE, sources)


def run_plan(options, version, overlay, results):
    peer = Peer(options, version, overlay)  # its server ends with its standard input
    program = peer.isoshard("--version")[1].splitlines()[0]
    for group, title, function, arguments in plan(version):
        if not re.search(options.cases, f"{group} {title}"):
            continue
        start = time.monotonic()
        facts = [{"check": check, "result": result, "detail": detail} for check, result, detail
                 in getattr(peer_facts, function)(peer, *arguments)]
        line = {"version": version, "group": group, "case": title, "program": program,
                "facts": facts}
        print(json.dumps(line), file=results, flush=True)
        print(f"{version} {group} {title}: {time.monotonic() - start:.0f} s", flush=True)
        for left in glob.glob(os.path.join(peer.work, "*", "")) if not options.keep else ():
            shutil.rmtree(left)


def read_results(path, versions):
    """(facts, cases of the plan without any): the last run of a case counts."""
    with open(path) as file:
        cases = {(line["version"], line["group"], line["case"]): line
                 for line in map(json.loads, file)}
    planned = [(version, *entry[:2]) for version in versions for entry in plan(version)]
    facts = [{**cases[key], **fact} for key in planned if key in cases
             for fact in cases[key]["facts"]]
    return facts, [key for key in planned if key not in cases]


def overlay_of(options, version):
    """The folder that goes first on PYTHONPATH; empty for the version in the environment."""
    if version == REFERENCE:
        return ""
    folder = os.path.join(options.overlays, "deepspeed-" + version)
    if not os.path.isdir(folder):
        subprocess.check_call([options.python, "-m", "pip", "install", "--quiet", "--no-deps",
                               "--no-build-isolation", "--target", folder,
                               f"deepspeed=={version}"], env={**os.environ, "DS_BUILD_OPS": "0"})
    return folder


def make_environment(folder):
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        subprocess.check_call([sys.executable, "-m", "venv", folder])
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", *PINS])
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", "--no-build-isolation",
                               f"deepspeed=={REFERENCE}"])
    return python


def with_transformers(options, script, *arguments):
    python = os.path.abspath(make_environment(options.venv))
    if subprocess.call([python, "-c", "import transformers"], stderr=subprocess.DEVNULL):
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", TRANSFORMERS])
    return subprocess.call([python, os.path.join(ROOT, "scripts", script), "--program",
                            os.path.abspath(options.program), *arguments])


def run_errata(options, versions):
    if not options.report_only:
        options.python = os.path.abspath(make_environment(options.venv))
        peer_errata.run(options, {version: overlay_of(options, version) for version in versions})
    cells = peer_errata.write(options.out, VERSIONS)
    counts = {word: cells.count(word) for word in ("there", "gone", "n/a", "error", "")}
    print(", ".join(f"{count} {word or 'not run'}" for word, count in counts.items()))
    return 2 if counts["error"] or counts[""] else 0


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    build = os.path.join(ROOT, "build")
    parser.add_argument("--venv", default=os.path.join(build, "peer", "venv"))
    parser.add_argument("--overlays", default=os.path.join(build, "peer"), metavar="DIR",
                        help="where deepspeed-VERSION folders are or will be")
    parser.add_argument("--program", default=os.path.join(build, "release", "isoshard"))
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--cases", default="", metavar="REGEX", help="matched on 'group case'")
    parser.add_argument("--out", default=os.path.join(build, "peer", "out"))
    parser.add_argument("--keep", action="store_true", help="keep every folder that was written")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--export", action="store_true", help="only what transformers loads")
    parser.add_argument("--parallel", action="store_true", help="only tp, ep and pp")
    parser.add_argument("--errata", action="store_true", help="run traces/repro instead")
    parser.add_argument("--evidence", action="store_true", help="run traces/evidence instead")
    options = parser.parse_args(arguments)
    if options.evidence:
        options.python = os.path.abspath(make_environment(options.venv))
        options.program = os.path.abspath(options.program)
        return peer_evidence.run(options)
    if options.export:
        return with_transformers(options, "peer_hf.py")
    if options.parallel:
        return with_transformers(options, "peer_parallel.py", "--cases", options.cases)
    options.out, versions = os.path.abspath(options.out), options.versions.split(",")
    os.makedirs(options.out, exist_ok=True)
    if options.errata:
        return run_errata(options, versions)
    path = os.path.join(options.out, "results.jsonl")
    if not options.report_only:
        options.python = os.path.abspath(make_environment(options.venv))
        options.program = os.path.abspath(options.program)
        with open(path, "a") as results:
            for version in versions:
                run_plan(options, version, overlay_of(options, version), results)
    facts, missing = read_results(path, VERSIONS)
    peer_report.write(facts, missing, REFERENCE)
    bad = [fact for fact in facts if peer_report.is_bad(fact)]
    for fact in bad:
        print("not right:", *(fact[key] for key in ("version", "group", "case", "check")))
    print(f"{len(facts)} facts, {len(bad)} of ours not right, {len(missing)} cases not run")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
