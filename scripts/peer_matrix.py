"""Draws docs/peer_matrix.svg for scripts/peer.py: checkpoint × tool, a word and a colour a cell.

Three colours, for right, refused, and wrong without a word; each cell says it in words too. It has
its own background, so it reads on a white page and on a dark one, at 900 pixels.
"""
import html

TOOLS = [("DeepSpeed", "universal"), ("DeepSpeed", "fp32"), ("DeepSpeed", "another dp"),
         ("isoshard", "universal"), ("isoshard", "fp32"), ("isoshard", "another dp"),
         ("isoshard", "another stage")]
GREEN, GREY, RED, BLANK = [("#cfe8cf", "#143d14"), ("#d5d5dc", "#2b2b30"), ("#c0272d", "#ffffff"),
                           ("#ffffff", "#6a6a72")]
LOOKS = {  # result: what the cell says, (fill, ink), what the key says of it
    "right": ("right", GREEN, "every bit of it"),
    "lacks": ("right, lacks", GREEN, "every value right, but some tensors are not in the output"),
    "refused": ("refused", GREY, "ended with an error, nothing to be taken for a result"),
    "refused too": ("refused too", GREY, "DeepSpeed refuses just so what it wrote itself there"),
    "wrong": ("WRONG, silent", RED, "ended well, and values differ from the truth"),
    "unjudged": ("not judged", BLANK, "the recording holds no truth"),
    "": ("not tried", BLANK, "another model, with a trainer around it"),
}
COLUMN, ROW, LEFT, TOP, WIDTH = 100, 22, 190, 78, 900


def text(x, y, words, size=12, ink="#222226", anchor="middle", weight="normal"):
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{ink}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{html.escape(words)}</text>')


def cell(x, y, result):
    shown, (fill, ink), _ = LOOKS[result]
    return (f'<rect x="{x + 1}" y="{y + 1}" width="{COLUMN - 2}" height="{ROW - 2}" rx="3" '
            f'fill="{fill}" stroke="#dcdce2"/>'
            + text(x + COLUMN / 2, y + 15, shown, 11, ink,
                   weight="bold" if result == "wrong" else "normal"))


def head(version):
    middle = LEFT + COLUMN * 3
    out = [text(12, 24, f"Checkpoint × tool: DeepSpeed {version} and isoshard", 16, anchor="start",
                weight="bold"),
           text(LEFT + COLUMN * 1.5, 48, f"DeepSpeed {version} to", 13, weight="bold"),
           text(middle + COLUMN * 2, 48, "isoshard to", 13, weight="bold")]
    return out + [text(LEFT + COLUMN * (index + 0.5), 68, kind)
                  for index, (_, kind) in enumerate(TOOLS)]


def drawing(rows, version):
    """rows: {case: {check: fact}}"""
    bottom = TOP + ROW * len(rows)
    used = {facts.get(" ".join(tool), {"result": ""})["result"]
            for facts in rows.values() for tool in TOOLS}
    keys = [result for result in LOOKS if result in used]
    height, out = bottom + 14 + ROW * len(keys) + 10, head(version)
    for line, (case, facts) in enumerate(sorted(rows.items())):
        y = TOP + ROW * line
        out.append(text(LEFT - 10, y + 15, case, anchor="end"))
        out += [cell(LEFT + COLUMN * index, y, facts.get(" ".join(tool), {"result": ""})["result"])
                for index, tool in enumerate(TOOLS)]
    middle = LEFT + COLUMN * 3
    out.append(f'<line x1="{middle}" y1="38" x2="{middle}" y2="{bottom}" stroke="#222226" '
               'stroke-width="1.5"/>')
    for line, result in enumerate(keys):
        y = bottom + 14 + ROW * line
        out += [cell(LEFT, y, result),
                text(LEFT + COLUMN + 10, y + 15, LOOKS[result][2], anchor="start")]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="DejaVu Sans, Arial, sans-serif">',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="#ffffff" '
        'stroke="#c9c9d1"/>', *out, "</svg>"]) + "\n"
