#!/usr/bin/env python3
"""tests/mutants.py BUILD_DIR [NAME...]: every mistake of tests/mutants.json makes its test fail.

A mutant is a switch in production code (core/mutant.h); its row says in one sentence what is wrong
then, and which unit or property tests must notice. Each row's tests must pass without the mutant
and fail with it: a crash counts as noticed, a hang only where the row states its timeout. Status 1:
a mutant survives, a switch has no row or a row no switch, or a test fails as it is. Needs a build
with ISOSHARD_MUTANTS (presets dev and mutants).

  tests/mutants.py --count   prints how many there are, by folder
  tests/mutants.py --list    prints a line a mutant: name, file, mistake, tests
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("core", "checkpoint", "reshard", "engine", "sim", "reference", "tools")
SWITCH = re.compile(r'(?<![_a-z])mutant\(\s*"([^"]*)"')
HANG_SECONDS = 120  # of a test that takes a few seconds: far above what a busy machine needs
CASES = "20"  # of a property, unless the row says another number


def switches():
    """Name -> the files that hold a switch of it, one entry a switch."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.cc")):
            for name in SWITCH.findall(path.read_text(encoding="utf-8")):
                found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def table():
    return json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))


def faults_of(rows):
    """What is wrong with the table itself."""
    found, faults, seen = switches(), [], set()
    for row in rows:
        name = row["name"]
        if name in seen:
            faults.append(f"{name}: two rows")
        seen.add(name)
        if found.get(name) != [row["file"]]:
            faults.append(f"{name}: {row['file']} was to hold its one switch, found: "
                          f"{', '.join(found.get(name, [])) or 'none'}")
        if not re.fullmatch(r"[a-z0-9_]+", name):
            faults.append(f"{name}: not a name")
    faults += [f"{name}: no row in tests/mutants.json" for name in sorted(set(found) - seen)]
    return faults


def command(build, test):
    binary, _, selection = test.partition(":")
    name = "isoshard_properties" if binary == "properties" else f"isoshard_{binary}_tests"
    return [str(build / name), f"--gtest_filter={selection}", "--gtest_brief=1"]


def run(build, test, cases, mutant, timeout, folder):
    """(status, output); the status is None where it hangs."""
    environment = dict(os.environ, ISOSHARD_MUTANT=mutant, ISOSHARD_CASES=cases, TMPDIR=folder,
                       RC_PARAMS="seed=1", GCOV_PREFIX=folder)  # no line counts as reached by these
    try:
        done = subprocess.run(command(build, test), env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=timeout, cwd=folder, check=False)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout.decode("utf-8", "replace")


def baseline(build, rows, pool, folder):
    """What is wrong with the rows' tests without a mutant, each selection run once."""
    faults = []
    wanted = dict.fromkeys((row["test"], row.get("cases", CASES)) for row in rows)
    checks = {each: pool.submit(run, build, *each, "", HANG_SECONDS, folder) for each in wanted}
    for (test, _), check in checks.items():
        status, output = check.result()
        if status != 0:
            faults.append(f"{test}: status {status} without a mutant:\n{output[-3000:]}")
        elif not re.search(r"\[  PASSED  \] [1-9]", output):
            faults.append(f"{test}: no test ran:\n{output[-1000:]}")
    return faults


def judge(build, row, folder):
    """(row, how it ended, seconds); empty where the mutant survives."""
    started = time.monotonic()
    timeout = row.get("timeout_s", HANG_SECONDS)
    status, output = run(build, row["test"], row.get("cases", CASES), row["name"], timeout, folder)
    how = ""
    if "unknown mutant" in output:
        how = "?: no program of the build has it; configure again"
    elif status is None:
        how = "hangs, as stated" if "timeout_s" in row else "?: hangs"
    elif status < 0 or "Sanitizer" in output:
        how = "crashes"
    elif status != 0 and "[  FAILED  ]" in output:
        how = "fails"
    elif status != 0:
        how = "ends the program"
    return row, how, time.monotonic() - started


def options_of(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("build", nargs="?", type=pathlib.Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args(arguments)


def print_count(rows):
    for folder in FOLDERS:
        number = sum(row["file"].startswith(folder + "/") for row in rows)
        if number:
            print(f"{folder:12} {number:4}")
    print(f"{'all':12} {len(rows):4}")


def main(arguments):
    options, rows = options_of(arguments), table()
    if options.count:
        print_count(rows)
    if options.list:
        for row in rows:
            print(f"{row['name']}\t{row['file']}\t{row['mistake']}\t{row['test']}")
    faults = faults_of(rows)
    if options.count or options.list or options.build is None:
        print("\n".join(faults))
        return 1 if faults else 0
    if options.names:
        rows = [row for row in rows if row["name"] in options.names]
    build, survivors, started = options.build.resolve(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            faults += baseline(build, rows, pool, folder)
            for row, how, seconds in pool.map(lambda row: judge(build, row, folder), rows):
                dead = how and not how.startswith("?")
                print(f"{'killed' if dead else 'SURVIVED':9}{row['name']:32}{seconds:6.1f} s  "
                      f"{how or row['test']}", flush=True)
                if not dead:
                    survivors.append(row)
    for row in survivors:
        print(f"survivor: {row['name']} ({row['file']}): {row['mistake']}; {row['test']} pass")
    for fault in faults:
        print(fault)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{len(rows) - len(survivors)} of {len(rows)} mutants killed in "
          f"{time.monotonic() - started:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of "
          f"processors), {len(faults)} faults of the table")
    return 1 if survivors or faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
