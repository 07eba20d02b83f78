"""Phrases that a stranger to this library does not understand, and what to write instead: ``python -m tests.phrases``.

The command reads comments, docstrings and other strings of Python files, and pages; text in backticks is code. It
prints file, line, phrase and better words, and exits with 1 if it finds any. A phrase belongs here only if it has no
rightful use.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", ".github", "docs", "examples",
    "benchmarks/README.md", "callbacks", "lightning_fedscale",
)  # fmt: skip

BETTER = {
    "anew": "again",
    "as ever": "as before, or as usual",
    "as (it|they) (is|are) told": "as requested",
    "as without": "with and without it",
    "(is|are|was|were|be|been) told": "is given, reported, or logged",
    "told apart": "distinguished",
    "told so": "with a warning",
    "birth to death": "lifetime",
    "by heart": "memorized",
    "equal kind": "IID",
    "foretell|foretold": "predict",
    "goes on": "resumes, or continues",
    "in truth": "true, or actual",
    "in vain": "without effect",
    "is in the way": "prevents it",
    "leaves? a trace": "affects",
    "length of (an|the) update": "update norm",
    "of its own": "its own, own, or custom",
    "one by one": "sequentially",
    "one's own": "your own",
    r"rehears\w+": "dry run",
    "same bits": "bit-identical",
    "side by side": "vectorized, or next to each other",
    "spare clients?": "placeholder client",
    "tensors without contents": "fake tensors",
    "the last word": "takes precedence",
    "the way (up|down)": "uplink, or downlink",
    "there and back": "both ways",
    "who holds what": "the partition",
    "without work": "idle",
}
"""Regular expressions of phrases, in lower case, and what to write instead."""

_SPACE = r"(?:[^\S\n]+|[^\S\n]*\n[^\S\n]*)"  # Lines are broken between words.
_PATTERNS = {
    re.compile(rf"\b(?:{phrase.replace(' ', _SPACE)})\b", re.IGNORECASE): better for phrase, better in BETTER.items()
}
_CODE = re.compile(r"(`+)[^`]+\1")
_EDGES = re.compile(r"^[rbfuRBFU]*(\"\"\"|'''|\"|')|(\"\"\"|'''|\"|')$")


def blank(text: str) -> str:
    """Replace everything but line breaks by spaces."""
    return re.sub(r"[^\n]", " ", text)


def written(source: str) -> str:
    """Return a Python file with its code blanked: comments and strings stay at their places."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    kept, end = [], 0
    middle = getattr(tokenize, "FSTRING_MIDDLE", None)  # Python 3.12 and later
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.STRING, middle):
            continue
        first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
        text = source[first:last]
        if token.type == tokenize.COMMENT:
            text = " " + text[1:]
        elif token.type == tokenize.STRING:
            if not re.search(r"\s", text):  # A name, as in a table of old modules.
                continue
            text = _EDGES.sub(lambda edge: " " * len(edge[0]), text)
        kept += [blank(source[end:first]), text]
        end = last
    return "".join([*kept, blank(source[end:])])


def found(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, phrase and better words for every phrase in this file."""
    text = path.read_text("utf8")
    if path.suffix == ".py":
        text = written(text)
    elif path.name == "CHANGELOG.md":  # Released sections stay as they are.
        text = text[: released.start()] if (released := re.search(r"^## \[\d", text, re.MULTILINE)) else text
    text = _CODE.sub(lambda code: blank(code[0]), text)
    hits = [(hit, better) for pattern, better in _PATTERNS.items() for hit in pattern.finditer(text)]
    for hit, better in sorted(hits, key=lambda each: each[0].start()):
        yield text.count("\n", 0, hit.start()) + 1, " ".join(hit[0].split()), better


def files(root: Path) -> Iterator[Path]:
    """Yield the files of ``root`` in which phrases count.

    Raises:
        FileNotFoundError: for a place that is gone, whose files would be passed over.
    """
    for place in PLACES:
        path = root / place
        if not path.exists():
            raise FileNotFoundError(f"{path}: correct PLACES in tests/phrases.py.")
        for each in [path] if path.is_file() else sorted(path.rglob("*")):
            if each.suffix in (".md", ".py", ".yaml", ".yml", "") and each.is_file():
                yield each


def main(root: Path = ROOT) -> int:
    """Print all phrases; return 1 if there are any."""
    count = 0
    for path in files(root):
        for line, phrase, better in found(path):
            print(f"{path.relative_to(root)}:{line}: {phrase!r}: write {better}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
