"""Turns the lines that scripts/bench has measured into a table, into goals met or missed, and into
docs/PERFORMANCE.md. Knows no clock and runs nothing."""

import statistics

MIB = 1 << 20
GOALS = {
    "universal": 10,
    "fp32": 5,
    "cp": 1.3,
    "bytes": 1.05,
    "disk": 1.01,
    "anon_mib": 256,
    "inspect_s": 5,
}
NAMES = {
    "peer": "DeepSpeed",
    "reread": "isoshard",
    "stream": "isoshard --verify=stream",
    "cp": "cp -r && sync -f",
    "floor": "(the disk alone: bench/disk_floor.py)",
    "import": "(DeepSpeed's imports alone)",
}
LEAST_BYTES = 2e9  # of an input whose times count
QUIET = 0.1  # more than this share of the processors used by others: the row is called noisy


def of_kind(lines, kind, **fields):
    return [
        line
        for line in lines
        if line["kind"] == kind and all(line.get(name) == value for name, value in fields.items())
    ]


def cases(lines):
    """(place, stage, what) in the order measured."""
    return list(
        dict.fromkeys(
            (line["place"], line["stage"], line["what"]) for line in of_kind(lines, "run")
        )
    )


def runs(lines, case, variant):
    place, stage, what = case
    return of_kind(lines, "run", place=place, stage=stage, what=what, variant=variant)


def ratios(lines, case, upper, lower):
    """Wall time of one over the other, per round."""
    below = {line["round"]: line["wall_s"] for line in runs(lines, case, lower)}
    return [
        line["wall_s"] / below[line["round"]]
        for line in runs(lines, case, upper)
        if line["round"] in below
    ]


def middle(values):
    return statistics.median(values) if values else None


def noisy(lines, case):
    return (
        middle([line["others_share"] for variant in NAMES for line in runs(lines, case, variant)])
        or 0
    ) > QUIET


def doubts(lines, case):
    """Why a time is no evidence; empty if it is."""
    place, stage, what = case
    small = any(
        line["input_bytes"] < LEAST_BYTES
        for line in of_kind(lines, "count", place=place, stage=stage, what=what)
    )
    return "; ".join(
        ["others used the processors"] * noisy(lines, case) + ["input below 2 GB"] * small
    )


# ---- goals ---------------------------------------------------------------------------------------


def gate(name, goal, found, met, note=""):
    return {"kind": "gate", "name": name, "goal": goal, "found": found, "met": met, "note": note}


def gates(lines):
    """Each goal with what was found; met is None where it was not measured, or not so that it could
    be judged, which the note then says."""
    return [
        *equality_gates(lines),
        *speed_gates(lines),
        *count_gates(lines),
        *sparse_gates(lines),
        *inspect_gates(lines),
    ]


def title(case):
    place, stage, what = case
    return f"{what}, ZeRO-{stage}, {place}"


def equality_gates(lines):
    for line in of_kind(lines, "equal"):
        yield gate(
            f"{title((line['place'], line['stage'], line['what']))}: outputs equal",
            "compare_torch.py",
            line["found"],
            line["equal"],
        )


def speed_gates(lines):
    if not cases(lines):
        yield gate("speed", "universal ≥ 10×, fp32 ≥ 5×, ≤ 1.3 × cp", "not measured", None)
    for case in cases(lines):
        note = doubts(lines, case)
        found = middle(ratios(lines, case, "peer", "reread"))
        if found:
            goal = GOALS[case[2]]
            most = middle(ratios(lines, case, "peer", "floor"))
            yield gate(
                f"{title(case)}: DeepSpeed ÷ isoshard",
                f"≥ {goal}",
                f"{found:.1f}" + (f"; DeepSpeed ÷ the disk alone is {most:.1f}" if most else ""),
                None if note else found >= goal,
                note,
            )
        found = middle(ratios(lines, case, "stream", "cp"))
        if found:
            yield gate(
                f"{title(case)}: isoshard --verify=stream ÷ cp",
                f"≤ {GOALS['cp']}",
                f"{found:.2f}",
                None if note else found <= GOALS["cp"],
                note,
            )


def count_gates(lines):
    for line in of_kind(lines, "count", variant="stream"):
        name = title((line["place"], line["stage"], line["what"]))
        base = line["input_bytes"] + line["output_bytes"]
        share = (line["read_bytes"] + line["written_bytes"]) / base
        yield gate(
            f"{name}: bytes read + written ÷ (input + output)",
            f"≤ {GOALS['bytes']}",
            f"{share:.3f}",
            share <= GOALS["bytes"],
        )
        share = line["disk_bytes"] / max(1, line["output_bytes"])
        yield gate(
            f"{name}: room taken at the peak ÷ output",
            f"≤ {GOALS['disk']}",
            f"{share:.3f}",
            share <= GOALS["disk"],
        )
        yield gate(
            f"{name}: files that are no output", "0", str(line["temporary"]), line["temporary"] == 0
        )
    counted = [
        line
        for line in of_kind(lines, "count") + of_kind(lines, "sparse")
        if line["variant"] in ("stream", "reread")
    ]
    if counted:
        most = max(line["anon_bytes"] for line in counted) / MIB
        yield gate(
            "peak anonymous memory, every run of isoshard",
            f"≤ {GOALS['anon_mib']} MiB",
            f"{most:.0f} MiB",
            most <= GOALS["anon_mib"],
        )


def sparse_gates(lines):
    for line in of_kind(lines, "sparse"):
        share = line["output_on_disk"] / line["output_bytes"]
        yield gate(
            f"{line['what']} of sparse {line['input_bytes'] / 1e9:.0f} GB, {line['variant']}: "
            "output on disk",
            "≤ 1 %",
            f"{100 * share:.3f} % of {line['output_bytes'] / 1e9:.1f} GB",
            share <= 0.01,
            "" if line["input_bytes"] >= 50e9 else "source below 50 GB",
        )
    if not of_kind(lines, "sparse"):
        yield gate("sparse 50 GB: zero blocks stay holes", "≤ 1 %", "not measured", None)


def inspect_gates(lines):
    for line in of_kind(lines, "inspect", variant="first"):
        note = "; ".join(
            ["others used the processors"] * (line.get("others_share", 1) > QUIET)
            + ["fewer than 10,000 files"] * (line["files"] < 10000)
        )
        yield gate(
            f"inspect of {line['files']} files, {line['input_bytes'] / 1e12:.1f} TB",
            f"≤ {GOALS['inspect_s']} s",
            f"{line['wall_s']:.1f} s, {line['cpu_s']:.1f} processor-s, "
            f"{line['anon_bytes'] / MIB:.0f} MiB",
            None if note else line["wall_s"] <= GOALS["inspect_s"],
            note,
        )
    if not of_kind(lines, "inspect"):
        yield gate("inspect of 10,000 files, 2 TB", "≤ 5 s", "not measured", None)


# ---- tables --------------------------------------------------------------------------------------


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def speed_table(lines):
    rows = []
    for case in cases(lines):
        for variant in ("peer", "import", "reread", "stream", "cp"):
            found = runs(lines, case, variant)
            if not found:
                continue
            walls = sorted(line["wall_s"] for line in found)
            against = ratios(lines, case, "peer", variant)
            shown = (
                ""
                if variant in ("peer", "import") or not against
                else f"{middle(against):.1f} ({min(against):.1f} to {max(against):.1f})"
            )
            rows.append(
                [
                    title(case),
                    NAMES[variant],
                    f"{middle(walls):.2f}",
                    f"{walls[0]:.2f} to {walls[-1]:.2f}",
                    f"{middle([line['cpu_s'] for line in found]):.2f}",
                    shown,
                    f"{middle([line['others_share'] for line in found]):.0%}",
                ]
            )
    return table(
        [
            "conversion",
            "program",
            "wall s",
            "least to most",
            "processor-s",
            "DeepSpeed ÷ this",
            "others' load",
        ],
        rows,
    )


def count_table(lines):
    rows = []
    for line in of_kind(lines, "count") + of_kind(lines, "sparse"):
        base = line["input_bytes"] + line["output_bytes"]
        case = title((line["place"], line["stage"], line["what"]))
        name = NAMES[line["variant"]]
        own = line.get("program_bytes")
        rows.append(
            [
                case + (", sparse" if line["kind"] == "sparse" else ""),
                name,
                f"{line['input_bytes'] / 1e9:.2f}",
                f"{line['output_bytes'] / 1e9:.2f}",
                f"{(line['read_bytes'] + line['written_bytes']) / base:.3f}",
                f"{own / base:.3f}" if own else "",
                f"{line['anon_bytes'] / MIB:.0f}",
                f"{line['resident_bytes'] / MIB:.0f}",
                f"{line['disk_bytes'] / 1e9:.2f}",
                str(line["temporary"]),
            ]
        )
    return table(
        [
            "conversion",
            "program",
            "in GB",
            "out GB",
            "moved ÷ (in + out)",
            "its own count",
            "anon MiB",
            "resident MiB",
            "room at peak GB",
            "other files",
        ],
        rows,
    )


def gate_table(found):
    words = {True: "met", False: "**missed**", None: "no verdict"}
    return table(
        ["goal", "", "found", ""],
        [
            [
                line["name"],
                line["goal"],
                line["found"],
                words[line["met"]] + (f" ({line['note']})" if line["note"] else ""),
            ]
            for line in found
        ],
    )


def micro_table(lines):
    def rate(line):
        if "bytes_per_second" in line:
            return f"{line['bytes_per_second'] / 1e9:.1f} GB/s"
        return f"{line['items_per_second'] / 1e6:.2f} M/s" if "items_per_second" in line else ""

    return table(
        ["case", "processor time", "rate"],
        [
            [f"`{line['name']}`", f"{line['cpu_time']:.3g} {line['time_unit']}", rate(line)]
            for line in of_kind(lines, "micro")
        ],
    )


def text_report(lines):
    found = gates(lines)
    words = {True: "pass", False: "FAIL", None: "no verdict"}
    width = max(len(line["name"]) for line in found)
    return "\n".join(
        [speed_table(lines), "", count_table(lines), ""]
        + [
            f"{words[line['met']]:12}  {line['name']:{width}}  {line['goal']:16}  {line['found']}"
            f"{'  ' + line['note'] if line['note'] else ''}"
            for line in found
        ]
    )


INTRODUCTION = """# Performance

Written by `scripts/bench --write-docs`; do not edit. Every number below was measured by that script
on one machine; where a goal could not be measured this page says so.

{machine}

How: the input is made once by `bench/make_checkpoint.py` (a GPT-like model, random values) and
never trained. The outputs of both programs are compared first by `scripts/compare_torch.py`. Then
the programs take turns, {pairs} rounds (the other way round every second time), each with its own
output removed before the next starts; on disk the input is dropped from the page cache before every
run. A ratio is the median over rounds of
the ratio within a round. `isoshard` without a flag reads its output back (`--verify=reread`).
Others' load is the share of the processors that other programs used meanwhile; a time above 10 %
gets no verdict, nor does one with an input below 2 GB. Counts are the kernel's, of a run of its
own; they do not depend on the load.
"""

PRELIMINARY = """**Preliminary.** Times below come from a loaded machine, from an input below 2 GB,
or are missing; goals on time have no verdict there. `scripts/bench --write-docs` on a quiet machine
replaces this page.
"""


def page(lines):
    """docs/PERFORMANCE.md."""
    machine = of_kind(lines, "machine")[0]
    doubtful = not cases(lines) or any(doubts(lines, case) for case in cases(lines))
    parts = [
        INTRODUCTION.format(machine=machine["text"], pairs=machine["pairs"]),
        *([PRELIMINARY] * doubtful),
        "## Goals\n",
        gate_table(gates(lines)),
        "",
    ]
    if cases(lines):
        parts += [
            "## Time\n",
            *(
                f"Input, {line['place']}, ZeRO-{line['stage']}: {line['parameters'] / 1e6:.0f} M "
                f"parameters over {line['dp']} ranks, {line['bytes'] / 1e9:.2f} GB.\n"
                for line in of_kind(lines, "input")
            ),
            speed_table(lines),
            "",
            "## Bytes, memory, room\n",
            "Moved: bytes through read and write system calls, which for DeepSpeed leaves "
            "out what it reads through mapped memory. Other files: files seen below the "
            "target during the run that are no part of the result.\n",
            count_table(lines),
            "",
        ]
    if of_kind(lines, "inspect"):
        parts += [
            "## inspect\n",
            table(
                ["files", "TB", "run", "wall s", "processor-s", "anon MiB"],
                [
                    [
                        str(line["files"]),
                        f"{line['input_bytes'] / 1e12:.2f}",
                        line["variant"],
                        f"{line['wall_s']:.2f}",
                        f"{line['cpu_s']:.2f}",
                        f"{line['anon_bytes'] / MIB:.0f}",
                    ]
                    for line in of_kind(lines, "inspect")
                ],
            ),
            "",
        ]
    parts += [
        "## Kernels\n",
        micro_table(lines) if of_kind(lines, "micro") else "Not measured.",
        "",
        "## Commands\n",
        "```",
    ]
    parts += [line["command"] for line in of_kind(lines, "command")]
    return "\n".join(parts + ["```", ""])
