"""What scripts/peer.py --evidence and scripts/demo stand on: the real programs, ours, and claims.

A claim is one run of ours and what it must end with; it is printed with what it ended with.
Python's standard library only. Not verified here: anything.
"""
import json
import os
import re
import subprocess
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
SCRIPTS = os.path.join(ROOT, "traces", "evidence")
TIMEOUT_S = 900
SKIPPED = 77


class Skip(Exception):
    """The machine lacks something; the text says what."""


class Bench:
    def __init__(self, python, program):
        self.python, self.program = python, program
        self.tests = os.path.join(os.path.dirname(program), "isoshard_tests_tests")
        self.claims = []  # (it held, what was found) of the experiment in hand

    # ---- the real programs ----

    def real(self, script, *arguments, before=()):
        """The JSON object that a script of traces/evidence ends with."""
        command = [*before, self.python, "-B", os.path.join(SCRIPTS, script + ".py"), *arguments]
        kept = {key: os.environ[key] for key in ("HOME", "TMPDIR", "LANG") if key in os.environ}
        env = {**kept, "PATH": os.pathsep.join((os.path.dirname(self.python), os.defpath)),
               "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              timeout=TIMEOUT_S, env=env, stdin=subprocess.DEVNULL)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode == SKIPPED:
            raise Skip(last)
        if done.returncode or not last.startswith("{"):
            raise RuntimeError(f"{script}: status {done.returncode}: {done.stderr.strip()[-600:]}")
        return json.loads(last)

    # ---- ours ----

    def run(self, *arguments, before=()):
        """(exit status, what it said, seconds of CPU time, kilobytes)"""
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen([*before, self.program, *arguments], stdout=said,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        return process.returncode, text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss

    def claim(self, held, text):
        self.claims.append((bool(held), text))

    def expect(self, status, words, *arguments, before=()):
        """One run of ours: its exit status, and words that must be in what it says."""
        found, text, _, _ = self.run(*arguments, before=before)
        lacking = [word for word in words if word not in text]
        told = " ".join(os.path.basename(a) if os.path.isabs(a) else a for a in arguments)
        said = f"{told}: exit status {found}"
        if words:
            said += ", says " + ", ".join(f"'{word}'" for word in words if word not in lacking)
        if lacking or found != status:
            said += f"; expected {status}, lacks {lacking}; it says: {text.strip()[:400]}"
        self.claim(found == status and not lacking, said)
        return text

    def unit(self, names, what, env=()):
        """Tests of ours that need no recording made here: all must pass, and there must be some."""
        if not os.path.exists(self.tests):
            raise RuntimeError(f"{self.tests} is not built: scripts/build release")
        done = subprocess.run([self.tests, "--gtest_filter=" + names], capture_output=True,
                              text=True, errors="replace", env={**os.environ, **dict(env)})
        passed = re.search(r"\[  PASSED  \] (\d+) test", done.stdout)
        count = int(passed.group(1)) if passed else 0
        good = done.returncode == 0 and count and "SKIPPED" not in done.stdout
        self.claim(good, f"{what}: {count} test{'s' * (count != 1)} passed ({names})")
        return done.stdout
