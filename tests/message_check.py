"""What every failure must say, by text and as JSON: which operation failed, on which file or rank,
the errno by number, name and words or what was expected and what was found, what is safe now, and
what to do next. No control characters, and nothing of the library's or the language's own noise.

    from message_check import problems
    self.assertEqual(problems(result.stderr, result.stdout, published=target.exists()), [])

Run by itself it takes a good message apart and demands that each spoiled one is told. Python's
standard library only. Not verified: that `next` helps; people judge that.
"""

import errno
import json
import os
import re

LABEL = re.compile(r"^  (file|entry|expected|found|safe now|next): +(.*)$")
KEYS = {"what": "what", "file": "file", "entry": "entry", "expected": "expected",
        "found": "found", "safe now": "safe", "next": "next"}  # fmt: skip
ERRNO = re.compile(r"errno (\d+)(?:, (\w+))?")
# The program's own words where they are not the C library's.
WORDS = {
    "ENOSPC": "no space left", "EDQUOT": "quota", "EROFS": "read-only", "EIO": "input/output error",
    "EACCES": "permission denied", "ENOENT": "no such file", "EEXIST": "taken",
    "ENOTEMPTY": "not empty", "ENOTDIR": "not a folder", "EISDIR": "is a folder",
    "ELOOP": "link", "ENAMETOOLONG": "too long", "EMFILE": "too many files",
    "ENFILE": "too many files", "ESTALE": "stale", "EFBIG": "larger than allowed",
    "ENOSYS": "no such operation", "ENOTSUP": "does not support", "EOPNOTSUPP": "does not support",
    "EXDEV": "different file systems",
}  # fmt: skip
NOISE = re.compile(r"std::|terminate called|what\(\)|\[json|nlohmann|basic_string|0x[0-9a-f]{9,}")
# What is said instead of expected and found: nothing was compared, and no system call failed.
ALONE = re.compile(r"interrupted|already|exists|has the target's name|standard output")


def parts(text):
    """{what, file, …} of the one message in stderr; {} where there is none."""
    at = text.find("isoshard: ")
    found, last = {}, "what"
    if at < 0:
        return found
    for line in text[at + len("isoshard: ") :].rstrip("\n").split("\n"):
        label = LABEL.match(line)
        if label:
            last = label[1]
        found[last] = found[last] + "\n" + line if last in found else label[2] if label else line
    return found


def names_the_cause(told, of_content):
    """A failed call by number, name and words; or what was expected or found."""
    what, found = told.get("what", ""), told.get("found", "")
    said = ERRNO.search(found)
    if said is None:
        # Of a part of a file whose form is wrong the sentence itself says how it differs.
        named = told.get("expected") or found or told.get("entry") or ALONE.search(what)
        if not named and not of_content:
            yield "neither an errno nor what was expected or found"
        return
    if getattr(errno, said[2] or "", None) != int(said[1]):
        yield f"errno {said[1]} is called {said[2]}"
    elif WORDS.get(said[2], os.strerror(int(said[1])).lower()) not in what.lower():
        yield f"{said[2]} is not told in words"


def agrees_with_json(told, answer):
    """The error object of --json has what the text has."""
    try:
        objects = [json.loads(line) for line in answer.splitlines() if line.startswith("{")]
    except ValueError as error:
        yield f"no JSON on stdout: {error}"
        return
    errors = [each for each in objects if each.get("kind") == "error"]
    if len(errors) != 1:
        yield f"{len(errors)} error objects in the JSON"
        return
    if errors[0].get("schema") != 1 or not errors[0].get("code"):
        yield "the error object has no schema or code"
    for label, key in KEYS.items():
        if errors[0].get(key) != told.get(label, ""):
            yield f"{label} differs between JSON and text: {errors[0].get(key)!r}"


def problems(text, answer=None, published=None, of_content=False):
    """What is wrong with a failure's message: [] if nothing is. `answer`: stdout of a run with
    --json. `published`: whether the target is there, which `safe now` must not deny.
    `of_content`: the input itself is refused, and its sentence says how its form is wrong."""
    told, wrong = parts(text), []
    if text.count("isoshard: ") != 1:
        return [f"{text.count('isoshard: ')} messages instead of one"]
    what, safe, after = (told.get(key, "") for key in ("what", "safe now", "next"))
    sentence = what.split("\n")[0]  # a list may follow
    if len(sentence.split()) < 3 or not sentence.endswith((".", "!", "?")):
        wrong.append("no sentence that names the operation")
    places = told.get("file") or told.get("entry") or re.search(r"\brank\b", text)
    if not places and "interrupted by signal" not in what:  # which concerns no file
        wrong.append("neither a path nor a rank")
    wrong += names_the_cause(told, of_content)
    if len(safe.split()) < 3:
        wrong.append("not said what is safe now")
    if published and "nothing was published" in safe:
        wrong.append("`safe now` denies the target that is there")
    if published is False and re.search(r"\bis published|\bis whole under", safe):
        wrong.append("`safe now` promises a target that is not there")
    if len(after.split()) < 2:
        wrong.append("not said what to do next")
    if any(ord(c) < 32 and c != "\n" or 0x7F <= ord(c) < 0xA0 for c in text):
        wrong.append("control characters")
    if NOISE.search(text):
        wrong.append(f"noise: {NOISE.search(text)[0]}")
    if answer is not None:
        wrong += agrees_with_json(told, answer)
    return wrong


GOOD = """isoshard: Writing to the file failed: no space left on device.
  file:     /x/out/a.pt
  entry:    byte 12
  expected: room for 512 more bytes
  found:    errno 28, ENOSPC; 0 bytes free
  safe now: the source was only read; nothing was published
  next:     free space on this file system, or choose a target on another one
"""
SPOILED = (
    ("isoshard: ", "", "0 messages"),
    ("/x/out", "isoshard: /x/out", "2 messages"),
    ("Writing to the file failed: no space left on device.", "ENOSPC", "names the operation"),
    ("  file:     /x/out/a.pt\n  entry:    byte 12\n", "", "neither a path nor a rank"),
    ("28, ENOSPC", "28, EIO", "errno 28 is called EIO"),
    ("28, ENOSPC", "28", "errno 28 is called None"),
    ("no space left", "something is wrong", "not told in words"),
    ("the source was only read; nothing was published", "", "what is safe now"),
    ("nothing was published", "it is published", "promises a target"),
    ("free space on this file system, or choose a target on another one", "", "what to do next"),
    ("byte 12", "byte \x1b[31m", "control characters"),
    ("byte 12", "std::bad_alloc", "noise"),
)


def self_test():
    told = {key: parts(GOOD).get(label, "") for label, key in KEYS.items()}
    answer = json.dumps({"schema": 1, "kind": "error", "code": "no_space", **told})
    assert problems(GOOD, answer, published=False) == [], problems(GOOD, answer, False)
    assert any("denies" in each for each in problems(GOOD, answer, published=True))
    for old, new, expected in SPOILED:
        assert old in GOOD, old
        found = problems(GOOD.replace(old, new), published=False)
        assert any(expected in each for each in found), (expected, found)
    for spoiled in ("", answer.replace("byte 12", "byte 13"), answer.replace('"code"', '"x"')):
        assert problems(GOOD, spoiled, published=False), spoiled
    print(f"message_check.py: a good message, and {len(SPOILED) + 4} spoiled ones")


if __name__ == "__main__":
    self_test()
