#!/usr/bin/env python3
"""tests/consumer.py PROGRAM TRACES BUILD: another project installs isoshard and tests with it.

`cmake --install` of this build, then traces/consumer is configured against it and its ctest runs:
all good on a good checkpoint; on a damaged one the tests of it fail with isoshard's own words, and
the others do not. docs/CI.md shows the consumer's own lines.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile

PROGRAM, TRACES, BUILD = sys.argv[1:4]
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
CONSUMER = os.path.join(TRACES, "consumer")


def fail(text):
    sys.exit("FAILED: " + text)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def must(*command):
    status, output = run(*command)
    if status:
        fail(f"{' '.join(command)} ends with {status}\n{output}")
    return output


def parts():
    """What stands between two marks of the consumer's files, by the mark."""
    text = open(os.path.join(CONSUMER, "CMakeLists.txt")).read()
    return {mark: body for mark, body in re.findall(r"# \[(\w+)\]\n(.*?)# \[\1\]\n", text, re.S)}


def check_documentation():
    shown = open(os.path.join(ROOT, "docs", "CI.md"), encoding="utf-8").read()
    for mark, body in parts().items():
        if body not in shown:
            fail(f"docs/CI.md does not show the part [{mark}] of traces/consumer/CMakeLists.txt")
    for line in open(os.path.join(CONSUMER, "test_checkpoint.py")).read().split("\n\n\n")[1:3]:
        if line.strip() not in shown:
            fail("docs/CI.md does not show this of traces/consumer/test_checkpoint.py:\n" + line)


def failed_tests(output):
    return set(re.findall(r"^\s*\d+ - (\S+) \(Failed\)", output, re.M))


def main():
    check_documentation()
    with tempfile.TemporaryDirectory() as folder:
        prefix, build = os.path.join(folder, "prefix"), os.path.join(folder, "build")
        must("cmake", "--install", BUILD, "--prefix", prefix)
        for name in ("bin/isoshard", "share/isoshard/isoshard_pytest.py"):
            if not os.path.isfile(os.path.join(prefix, name)):
                fail(f"{name} is not installed")
        configure = ["cmake", "-S", CONSUMER, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}"]
        must(*configure)
        must("ctest", "--test-dir", build, "--output-on-failure", "-j2")

        damaged = os.path.join(folder, "ckpt")
        shutil.copytree(os.path.join(TRACES, "deepspeed", "z1_bf16_dp2", "ckpt"), damaged)
        path = os.path.join(damaged, "global_step3",
                            "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        must(*configure, f"-DCHECKPOINT={damaged}")
        status, output = run("ctest", "--test-dir", build, "--output-on-failure", "-j2")
        found = failed_tests(output)
        if not status or found != {"saved.whole", "saved.equal", "python"}:
            fail(f"of a damaged checkpoint these tests fail: {found}\n{output}")
        if "bf16_zero_pp_rank_1" not in output:
            fail("the damaged file is not named\n" + output)

        wrong = os.path.join(folder, "wrong")
        os.makedirs(wrong)
        for call, word in (("isoshard_add_golden_test(NAME a)", "DIR is missing"),
                           ("isoshard_add_golden_test(NAME a DIR ${UNSET})", "no value: DIR"),
                           ("isoshard_add_checkpoint_test(NAME a SOURCE b EQUAL c)",
                            "not understood")):
            with open(os.path.join(wrong, "CMakeLists.txt"), "w") as file:
                file.write("cmake_minimum_required(VERSION 3.25)\nproject(wrong LANGUAGES NONE)\n"
                           "enable_testing()\nfind_package(isoshard REQUIRED)\n" + call + "\n")
            status, output = run("cmake", "-S", wrong, "-B", os.path.join(folder, "b"),
                                 f"-DCMAKE_PREFIX_PATH={prefix}")
            if not status or word not in output:
                fail(f"{call} is not refused\n{output}")
    print("installed, used, and told of a damaged checkpoint")


main()
