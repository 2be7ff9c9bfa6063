"""Runs one command and counts what it took: wall time, processor time, memory, bytes, disk.

Linux only, standard library only. Counts come from the kernel at the moment the command has ended
and is not yet reaped, so that nothing is lost and children are in them once.
"""
import collections
import os
import subprocess
import threading
import time

CLOCK = os.sysconf("SC_CLK_TCK")

Measured = collections.namedtuple(
    "Measured", "status output wall_s cpu_s others_share anon_bytes resident_bytes "
    "read_bytes written_bytes disk_bytes seen load stopped")


def fields_of(path):
    """The `name: value` lines of a file in /proc; empty once the process is gone."""
    try:
        with open(path) as stream:
            return {name: int(rest.split()[0]) for name, _, rest in
                    (line.partition(":") for line in stream) if rest.split()[:1]
                    and rest.split()[0].isdigit()}
    except OSError:
        return {}


def is_stopped(process):
    """Somebody has halted it (SIGSTOP): its wall time means nothing."""
    try:
        with open(f"/proc/{process}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def busy_seconds():
    """Processor time used by everything on this machine since it started."""
    with open("/proc/stat") as stream:
        user, nice, system, _, _, interrupt, soft, *_ = map(int, stream.readline().split()[1:])
    return (user + nice + system + interrupt + soft) / CLOCK


def tree_of(process):
    """The process and all its descendants."""
    found, at = [process], 0
    while at < len(found):
        try:
            for thread in os.listdir(f"/proc/{found[at]}/task"):
                with open(f"/proc/{found[at]}/task/{thread}/children") as stream:
                    found.extend(map(int, stream.read().split()))
        except OSError:
            pass
        at += 1
    return found


def files_below(folder):
    """{path without its first component: bytes on disk}; the first is the target, or the hidden
    folder that becomes the target. Files of the folder itself are not among them."""
    found, waiting = {}, [folder]
    while waiting:
        try:
            for entry in os.scandir(waiting.pop()):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                    continue
                inner = os.path.relpath(entry.path, folder).partition("/")[2]
                if inner:
                    size = entry.stat(follow_symlinks=False).st_blocks * 512
                    found[inner] = found.get(inner, 0) + size
        except OSError:  # renamed or removed in the meantime
            continue
    return found


class Sampler(threading.Thread):
    """Looks at a running command again and again; keeps the peaks."""

    def __init__(self, process, watch, every_s):
        super().__init__(daemon=True)
        self.process, self.watch, self.every_s = process, watch, every_s
        self.ended = threading.Event()
        self.anon_bytes = self.disk_bytes = 0
        self.seen, self.stopped = set(), False

    def run(self):
        while not self.ended.wait(self.every_s):
            numbers = tree_of(self.process)
            self.stopped = self.stopped or any(map(is_stopped, numbers))
            anon = sum(fields_of(f"/proc/{number}/status").get("RssAnon", 0) for number in numbers)
            self.anon_bytes = max(self.anon_bytes, anon * 1024)
            if self.watch:
                files = files_below(self.watch)
                self.seen.update(files)
                self.disk_bytes = max(self.disk_bytes, sum(files.values()))


def run(command, log, watch=None, every_s=0.02, most_s=3600):
    """Measures the command; its stderr goes to `log`. With `watch`, also what appears below that
    folder, which costs the command some time."""
    load, busy = os.getloadavg()[0], busy_seconds()
    with open(log, "ab") as errors, open(log + ".out", "w+b") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                                   start_new_session=True)
        sampler = Sampler(process.pid, watch, every_s)
        sampler.start()
        timer = threading.Timer(most_s, process.kill)
        timer.start()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - began
        timer.cancel()
        busy = busy_seconds() - busy
        sampler.ended.set()
        moved = fields_of(f"/proc/{process.pid}/io")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        sampler.join()
        output.seek(0)
        text = output.read().decode(errors="replace")
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(
        status=process.returncode, output=text, wall_s=wall, cpu_s=cpu,
        others_share=max(0.0, busy - cpu) / (wall * os.cpu_count()),
        anon_bytes=sampler.anon_bytes, resident_bytes=usage.ru_maxrss * 1024,
        read_bytes=moved.get("rchar", 0), written_bytes=moved.get("wchar", 0),
        disk_bytes=sampler.disk_bytes, seen=sampler.seen, load=load, stopped=sampler.stopped)


def size_below(folder):
    """(bytes by length, bytes on disk, number of files)."""
    sizes = [entry.stat() for where, _, names in os.walk(folder) for entry in
             (os.scandir(where) if names else ()) if entry.is_file(follow_symlinks=False)]
    return (sum(size.st_size for size in sizes), sum(size.st_blocks for size in sizes) * 512,
            len(sizes))


def forget(folder):
    """Writes back what is dirty and drops the folder's files from the page cache."""
    os.sync()
    for where, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(where, name), "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
