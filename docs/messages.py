"""Every error and warning that the package can give, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_fedscale"
WARN = {"rank_zero_warn", "warn"}
# Signals between parts of the package: no user sees them.
INTERNAL = {"FrozenWritten", "NotImplementedError", "OverBudget", "TrainerAccessed"}
WORDS = re.compile("[a-z]{3}")
VALUE = re.compile(r"\{[^{}]*\}")


class Message(NamedTuple):
    """A message that a user may see.

    Attributes:
        room: the part of the package that gives the message.
        kind: "ValueError", "warning", ...
        text: the words, with values as {name}.
    """

    room: str
    kind: str
    text: str

    def matches(self, said: str) -> bool:
        """Return whether a message that somebody saw is this one."""
        words = VALUE.split(self.text)
        return bool(WORDS.search("".join(words))) and bool(
            re.fullmatch(".*".join(map(re.escape, words)), " ".join(said.split()), re.DOTALL)
        )


def collect() -> list[Message]:
    """Collect all messages, ordered by room."""
    found = {message for path in sorted(_files()) for message in _of_file(path)}
    return sorted(found)


def _files() -> Iterator[Path]:
    yield from PACKAGE.rglob("*.py")
    if not (PACKAGE / "callbacks").is_dir():  # a checkout without symbolic links
        yield from (ROOT / "callbacks").rglob("*.py")


def _of_file(path: Path) -> Iterator[Message]:
    inside = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
    room = "/".join(inside.parts[: 1 + (inside.parts[0] == "core")]).removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        said = _said(node)
        if said is None:
            continue
        kind, expression = said
        for text in _texts(expression):
            if WORDS.search(VALUE.sub("", text)) or "{remedy}" in text:
                yield Message(room, kind, " ".join(text.split()))


def _said(node: ast.AST) -> tuple[str, ast.expr] | None:
    """Return the kind and the words of an exception that is raised or made, or of a warning."""
    made = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
    if isinstance(made, ast.Call) and made.args:
        name = ast.unparse(made.func).rpartition(".")[2]
        if name == "NotVectorizable":
            return "runs sequentially", made.args[0]
        if name == "kind" or (name.endswith("Error") and name not in INTERNAL) or name == "Unfitted":
            return name.replace("kind", "error"), made.args[0]
    if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).rpartition(".")[2] in WARN:
        return "warning", node.args[0]
    return None


def _texts(node: ast.expr) -> list[str]:
    """Return the possible texts of an expression."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _texts(node.left) for right in _texts(node.right)]
    if isinstance(node, ast.JoinedStr):
        texts = [""]
        for part in node.values:
            added = _texts(part) if isinstance(part, ast.Constant) else [_placeholder(part)]
            texts = [before + after for before in texts for after in added]
        return texts
    return [_placeholder(node)]


def _placeholder(node: ast.expr) -> str:
    """Return a placeholder for a value: its name, if that is short."""
    value = node.value if isinstance(node, ast.FormattedValue) else node
    names = [each for each in ast.walk(value) if isinstance(each, ast.Name | ast.Attribute)]
    first = names[0] if names else None
    name = "" if first is None else first.attr if isinstance(first, ast.Attribute) else first.id
    return "{" + (name.strip("_") or "...") + "}"
