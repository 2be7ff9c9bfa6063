"""Which faults of DeepSpeed are there in which version? For scripts/peer.py --errata.

Every script of traces/repro is run under every version, one at a time, and its exit status says it:

    there   1: the fault was seen
    gone    0: it was looked for and not seen
    n/a     77: it cannot be tried in this version; the script prints why
    error   anything else, also a script that takes longer than TIMEOUT_S

Each run becomes a line of OUT/errata.jsonl, with what the script printed last. The last run of a
script counts, and none of another text of its code. From these lines the table between the two
markers of docs/errata_matrix.md is written; a cell is empty where nothing ran.

Not verified: that a script sees the fault that its text describes; GPUs; other versions of torch.
"""
import glob
import hashlib
import json
import os
import re
import subprocess

from peer_report import DOCS
from peer_tools import ROOT

SCRIPTS = os.path.join(ROOT, "traces", "repro")
PAGE = os.path.join(DOCS, "errata_matrix.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
WORDS = {0: "gone", 1: "there", 77: "n/a"}
TIMEOUT_S = 300
HEAD = f"""# Faults of DeepSpeed by version

Written by `scripts/peer.py --errata`, which runs every script of
[traces/repro](../traces/repro/README.md) under every version (torch 2.13.0, transformers 5.6.2,
CPU): the fault is there, gone, or n/a. Rows are those of [deepspeed_errata](deepspeed_errata.md).

{BEGIN}
{END}
"""


def scripts():
    """[(row of the errata, name, digest of what follows the docstring)] by row, then by name."""
    found = []
    for path in glob.glob(os.path.join(SCRIPTS, "*.py")):
        with open(path) as file:
            text = file.read()
        row = re.search(r"^Errata: row (\d+)\.$", text, re.MULTILINE)
        if not row:
            raise SystemExit(f"{path}: no line 'Errata: row N.'")
        digest = hashlib.sha256(text.split('"""')[2].encode()).hexdigest()[:16]
        found.append((int(row.group(1)), os.path.basename(path)[:-3], digest))
    return sorted(found)


def environment(python, overlay):
    """Nothing of the caller's but what a program needs to start."""
    kept = {key: os.environ[key] for key in ("HOME", "TMPDIR", "LANG") if key in os.environ}
    return {**kept, "PATH": os.pathsep.join((os.path.dirname(python), os.defpath)),
            "PYTHONPATH": overlay, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_script(python, overlay, name):
    """(word, what it printed last)"""
    command = [python, os.path.join(SCRIPTS, name + ".py")]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", timeout=TIMEOUT_S, env=environment(python, overlay))
    except subprocess.TimeoutExpired:
        return "error", f"not ended after {TIMEOUT_S} s"
    lines = done.stdout.strip().splitlines() or [""]
    return WORDS.get(done.returncode, "error"), lines[-1][:300]


def run(options, overlays):
    """Appends to OUT/errata.jsonl; `overlays` is {version: folder to put first on PYTHONPATH}."""
    with open(os.path.join(options.out, "errata.jsonl"), "a") as results:
        for row, name, digest in scripts():
            if not re.search(options.cases, f"{row} {name}"):
                continue
            for version, overlay in overlays.items():
                word, said = run_script(options.python, overlay, name)
                line = {"row": row, "name": name, "digest": digest, "version": version,
                        "result": word, "said": said}
                print(json.dumps(line), file=results, flush=True)
                print(f"{row} {name} {version}: {word}: {said}", flush=True)


def read_results(out):
    """{(name, digest, version): word}; the last line counts."""
    with open(os.path.join(out, "errata.jsonl")) as file:
        return {(line["name"], line["digest"], line["version"]): line["result"]
                for line in map(json.loads, file)}


def table(results, versions):
    lines = [f"| row | script | {' | '.join(versions)} |", "|---|---|" + "---|" * len(versions)]
    for row, name, digest in scripts():
        cells = [results.get((name, digest, version), "") for version in versions]
        lines.append(f"| {row} | [{name}](../traces/repro/{name}.py) | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(out, versions):
    """Writes the page and prints its table; returns the cells, empty where nothing ran."""
    results = read_results(out)
    page = HEAD
    if os.path.exists(PAGE):
        with open(PAGE) as file:
            page = file.read()
    before, rest = page.split(BEGIN + "\n")
    after = rest.split(END, 1)[1]
    with open(PAGE, "w") as file:
        file.write(f"{before}{BEGIN}\n{table(results, versions)}\n{END}{after}")
    print(table(results, versions))
    return [results.get((name, digest, version), "")
            for _, name, digest in scripts() for version in versions]
