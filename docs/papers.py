"""Which public name comes from which paper, read from the docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_fedscale"
ARXIV = re.compile(r"(?:arXiv[: ]\s*)(\d{4}\.\d{5})")


class Source(NamedTuple):
    """A public name and its papers.

    Attributes:
        name: as it is imported, below `lightning_fedscale`.
        about: the first sentence of its docstring.
        papers: numbers on arXiv.
    """

    name: str
    about: str
    papers: tuple[str, ...]


def collect() -> list[Source]:
    """Collect the public names whose docstrings name a paper, by room."""
    return sorted(source for room in _rooms() for source in _of_room(room))


def _rooms() -> list[Path]:
    rooms = [path.parent for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "cli"]
    return [ROOT / "callbacks" if room.name == "callbacks" else room for room in rooms] + [
        PACKAGE / f"{name}.py" for name in ("attacks", "phases/noise", "local_rules/schedules", "server/asynchrony")
    ]


def _of_room(room: Path) -> Iterator[Source]:
    files = sorted(room.rglob("*.py")) if room.is_dir() else [room]
    public = _all(room / "__init__.py") if room.is_dir() else None
    for file in files:
        for node in ast.parse(file.read_text("utf8")).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            if public is not None and node.name not in public:
                continue
            text = ast.get_docstring(node) or ""
            papers = tuple(dict.fromkeys(ARXIV.findall(" ".join(text.split()))))
            if papers:
                about = " ".join(text.partition("\n\n")[0].split())
                yield Source(f"{room.stem}.{node.name}", re.sub(r"\s*\(arXiv [^)]*\)", "", about), papers)


def _all(file: Path) -> set[str]:
    for node in ast.parse(file.read_text("utf8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: set[str] = set(ast.literal_eval(node.value))
            return names
    return set()
