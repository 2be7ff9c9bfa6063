"""Turns the facts of scripts/peer.py into docs/peer_report.md and docs/peer_matrix.svg.

A fact is {version, group, case, check, result, detail}. Nothing is judged here: a result is printed
as it was found, and a detail wherever a result is not plainly "right".
"""

import html
import os
import re

DOCS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs")
TOOLS = [
    "DeepSpeed universal",
    "DeepSpeed fp32",
    "DeepSpeed another dp",
    "isoshard universal",
    "isoshard fp32",
    "isoshard another dp",
    "isoshard another stage",
]
# result: what the matrix says, fill, ink
LOOKS = {
    "right": ("right", "#cfe8cf", "#143d14"),
    "departs": ("right, by (a)", "#cfe8cf", "#143d14"),
    "lacks": ("right, lacks some", "#eef0c4", "#3d3a0c"),
    "refused": ("refused", "#d9d9de", "#333338"),
    "refused too": ("refused, its own too", "#d9d9de", "#333338"),
    "wrong": ("WRONG, silent", "#c0272d", "#ffffff"),
    "unjudged": ("not judged", "#f1f1f4", "#55555c"),
    "": ("not tried", "#ffffff", "#9a9aa2"),
}
SHOWN = [look for look in LOOKS if look != "departs"]
COLUMN, ROW, LEFT, TOP = 132, 24, 214, 84

HEAD = """# What the real DeepSpeed says to our files

Written by `scripts/peer.py` from its `results.jsonl`, one fact a line. Real engines of
DeepSpeed (torch 2.13.0, CPU, gloo, one process a rank) load what isoshard wrote from the
checkpoints of `traces/deepspeed`, train one step, and save. "Equal" is bit for bit: files by
`scripts/compare_torch.py`, live values by torch itself, whole states by `isoshard digest`.

| result | is |
|---|---|
| right | what was asked, every bit of it |
| lacks | every value right, but some tensors of the checkpoint are not in the output |
| refused | ended with an error, nothing to be taken for a result |
| **wrong** | ended well, and values differ from the truth: wrong and silent |
| unjudged | the recording holds no truth to judge by |
| refused too | DeepSpeed refuses just so what it wrote itself in that shape |
| departs | right; DeepSpeed's output differs by a departure decided in `deepspeed_errata.md` |
| none | there is nothing of DeepSpeed's to compare with |

Not shown by this: GPUs, NVMe, larger models, a second step. The files compared are compared less
`ds_config` (the run's own), DeepSpeed's copied scripts, our manifest and certificate, and, where
they differ by it alone, the padding of stage 3, which DeepSpeed never initialises. Live
moments are asked for only where DeepSpeed's accessors work (not under round robin, nor with two
groups); there the weights are looked at, and the files saved again hold the rest to account.
"""
GROUPS = {
    "aa": (
        "A/A: the same run twice",
        "Both runs' files are compared. If this fails, no other row " "means anything.",
        "SOURCE",
    ),
    "control": (
        "Round robin, with and without",
        "The same run with `round_robin_gradients` on and "
        "off; `isoshard digest` of what each saved. Round robin only moves shards, so the "
        "states must be one. This is the truth that the accessors cannot give.",
        "SOURCE",
    ),
    "universal": (
        "Our universal form, loaded by DeepSpeed",
        "`isoshard convert SOURCE/ckpt OURS/TAG_universal --to universal`, then `load_checkpoint` "
        "with `load_universal` on an engine of the shape in the second column, then "
        "`save_checkpoint` at once. *saved again = source*: weights, moments and steps by digest; "
        "*= theirs*: the files that DeepSpeed saved there from its own universal form.",
        "SOURCE and engine",
    ),
    "loader": (
        "Where DeepSpeed's universal loader is wrong by itself",
        "Round robin on in the engine that loads: it finds its masters through the same wrong map "
        "as its converter, so that a right universal form lands in wrong places and nothing is "
        "said. Load with round robin off (above), or use `isoshard reshard` (below). Several "
        "sub-groups at stage 3: the loader gives all of them one `step` object, which every step "
        "then advances once a sub-group; a `isoshard reshard` of the same state counts rightly "
        "(below). These rows are DeepSpeed's, not ours.",
        "SOURCE and engine",
    ),
    "reshard": (
        "Our resharded save folder, loaded by DeepSpeed as its own",
        "`isoshard reshard SOURCE/ckpt OURS --to …`, then a plain `load_checkpoint` there: "
        "*live state* against the recorded truth, *saved again* against ours. *theirs* is what "
        "DeepSpeed itself makes there from its universal form, where it can; one step from each "
        "must give the same files. Where it cannot go, theirs is an engine there whose weights, "
        "masters and moments are set to the recorded truth by DeepSpeed's own `safe_set_*` calls, "
        "no file taking part; without recorded masters, the source where it stands, compared by "
        "weights, moments and steps. Under round robin theirs is our universal form loaded without "
        "round robin. The last two columns: DeepSpeed's "
        "converters on our folder, equal to our own conversion and to the truth.",
        "SOURCE and --to",
    ),
    "reading": (
        "What DeepSpeed saves, converted by its tools and by ours",
        "A fresh run of the case's settings, its save folder through `ds_to_universal` and "
        "`zero_to_fp32`, and through `isoshard convert … --like VERSION`; the outputs compared.",
        "SOURCE",
    ),
    "matrix": (
        "Each recorded checkpoint through each tool",
        "![matrix](peer_matrix.svg)\n\nDeepSpeed's tools: `ds_to_universal "
        "--inject_missing_state`, `zero_to_fp32`, and a universal load at another dp (3 where it "
        "was 2, else 2). Ours: `convert --to universal`, `convert --to fp32`, and `reshard` to "
        "another dp or stage, loaded by a plain `load_checkpoint`, looked at, and saved again "
        "equal to ours.",
        "SOURCE",
    ),
}


def first_words(text, count=260):
    """The line that says why, without any machine's paths."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b|isoshard: ", line)]
    line = (told or lines or ["it said nothing"])[-1]
    line = re.sub(r"/[^\s'\"]*/([^\s'\"/]*)", r"\1", line)
    return line[:count] + ("…" if len(line) > count else "")


def is_bad(line):
    """A refusal of DeepSpeed's, or its own wrong output, says nothing against our files."""
    if line["group"] in ("loader", "note"):
        return False
    if line["group"] == "matrix":
        return line["check"].startswith("isoshard") and line["result"] == "wrong"
    return line["result"] in ("WRONG", "wrong", "refused")


def words(result):
    return f"**{result}**" if result in ("wrong", "WRONG") else result


def table(rows, first):
    """rows: {case: {check: fact}}"""
    checks = list(dict.fromkeys(check for facts in rows.values() for check in facts))
    notes, out = [], [f"| {first} | " + " | ".join(checks) + " |", "|---" * (len(checks) + 1) + "|"]
    for case, facts in rows.items():
        cells = []
        for check in checks:
            fact = facts.get(check)
            cells.append("–" if fact is None else words(fact["result"]))
            if fact and fact["result"] != "right" and fact["detail"]:
                notes.append(
                    f"- `{case}`, {check}, {fact['result']}: " f"{fact['detail'].replace('|', ' ')}"
                )
        out.append(f"| `{case}` | " + " | ".join(cells) + " |")
    return "\n".join(out + ([""] + notes if notes else []))


def summary(facts):
    out = [
        "| DeepSpeed | group | cases | right | lacks | refused | wrong | unjudged or none |",
        "|---" * 8 + "|",
    ]
    for version in sorted({f["version"] for f in facts}, reverse=True):
        for group, (title, *_) in GROUPS.items():
            here = [f for f in facts if (f["version"], f["group"]) == (version, group)]
            if group == "matrix":
                here = [f for f in here if f["check"].startswith("isoshard")]
                title += " (ours)"
            counts = [
                sum(f["result"].lower() in kinds for f in here)
                for kinds in (
                    ("right", "departs"),
                    ("lacks",),
                    ("refused", "refused too"),
                    ("wrong",),
                    ("unjudged", "none"),
                )
            ]
            if here:
                cases = len({f["case"] for f in here})
                out.append(
                    f"| {version} | {title} | {cases} | " + " | ".join(map(str, counts)) + " |"
                )
    return "\n".join(out)


def rows_of(facts, version, group):
    rows = {}
    for fact in facts:
        if (fact["version"], fact["group"]) == (version, group):
            rows.setdefault(fact["case"], {})[fact["check"]] = fact
    return rows


def report(facts):
    parts = [
        HEAD,
        "## In numbers\n\nEach number counts facts; a case has several.\n",
        summary(facts) + "\n",
    ]
    for group, (title, says, first) in GROUPS.items():
        versions = sorted({f["version"] for f in facts if f["group"] == group}, reverse=True)
        if versions:
            parts.append(f"## {title}\n\n{says}\n")
        for version in versions:
            parts.append(
                f"DeepSpeed {version}:\n\n" + table(rows_of(facts, version, group), first) + "\n"
            )
    notes = [f"- {fact['detail']}" for fact in facts if fact["group"] == "note"]
    if notes:
        parts.append("## About these runs\n\n" + "\n".join(notes) + "\n")
    return "\n".join(parts)


def text(x, y, words_shown, size=12, ink="#222226", anchor="middle", weight="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{ink}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{html.escape(words_shown)}</text>'
    )


def cell(x, y, look):
    shown, fill, ink = LOOKS[look]
    weight = "bold" if look == "wrong" else "normal"
    return (
        f'<rect x="{x + 1}" y="{y + 1}" width="{COLUMN - 2}" height="{ROW - 2}" rx="3" '
        f'fill="{fill}" stroke="#e2e2e6"/>'
        + text(x + COLUMN / 2, y + 16, shown, 11, ink, weight=weight)
    )


def matrix_svg(facts, version):
    rows = rows_of(facts, version, "matrix")
    width, height = LEFT + COLUMN * len(TOOLS) + 12, TOP + ROW * len(rows) + 56
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="DejaVu Sans, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(
            10,
            24,
            f"Checkpoint × tool: DeepSpeed {version} and isoshard",
            16,
            anchor="start",
            weight="bold",
        ),
    ]
    middle = LEFT + COLUMN * 3
    out += [
        text(LEFT + COLUMN * 1.5, 50, f"DeepSpeed {version}", 13, weight="bold"),
        text(middle + COLUMN * 2, 50, "isoshard", 13, weight="bold"),
    ]
    for index, tool in enumerate(TOOLS):
        out.append(text(LEFT + COLUMN * (index + 0.5), 72, "to " + tool.split(" ", 1)[1]))
    for line, (case, facts_here) in enumerate(sorted(rows.items())):
        y = TOP + ROW * line
        out.append(text(LEFT - 10, y + 16, case, anchor="end"))
        out += [
            cell(LEFT + COLUMN * index, y, facts_here.get(tool, {"result": ""})["result"])
            for index, tool in enumerate(TOOLS)
        ]
    out.append(
        f'<line x1="{middle}" y1="40" x2="{middle}" y2="{TOP + ROW * len(rows)}" '
        'stroke="#222226" stroke-width="1.5"/>'
    )
    y = TOP + ROW * len(rows) + 18
    out += [cell(LEFT + COLUMN * index, y, look) for index, look in enumerate(SHOWN)]
    out.append("</svg>")
    return "\n".join(out) + "\n"


def write(facts, version):
    with open(os.path.join(DOCS, "peer_report.md"), "w") as file:
        file.write(report(facts))
    with open(os.path.join(DOCS, "peer_matrix.svg"), "w") as file:
        file.write(matrix_svg(facts, version))
