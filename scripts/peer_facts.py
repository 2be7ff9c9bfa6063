"""The facts that scripts/peer.py establishes, one function a group.

Each takes a Peer and a case of peer_plan.py and yields (check, result, detail); peer_report.py says
what the results mean. Capital WRONG: two things that must be one differ; small "wrong": values
differ from the recorded truth.
"""
import os

import peer_plan
from peer_report import first_words
from peer_tools import (RECORDINGS, REFERENCE, SAVED_AGAIN, look_of, settings, target_case,
                        writer_of)

KINDS = {"ds_to_universal": "universal", "zero_to_fp32": "fp32"}
ANOTHER_STAGE = {0: 2, 1: 3, 2: 3, 3: 1}


def equal_as_right(outcome):
    return {"equal": "right", "different": "WRONG"}[outcome[0]], outcome[1]


def aa(peer, source):
    case, load = settings(source), os.path.join(RECORDINGS, source, "ckpt")
    for kind, folder in (("trained", None), ("loaded and stepped", load)):
        outs = [peer.folder("aa", source, kind[:6], turn) for turn in "12"]
        runs = [peer.engine(case, folder, out, steps=1 if folder else 3) for out in outs]
        failed = [text for good, text in runs if not good]
        if failed:
            yield kind, "refused", first_words(failed[0])
        else:
            saved = [os.path.join(out, "step") for out in outs]
            yield (kind, *equal_as_right(peer.same_saved(*saved, case)))


def control(peer, source):
    """Round robin moves shards, never values: with and without it the saved state is one."""
    cases = settings(source), {**settings(source), **peer_plan.RR_OFF}
    outs = [peer.folder("control", source, way) for way in ("on", "off")]
    runs = [peer.engine(case, None, out, steps=3) for case, out in zip(cases, outs)]
    failed = [text for good, text in runs if not good]
    if failed:
        yield "state", "refused", first_words(failed[0])
    else:
        yield ("state", *equal_as_right(peer.same_state(*(os.path.join(o, "step") for o in outs))))


def refused_too(words, what, attempt):
    """Is what DeepSpeed made itself refused in the same words?"""
    good, text = attempt()
    if not good and first_words(text) == words:
        return "refused too", f"{what} as well: {words}"
    return "refused", words


def universal(peer, source, to, change=(), recorded=None):
    name, ckpt = "-".join(("universal", source, to, *change)), \
        os.path.join(RECORDINGS, source, "ckpt")
    out, ours = peer.folder(name, "out"), peer.folder(name, "ours")
    good, text = peer.ours("ds_to_universal", ckpt, ours)
    yield "convert", *(("right", "") if good else ("refused", first_words(text)))
    if not good:
        return
    case = target_case({**settings(source), "load_universal": True}, to, change)
    # Before 0.19, an accessor returned a moment after a universal load.
    look = look_of(case) if peer.version >= "0.19" else "param"
    good, text = peer.engine(case, ours, out, look)
    theirs = os.path.join(RECORDINGS, source, "universal")
    yield "load", *(("right", "") if good else
                    refused_too(first_words(text), "DeepSpeed's own universal form",
                                lambda: peer.engine(case, theirs, peer.folder(name, "own"))))
    if good:
        yield ("live state", *peer.judge("live", os.path.join(out, "live"), source))
        again = os.path.join(out, "again")
        yield ("saved again = source", *equal_as_right(peer.same_state(ckpt, again)))
        if recorded and peer.version == REFERENCE:
            yield ("saved again = theirs", *equal_as_right(peer.compare(
                os.path.join(RECORDINGS, recorded, "ckpt"), again, *SAVED_AGAIN)))


def subgroups(peer, source, to):
    """One step from DeepSpeed's own universal form, against one from the truth set by hand."""
    recording, case = os.path.join(RECORDINGS, source), target_case(settings(source), to)
    outs = [peer.folder("loader", source, way) for way in ("universal", "truth")]
    runs = [peer.engine({**case, "load_universal": True}, os.path.join(recording, "universal"),
                        outs[0]),
            peer.engine(case, None, outs[1], truth=os.path.join(recording, "truth", "rank0.pt"))]
    failed = [text for good, text in runs if not good]
    if failed:
        yield "step after its own form", "refused", first_words(failed[0])
    else:
        yield ("step after its own form", *equal_as_right(
            peer.same_state(*(os.path.join(out, "step") for out in reversed(outs)))))


def resaved(peer, source, to):
    """Loaded from our universal form and saved at once: are all the files there?"""
    ours, out = peer.folder("loader", source, "ours"), peer.folder("loader", source, "resaved")
    peer.ours("ds_to_universal", os.path.join(RECORDINGS, source, "ckpt"), ours)
    case = target_case({**settings(source), "load_universal": True}, to)
    good, text = peer.engine(case, ours, out, steps=0, as_it_is=True)
    if good:
        good, text = peer.isoshard("digest", os.path.join(out, "again"))
        yield "saved again", "right" if good else "wrong", "" if good else first_words(text)
    else:
        yield "saved again", "refused", first_words(text)


def newer(peer, source):
    """What the reference version saved, loaded as it is."""
    good, text = peer.engine(settings(source), os.path.join(RECORDINGS, source, "ckpt"),
                             peer.folder("loader", source, "newer"), steps=0)
    yield f"load of what {REFERENCE} saved", "right" if good else "refused", \
        "" if good else first_words(text)


def accessors(peer, source):
    """safe_get_full_optimizer_state after a plain load of the source where it stood."""
    good, text = peer.engine(settings(source), os.path.join(RECORDINGS, source, "ckpt"),
                             peer.folder("loader", source, "accessors"), "all", steps=0,
                             as_it_is=True)
    yield "accessors after its own load", "right" if good else "refused", \
        "" if good else first_words(text)


def compare_with_theirs(peer, source, theirs, case, name):
    """Files, and one step from theirs, the same one."""
    recording, truth = os.path.join(RECORDINGS, source), None
    out = peer.folder(name, "theirs")
    ours_step, again = peer.path(name, "out", "step"), peer.path(name, "out", "again")
    if theirs in ("universal", "rr"):
        case, load = {**case, "load_universal": True}, os.path.join(recording, "universal")
        if theirs == "rr":
            case, load = {**case, **peer_plan.RR_OFF}, peer.folder(name, "universal")
            peer.ours("ds_to_universal", os.path.join(recording, "ckpt"), load)
    elif theirs == "source":
        case, load = settings(source), os.path.join(recording, "ckpt")
    elif theirs == "truth":
        load, truth = None, os.path.join(recording, "truth", "rank0.pt")
    else:
        load = os.path.join(RECORDINGS, theirs, "ckpt")
    good, text = peer.engine(case, load, out, truth=truth)
    if not good:
        yield "same step as theirs", "none", "theirs: " + first_words(text)
        return
    if theirs not in ("rr", "source", "truth") and peer.version == REFERENCE:
        yield ("files = theirs", *equal_as_right(peer.same_saved(
            os.path.join(out, "again"), again, case)))
    exact = theirs not in ("rr", "source") and peer.version == REFERENCE
    ignored = ("--ignore", r"\['global_samples'\]") if theirs == "truth" else ()
    outcome = peer.same_saved(os.path.join(out, "step"), ours_step, case, ignored) if exact else \
        peer.same_state(os.path.join(out, "step"), ours_step)
    yield ("same step as theirs", *equal_as_right(outcome))


def own_run(peer, case, out):
    """A run of the case's own, laid out as a recording: ckpt, and truth from the live engine."""
    saved = peer.engine(case, None, out, look_of(case), case.get("steps", 3))
    for name, part in (("ckpt", "step"), ("truth", "live")):
        os.symlink(part, os.path.join(out, name))
    return saved


def own_folder(peer, case, name, use):
    """What `use` does with a save folder of the same shape that DeepSpeed wrote itself."""
    own = peer.folder(name, "own")
    saved, text = own_run(peer, case, own)
    return use(os.path.join(own, "step")) if saved else (saved, text)


def wrong_too(peer, case, name, tool, said):
    """Is this tool of DeepSpeed's as wrong on a save folder that DeepSpeed wrote itself?"""
    own, out = peer.folder(name, "own"), peer.folder(name, tool, "own")
    if own_run(peer, case, own)[0] and peer.tool(tool, os.path.join(own, "step"), out)[0]:
        if peer.judge(KINDS[tool], out, case["name"], own) == ("wrong", said):
            return "theirs wrong", f"on its own save folder of this shape as well: {said}"
    return "WRONG", said


def converters(peer, ours, name, source, case):
    """DeepSpeed's own converters on our folder, against ours and against the truth."""
    for tool in KINDS:
        outs = [peer.folder(name, tool, side) for side in ("theirs", "ours")]
        kind = KINDS[tool]
        good, text = peer.tool(tool, ours, outs[0])
        if not good:
            yield tool, *refused_too(
                first_words(text), "its own save folder of this shape",
                lambda: own_folder(peer, case, name, lambda own: peer.tool(tool, own, outs[0])))
            continue
        judged = peer.judge(kind, outs[0], source)
        like = () if peer.version == REFERENCE else ("--like", peer.version)
        done, text = peer.ours(tool, ours, outs[1], *like)
        outcome = peer.compare(*outs) if done else ("different", first_words(text))
        if outcome[0] == "different" and judged[0] in ("right", "lacks"):
            mine = peer.judge(kind, outs[1], source)
            decided = mine[0] == "right" and (judged[0] == "lacks" or case.get("steps") == 0)
            judged = ("departs" if decided else "WRONG"), f"{judged[1]}; {outcome[1]}"
        elif judged[0] == "wrong" and peer.judge(kind, outs[1], source)[0] in ("right", "lacks"):
            judged = wrong_too(peer, case, name, tool, judged[1])
        yield tool, judged[0], judged[1]


def plain_load(peer, source, to, name, steps):
    """Resharded by us, loaded by a plain load_checkpoint."""
    ours, out = peer.folder(name, "ours"), peer.folder(name, "out")
    case = target_case(settings(source), to)
    good, text = peer.isoshard("reshard", os.path.join(RECORDINGS, source, "ckpt"), ours,
                               "--to", to)
    yield "reshard", *(("right", "") if good else ("refused", first_words(text)))
    if not good:
        return
    good, text = peer.engine(case, ours, out, look_of(case), steps)
    yield "load", *(("right", "") if good else refused_too(
        first_words(text), "its own save folder of this shape",
        lambda: own_folder(peer, case, name, lambda own: peer.engine(
            case, own, peer.folder(name, "ownload")))))
    if good:
        yield ("live state", *peer.judge("live", os.path.join(out, "live"), source))
        again = os.path.join(out, "again")
        outcome = peer.same_saved(ours, again, case) \
            if peer.version == writer_of(source) else peer.same_state(ours, again)
        yield ("saved again = ours", *equal_as_right(outcome))


def reshard(peer, source, to, theirs):
    name = f"reshard-{source}-{to}"
    case, results = target_case(settings(source), to), {}
    for fact in plain_load(peer, source, to, name, 1):
        results[fact[0]] = fact[1]
        yield fact
    if results.get("load") == "right" and theirs:
        yield from compare_with_theirs(peer, source, theirs, case, name)
    if results["reshard"] == "right" and case["stage"]:
        yield from converters(peer, peer.path(name, "ours"), name, source, case)


def loaded(peer, source, to):
    """One result for the matrix."""
    for check, result, detail in plain_load(peer, source, to, f"matrix-{source}-{to}", 0):
        if result not in ("right", "lacks"):
            return result.lower(), f"{to}: {check}: {detail}"
    return "right", to


def matrix(peer, source):
    case, ckpt = settings(source), os.path.join(RECORDINGS, source, "ckpt")
    universals = {}
    for side, convert in (("DeepSpeed", peer.tool), ("isoshard", peer.ours)):
        for tool, kind in KINDS.items():
            out = peer.folder("matrix", source, side, tool)
            good, text = convert(tool, ckpt, out)
            if good and kind == "universal":
                universals[side] = out
            outcome = peer.judge(kind, out, source) if good else ("refused", first_words(text))
            yield (f"{side} {kind}", *outcome)
    if case["name"].startswith("trainer_"):
        return  # its model and its client state are the Trainer's
    data = case["world"] // case.get("ulysses", 1)
    another = f"dp={2 if data != 2 else 1 if 'ulysses' in case else 3}"
    if "DeepSpeed" in universals:
        out = peer.folder("matrix", source, "elsewhere")
        there = target_case({**case, "load_universal": True}, another)
        good, text = peer.engine(there, universals["DeepSpeed"], out, look_of(there), steps=0)
        yield ("DeepSpeed another dp", *(peer.judge("live", os.path.join(out, "live"), source)
                                         if good else ("refused", first_words(text))))
    else:
        yield "DeepSpeed another dp", "refused", "it has no universal form"
    yield ("isoshard another dp", *loaded(peer, source, another))
    stage = ANOTHER_STAGE[case["stage"]]
    yield ("isoshard another stage", *loaded(peer, source, f"dp={data},stage={stage}"))


def reading(peer, source):
    """What this version saves, through its converters and through ours."""
    case, out = settings(source), peer.folder("reading", source)
    good, text = own_run(peer, case, out)
    yield "save", *(("right", "") if good else ("refused", first_words(text)))
    if not good:
        return
    ckpt = os.path.join(out, "step")
    for tool in KINDS:
        outs = [peer.folder("reading", source, tool, side) for side in ("theirs", "ours")]
        good, text = peer.tool(tool, ckpt, outs[0])
        done, said = peer.ours(tool, ckpt, outs[1], "--like", peer.version)
        if not done:
            yield tool, "refused", first_words(said)
        elif not good:
            yield tool, "none", "theirs: " + first_words(text)
        else:
            result = equal_as_right(peer.compare(*outs))
            if result[0] == "WRONG":
                his, mine = (peer.judge(KINDS[tool], folder, source, out) for folder in outs)
                if his[0] == "wrong" and mine[0] in ("right", "lacks"):
                    result = "theirs wrong", f"{his[1]}; {result[1]}"
            yield tool, *result
