"""What torch and DeepSpeed do to a checkpoint when something goes wrong. For peer.py --evidence.

Each experiment is a script of traces/evidence: the real program, in the environment of peer.py,
on the CPU. It says whether the fault was seen, with figures, and leaves its files; then isoshard is
run on the same files, or in the same situation, and each claim about it is judged
(evidence_claims.py). docs/EVIDENCE.md is the table of what was printed.

Exit status: 0 every fault was reproduced and every claim held; 1 otherwise; 2 one could not be run.
"""
import os
import re
import shutil
import tempfile
import time

import evidence_claims as claims
from evidence_bench import Bench, Skip

EXPERIMENTS = (
    ("E1", claims.torn_save, "a rank dies while it writes its shard of a save"),
    ("E2", claims.byte_flips, "one byte of a torch.save file is wrong"),
    ("E3", claims.write_calls, "a checkpoint is saved over an older one"),
    ("E4", claims.full_disk, "the disk is full"),
    ("E5", claims.empty_latest, "latest is empty"),
    ("E6", claims.weights_only, "a checkpoint is loaded without running its code"),
    ("E7", claims.escaping_name, "a parameter's name climbs out of the folder"),
    ("E8", claims.pattern_name, "a parameter's name holds brackets"),
    ("E9", claims.missing_fragment, "a rank's part is missing"),
    ("E10", claims.odd_archives, "an archive says two things at once"),
    ("E11", claims.stale_tail, "a shorter file is written over a longer one"),
    ("E12", claims.swallowed_error, "what writes the checkpoint is dead"),
    ("E13", claims.pickle_bombs, "a small pickle is large when it is walked"),
)


def one(bench, function):
    """(what was seen or the reason why not, None where it could not be run)"""
    bench.claims.clear()
    folder = tempfile.mkdtemp(prefix="isoshard-evidence-")
    try:
        return function(bench, folder), ""
    except Skip as reason:
        return None, f"skipped: {reason}"
    except Exception as error:
        return None, f"could not be run: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(options):
    bench, began = Bench(options.python, options.program), time.monotonic()
    counts = {"reproduced": 0, "not reproduced": 0, "not run": 0, "skipped": 0}
    held = broken = 0
    for number, function, title in EXPERIMENTS:
        if not re.search(options.cases, f"{number} {function.__name__}"):
            continue
        started = time.monotonic()
        told, reason = one(bench, function)
        print(f"{number}  {title}  ({time.monotonic() - started:.0f} s)")
        word = "reproduced" if told and told["reproduced"] else "not reproduced" if told else \
            "skipped" if reason.startswith("skipped") else "not run"
        counts[word] += 1
        print(f"    {word + ':':16}{told['said'] if told else reason}")
        for good, text in bench.claims:
            held, broken = held + good, broken + (not good)
            print(f"    {'isoshard:' if good else 'NOT AS CLAIMED:':16}{text}")
        print(flush=True)
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    print(f"{said or 'nothing was asked for'}; {held} claims about isoshard held, {broken} did not "
          f"({time.monotonic() - began:.0f} s)")
    if counts["not run"] or not said:
        return 2
    return 1 if broken or counts["not reproduced"] else 0
