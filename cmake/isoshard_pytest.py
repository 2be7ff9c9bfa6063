"""Checkpoints under test, for pytest: one file, nothing but the program `isoshard` needed.

    from isoshard_pytest import assert_equal, assert_whole

    def test_resharding_keeps_the_state(tmp_path):
        assert_whole("runs/a/checkpoint")
        assert_equal("runs/a/checkpoint", "runs/b/checkpoint")

The program is $ISOSHARD, or the one installed beside this file, or the one on PATH. An assertion
that fails is an AssertionError with what the program said; a call that could not be answered (a
folder that is not there) is a RuntimeError.
"""

import os
import shutil
import subprocess


def program():
    """The path of the program; FileNotFoundError that says where it was looked for."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "bin", "isoshard")
    for path in (os.environ.get("ISOSHARD"), beside, shutil.which("isoshard")):
        if path and os.access(path, os.X_OK):
            return os.path.abspath(path)
    raise FileNotFoundError("isoshard is neither $ISOSHARD, nor at " + os.path.abspath(beside) +
                            ", nor on PATH")


def run(*arguments):
    """What the program prints; AssertionError if it answers no, RuntimeError if it cannot."""
    command = [program(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    said = " ".join(command) + "\n" + done.stdout + done.stderr
    raise AssertionError(said) if done.returncode == 1 else RuntimeError(said)


def assert_whole(folder):
    """Every file is there, undamaged and consistent with the others."""
    run("verify", folder)


def assert_equal(expected, found):
    """Both hold the same state bit for bit, whatever the shards and the form."""
    run("diff", expected, found)


def digest(folder):
    """The digest of the state, which no shard, stage or form changes: "iso1:…"."""
    for line in run("digest", folder).splitlines():
        if line.startswith("iso1:"):
            return line.split()[0]
    raise RuntimeError("isoshard digest printed no digest of " + str(folder))


def assert_digest(folder, expected):
    """The state has that digest."""
    run("digest", folder, "--expect", expected)


def assert_golden(folder):
    """The folder is what `isoshard golden` makes of its own description."""
    run("golden", "--check", folder)


def assert_simulates(topologies="world<=4", cases=20, seed=1, faults=None):
    """Runs on simulated ranks are the run on one rank, bit for bit."""
    more = ["--faults", faults] if faults else []
    run("simulate", "--topologies", topologies, "--cases", cases, "--seed", seed, "--no-progress",
        *more)
