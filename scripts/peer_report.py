"""Turns the facts of scripts/peer.py into docs/peer_report.md and docs/peer_matrix.svg.

A fact is {version, group, case, program, check, result, detail}. Nothing is judged here: a result
is printed as it was found, and a detail wherever a result is not plainly "right".
"""

import os
import re

import peer_matrix

DOCS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs")
HEAD = """# What the real DeepSpeed says to our files

Written by `scripts/peer.py` from its `results.jsonl`. Real engines of DeepSpeed (torch 2.13.0,
CPU, gloo, one process a rank) load what isoshard wrote from the checkpoints of `traces/deepspeed`,
train one step, and save. "Equal" is bit for bit: files by `scripts/compare_torch.py`, live values
by torch itself, whole states by `isoshard digest`.

| result | is |
|---|---|
| right | what was asked, every bit of it |
| lacks | every value right, but some tensors of the checkpoint are not in the output |
| refused | ended with an error, nothing to be taken for a result |
| **wrong** | ended well, and values differ from the truth: wrong and silent |
| unjudged | the recording holds no truth to judge by |
| refused too | DeepSpeed refuses just so what it wrote itself in that shape |
| theirs wrong | ours is right; DeepSpeed's tool is as wrong on what DeepSpeed wrote itself |
| departs | right; DeepSpeed's output differs by a departure decided in `deepspeed_errata.md` |
| none | there is nothing of DeepSpeed's to compare with |

Not shown by this: GPUs, NVMe, larger models, a second step; Ulysses and the matrix with older
versions. Errata are numbered as in [deepspeed_errata](deepspeed_errata.md).

Files are compared less `ds_config` (the run's own), DeepSpeed's copied scripts, our manifest and
certificate. Where they differ by it alone, the padding of stage 3, which DeepSpeed never
initialises (erratum 22), and the slice maps of round robin, which it writes wrong (erratum 1), are
left out too, and the whole states are compared by digest instead. Live moments are asked for only
where DeepSpeed's accessors work (not under round robin, nor with two groups); elsewhere the weights
are looked at, and the files saved again hold the rest to account. With DeepSpeed before 0.19 the
harness waits for each gather, and before 0.18 it switches `load_universal` off again after the load
(errata 38, 37); without that, what DeepSpeed shows and saves is wrong at stage 3, whatever it was
given.
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
        "Where DeepSpeed itself is at fault",
        "These rows are DeepSpeed's, not ours. Round robin on in the engine that loads a universal "
        "form: it finds its masters through the same wrong map as its converter, so that right "
        "values land in wrong places and nothing is said (erratum 39). Load with round robin off "
        "(above), or use `isoshard reshard` (below). Several sub-groups at stage 3: the loader "
        "gives all of them one `step` object, which every step then advances once a sub-group "
        "(erratum 40); `isoshard reshard` of the same state counts rightly (below). Saved again at "
        "stage 3 with `load_universal` on: erratum 37. The accessors after a plain load at stages "
        "1 and 2: erratum 42. A universal load under Ulysses: erratum 36.",
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
    if line["group"] == "loader":
        return False
    if line["group"] == "matrix":
        return line["check"].startswith("isoshard") and line["result"] in ("wrong", "refused")
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
        "| DeepSpeed | group | cases | right | lacks | its too | refused | wrong | not judged |",
        "|---" * 9 + "|",
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
                    ("refused too", "theirs wrong"),
                    ("refused",),
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


def whole_or_not(facts, missing):
    """What was run, with which program, and what of it is not right."""
    programs = sorted({fact["program"] for fact in facts})
    ours = [fact for fact in facts if fact["group"] != "loader" and not
            (fact["group"] == "matrix" and fact["check"].startswith("DeepSpeed"))]
    bad = sum(is_bad(fact) for fact in ours)
    out = [f"Program: {'; '.join(programs)}. {len(ours)} facts about our files: {bad} not right."]
    if missing:
        names = ", ".join(f"{version} {group} `{case}`" for version, group, case in missing)
        out.append(f"**Partial.** {len(missing)} cases were not run: {names}.")
    else:
        out.append("All cases of `scripts/peer_plan.py` were run.")
    return "\n\n".join(out) + "\n"


def report(facts, missing):
    parts = [
        HEAD,
        "## In numbers\n",
        whole_or_not(facts, missing),
        "Each number counts facts; a case has several. *Its too*: `refused too` and `theirs "
        "wrong`. *Not judged*: `unjudged` and `none`.\n",
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
    return "\n".join(parts)


def write(facts, missing, version):
    with open(os.path.join(DOCS, "peer_report.md"), "w") as file:
        file.write(report(facts, missing))
    with open(os.path.join(DOCS, "peer_matrix.svg"), "w") as file:
        file.write(peer_matrix.drawing(rows_of(facts, version, "matrix"), version))
