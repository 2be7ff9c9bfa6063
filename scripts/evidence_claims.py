"""What isoshard must do where torch and DeepSpeed do what traces/evidence shows; one function each.

    function(bench, folder) → what the real program was seen to do, as its script told it

Every function runs the script of traces/evidence into `folder`, then isoshard on the files that it
left, or in the same situation, and adds its claims to the bench. Not verified: what no claim says.
"""
import glob
import os
import re
import shutil
import sys
import zlib

import evidence_flips
from evidence_bench import ROOT, Skip

sys.path.insert(0, os.path.join(ROOT, "tests"))
import hostile as h  # noqa: E402

BOMB_S, BOMB_KB = 1.0, 256 << 10
SAMPLED = 365


def torn_save(bench, folder):
    told = bench.real("torn_save", folder)
    bench.expect(1, ("INCOMPLETE", told["shard"]), "verify", told["save"])
    bench.expect(1, ("torn-publication", told["shard"], 'whole is "global_step1"'),
                 "doctor", told["save"])
    bench.expect(0, ("COMPLETE", "global_step1"), "verify", told["save"], "--tag", "global_step1")
    bench.unit("Engine.AFaultAtEveryPointOfASaveLeavesOldOrNew",
               "our engine, a fault at every operation of a save: the old or the new")
    text = bench.expect(0, (" 0 failed",), "simulate", "--cases", "60", "--steps", "8", "--seed",
                        "1", "--faults", "death,disk")
    struck = re.search(r"faults that struck: (\d+) deaths", text)
    bench.claim(struck and int(struck.group(1)) > 10,
                f"ranks that died in these lives: {struck.group(1) if struck else 'none'}")
    return told


def byte_flips(bench, folder):
    told = bench.real("byte_flips", folder)
    length = os.path.getsize(told["file"])
    offsets = evidence_flips.spread(length, SAMPLED)
    found = evidence_flips.judge(bench.program, told["file"], offsets)
    counts = {word: len(offsets) for word, offsets in found.items()}
    bench.claim(not counts["silent"] and not counts["odd"],
                f"isoshard digest of {sum(counts.values())} of these files: {counts['refused']} "
                f"refused, {counts['equal']} proven equal, {counts['silent']} silent")
    # The same file in the place of a recording: every byte, in one process.
    place = os.path.join(folder, "traces", "deepspeed", "z1_bf16_dp2", "fp32")
    os.makedirs(place)
    shutil.copy(told["file"], place)
    out = bench.unit("Damage.EveryByteOutsidePayloadsOfWeightsIsSeen:Damage.PayloadBytesOf"
                     "WeightsAreSeen", "every byte of it, and every bit outside payloads",
                     {"ISOSHARD_TRACES": os.path.join(folder, "traces"), "ISOSHARD_CASES": "10000"})
    counted = re.findall(r": (\d+) cases, (\d+) refused, (\d+) proven equal, (\d+) silent", out)
    sums = [sum(map(int, column)) for column in zip(*counted)]
    bench.claim(len(counted) == 2 and sums[0] >= length and not sums[3],
                "{:,} cases: {:,} refused, {:,} proven equal, {} silent".format(*sums))
    return told


def write_calls(bench, folder):
    told = bench.real("write_calls", folder)
    calls, out = os.path.join(folder, "ours"), os.path.join(folder, "out", "made")
    os.makedirs(os.path.dirname(out))
    bench.expect(0, (), "convert", os.path.join(folder, "pytorch_model.bin"), out, "--to", "fp32",
                 before=("strace", "-f", "-qq", "-y", "-o", calls, "-e",
                         "trace=openat,fsync,fdatasync,rename,renameat,renameat2"))
    with open(calls) as file:
        lines = [line for line in file if os.path.dirname(out) in line]
    cut = sum("O_TRUNC" in line for line in lines)
    synced = sum(" fsync(" in line or " fdatasync(" in line for line in lines)
    renamed = [line for line in lines if " rename" in line and f'made"' in line]
    bench.claim(not cut and synced and renamed, f"convert: nothing is opened with O_TRUNC ({cut}), "
                f"{synced} fsync, {len(renamed)} rename onto the final name")
    return told


def weights_of(path, numel):
    with open(path, "wb") as file:
        file.write(h.torch_file(h.weights([("w", h.tensor((numel,), (1,), numel=numel))]),
                                [h.floats(4) * (numel // 4)]))
    return path


def full_disk(bench, folder):
    """On a tmpfs of 1 MiB, seen by this experiment alone; then with the disk filling on the way."""
    disk, large = os.path.join(folder, "disk"), os.path.join(folder, "pytorch_model.bin")
    os.makedirs(disk)
    if not shutil.which("unshare"):
        raise Skip("unshare is not there")
    before = ("unshare", *(("-m",) if os.geteuid() == 0 else ("-Urm",)), "sh", "-c",
              f"mount -t tmpfs -o size=1m tmpfs '{disk}' || {{ echo mount is refused; exit 77; }}; "
              "\"$@\"", "sh")
    told = bench.real("full_disk", disk, before=before)
    bench.expect(2, ("too little space", "expected: 4194", "found:", "nothing was written"),
                 "convert", weights_of(large, 1 << 20), os.path.join(disk, "made"), "--to", "fp32",
                 before=before)
    if shutil.which("strace"):
        target = os.path.join(folder, "out")
        bench.expect(2, ("no space", "safe now:", "next:"), "convert", large, target, "--to",
                     "fp32", before=("strace", "-f", "-qq", "-o", "/dev/null", "-e",
                                     "trace=pwrite64", "-e",
                                     "inject=pwrite64:error=ENOSPC:when=2+"))
        bench.claim(not os.path.exists(target), "convert: nothing lies under the final name")
    return told


def empty_latest(bench, folder):
    told = bench.real("empty_latest", folder)
    words = ("latest", "the name is empty", "0 bytes", '"global_step1"')
    bench.expect(1, words, "verify", told["save"])
    bench.expect(0, (), "verify", told["save"], "--tag", "global_step1")
    return told


def weights_only(bench, folder):
    told = bench.real("weights_only", folder)
    for stage in range(4):
        bench.expect(0, ("COMPLETE",), "verify", os.path.join(folder, f"stage{stage}"))
    return told


def files_below(folder):
    return {os.path.join(at, name) for at, _, names in os.walk(folder) for name in names}


def escaping_name(bench, folder):
    told = bench.real("escaping_name", folder)
    before = files_below(folder)
    bench.expect(1, ("HOSTILE", "cannot be a file name"), "verify", told["save"])
    for target in ("universal", "fp32"):
        bench.expect(2, ("cannot be a file name", "../../../../escaped"), "convert", told["save"],
                     os.path.join(folder, "ours", target), "--to", target)
    written = files_below(folder) - before
    bench.claim(not written, f"files that isoshard has written: {len(written)}")
    return told


def pattern_name(bench, folder):
    told = bench.real("pattern_name", folder)
    ours = os.path.join(folder, "ours")
    bench.expect(0, (), "convert", told["save"], ours, "--to", "universal")
    files = sorted(os.listdir(os.path.join(ours, "zero", "layer[0].weight")))
    bench.claim(files == ["exp_avg.pt", "exp_avg_sq.pt", "fp32.pt", "step.pt"],
                "convert writes for it: " + ", ".join(files))
    bench.expect(0, ("equal: exp_avg", "equal: steps"), "diff", told["save"], ours)
    bench.expect(1, ("lacks a state", "layer[0].weight"), "verify", told["universal"])
    return told


def missing_fragment(bench, folder):
    told = bench.real("missing_fragment", folder)
    bench.expect(1, ("INCOMPLETE", "missing: rank 1"), "verify", told["save"])
    bench.expect(1, ("missing-shards",), "doctor", told["save"])
    bench.expect(2, ("optimizer files are missing", "missing: rank 1"), "convert", told["save"],
                 os.path.join(folder, "ours"), "--to", "universal")
    bench.claim(not os.path.exists(os.path.join(folder, "ours")), "convert: nothing is published")
    return told


def archives():
    """{name: bytes} of an archive as torch writes it and some that it never does."""
    data, good = h.floats(4), h.weights([("w", h.tensor())])
    base = h.records_of(good, [data])
    place = [name for name, _ in base].index("archive/data/0")
    deflated = list(base)
    deflated[place] = h.Record(base[place][0], data, method=8, raw=zlib.compress(data)[2:-4])
    return {
        "sound": h.torch_zip(base),
        "data_0_twice": h.torch_zip([*base, ("archive/data/0", h.floats(8)[16:])]),
        "record_half_as_long": h.torch_file(good, [data[:8]]),
        "record_64_bytes_longer": h.torch_file(good, [data + bytes(64)]),
        "byteorder_big": h.torch_file(good, [data], byteorder=b"big"),
        "bytes_behind_the_end": h.torch_zip(base) + bytes(512),
        "deflated": h.torch_zip(deflated),
        "bytes_before_the_beginning": b"#!/bin/sh\n" + h.torch_zip(base),
    }


def odd_archives(bench, folder):
    for name, data in archives().items():
        with open(os.path.join(folder, name + ".bin"), "wb") as file:
            file.write(data)
    told = bench.real("odd_archives", folder)
    refused, sound = [], False
    for path in sorted(glob.glob(os.path.join(folder, "*.bin"))):
        status = bench.run("digest", path)[0]
        if os.path.basename(path) == "sound.bin":
            sound = status == 0
        elif status == 2:
            refused.append(path)
    bench.claim(len(refused) == len(told["outcomes"]) - 1 and sound,
                f"digest refuses {len(refused)} of {len(told['outcomes']) - 1} odd archives, and "
                f"{'reads' if sound else 'REFUSES'} the sound one")
    return told


def stale_tail(bench, folder):
    told = bench.real("stale_tail", folder)
    cut, appended = map(os.path.dirname, told["files"])
    bench.expect(1, ("CORRUPT", "do not fit its CRC"), "verify", cut)
    bench.expect(1, ("stale-tail", "head -c"), "doctor", cut)
    bench.expect(1, ("CORRUPT",), "verify", appended)
    bench.expect(1, ("stale-tail", "tail -c"), "doctor", appended)
    return told


def swallowed_error(bench, folder):
    told = bench.real("swallowed_error", folder)
    bench.expect(2, ("holds no checkpoint",), "verify", told["save"])
    bench.unit("DecoupledSave.ADeadWriterFailsTheCommitOnEveryRank",
               "our engine, a dead writer: the commit fails on every rank")
    bench.unit("Engine.AFailureOnOneRankIsToldOnAll:GuardedSave.*:Hazard.*",
               "our engine, a disk that fails: told on all ranks, nothing published")
    return told


def pickle_bombs(bench, folder):
    shared = h.program(h.mapping([(h.text("a"), h.dag(60))]))
    deep = h.program(b"]" * 200_000 + b"a" * 199_999)
    for name, data in (("shared", shared), ("deep", deep)):
        with open(os.path.join(folder, name + ".bin"), "wb") as file:
            file.write(h.torch_file(data))
    told = bench.real("pickle_bombs", folder)
    for name in ("shared", "deep"):
        status, text, seconds, kilobytes = bench.run("digest", os.path.join(folder, name + ".bin"))
        bench.claim(status == 2 and seconds < BOMB_S and kilobytes < BOMB_KB,
                    f"digest of {name}: exit status {status}, {seconds:.2f} s of CPU time, "
                    f"{kilobytes >> 10} MiB: {text.strip().splitlines()[0][:90]}")
    return told
