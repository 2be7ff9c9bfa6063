#!/usr/bin/env python3
"""What the device alone needs: reads and writes as many bytes as a conversion, and no more.

    disk_floor.py SOURCE READ_BYTES TARGET WRITE_BYTES

Both at once, past the page cache (O_DIRECT), four threads each way in steps of 4 MiB, durable at
the end. No program that keeps its output can be faster on that device. TARGET is a file that must
not exist. Exit status: 2 where the file system has no O_DIRECT.
"""

import mmap
import os
import sys
import threading

STEP, THREADS = 4 << 20, 4


def pieces(paths_and_sizes, most):
    """(path, offset) of steps over the files, up to `most` bytes."""
    done = 0
    for path, size in paths_and_sizes:
        for offset in range(0, size, STEP):
            if done >= most:
                return
            yield path, offset
            done += min(STEP, size - offset)


def work(todo, lock, flags, move):
    memory, files = mmap.mmap(-1, STEP), {}
    memory.write(os.urandom(STEP))
    while True:
        with lock:
            piece = next(todo, None)
        if piece is None:
            break
        path, offset = piece
        if path not in files:
            files[path] = os.open(path, flags | os.O_DIRECT)
        move(files[path], memory, offset)
    for number in files.values():
        os.fsync(number)
        os.close(number)


def main(source, read_bytes, target, write_bytes):
    read_bytes, write_bytes = int(read_bytes), int(write_bytes)
    found = [os.path.join(at, name) for at, _, names in os.walk(source) for name in names]
    sizes = sorted(((path, os.path.getsize(path)) for path in found), key=lambda each: -each[1])
    with open(target, "xb") as file:
        file.truncate(-(-write_bytes // STEP) * STEP)

    def read(number, memory, offset):
        os.preadv(number, [memory], offset)

    both = (
        (pieces(sizes, read_bytes), os.O_RDONLY, read),
        (pieces([(target, write_bytes)], write_bytes), os.O_WRONLY, os.pwrite),
    )
    threads = []
    for todo, flags, move in both:
        lock = threading.Lock()
        threads += [
            threading.Thread(target=work, args=(todo, lock, flags, move)) for _ in range(THREADS)
        ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"disk_floor: {error}")
