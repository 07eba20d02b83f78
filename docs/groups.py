"""Hydra's groups that the package has, read from the first comment of their files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

CONF = Path(__file__).resolve().parents[1] / "lightning_fedscale" / "conf"


class Option(NamedTuple):
    """A file that can be chosen.

    Attributes:
        group: such as "strategy/partitioner".
        name: such as "dirichlet".
        about: what it is.
    """

    group: str
    name: str
    about: str


def collect() -> Iterator[Option]:
    """Collect all options by group, without those that are repeated below the Trainer."""
    for group in sorted({path.parent for path in CONF.rglob("*.yaml")} - {CONF}):
        if CONF / "trainer" / "strategy" not in (group, *group.parents):
            for path in sorted(group.glob("*.yaml")):
                yield Option(group.relative_to(CONF).as_posix(), path.stem, about(path))


def about(path: Path) -> str:
    """Return the comment at the beginning of a file."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text("utf8").splitlines())
    return " ".join(line.lstrip("# ") for line in comment)
