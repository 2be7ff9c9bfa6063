"""Whether strace can watch a program here, and what a trace holds, for the tests that count system
calls. A test that cannot watch must say so: an empty trace looks like a program that does nothing.

Python's standard library only. Not verified here: anything.
"""

import functools
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

CALLS = "trace=%process,%network,open,openat,openat2,creat"


@functools.cache
def why_not_traced():
    """Why no program can be traced on this machine; "" where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "trace"
        tried = subprocess.run(["strace", "-f", "-qq", "-o", log, "-e", CALLS, "true"], text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if log.exists() and "execve(" in log.read_text(errors="replace"):
            return ""
    said = (tried.stderr.strip().splitlines() or ["it says nothing"])[-1]
    return f"strace cannot trace here (is ptrace forbidden?): {said}"


@functools.cache
def why_not_injected():
    """Why strace can let no system call fail on this machine; "" where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "-e", "inject=fsync:error=EIO",
                            "true"], capture_output=True, text=True, errors="replace", check=False)
    said = tried.stderr.strip()[:100]
    return "" if tried.returncode == 0 else f"strace cannot trace here: {said}"


def injected(test):
    """A test, or a class of them, in which strace disturbs system calls: else it is skipped."""
    return unittest.skipIf(why_not_injected(), why_not_injected())(test)


class TracedCase(unittest.TestCase):
    """Skipped, and said aloud, where there is no tracing."""

    @classmethod
    def setUpClass(cls):
        why = why_not_traced()
        if why:
            print(f"*** NOT TRACED: {why}. NO SYSTEM CALL WAS LOOKED AT.", flush=True)
            raise unittest.SkipTest(why)
        super().setUpClass()


def traced(log, arguments, **how):
    """The lines of the trace of a command; its first is the command's own execve."""
    subprocess.run(["strace", "-f", "-qq", "-s", "4096", "-o", log, "-e", CALLS, *arguments],
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   timeout=60, check=False, **how)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if not lines or "execve(" not in lines[0]:
        raise RuntimeError(f"strace has left no trace of {arguments[0]}")
    return lines


def status_of(outcome):
    """The exit status of a script of tests: 77 where every test was skipped."""
    if not outcome.wasSuccessful():
        return 1
    everything = not outcome.testsRun or outcome.testsRun == len(outcome.skipped)
    return 77 if everything else 0
