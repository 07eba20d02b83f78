"""Additions to `mkdocs build`: the reference, the list of messages, files from other folders.

A page says ``<!-- reference: MODULE -->`` where the docstrings of a module are, ``<!-- messages -->`` where all errors
and warnings are, ``<!-- papers: ROOM ROOM -->`` where the public names of rooms and their papers are, ``<!-- groups
-->`` where Hydra's groups are, and ``<!-- privates: PACKAGE -->`` where a package's use of Lightning's private names
is. What stands from there to ``<!-- end -->`` is for readers of the repository (see fill.py), and is replaced.
"""

from __future__ import annotations

import html
import re
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import groups  # docs/groups.py, and so on: mkdocs puts this folder on the path
import messages
import papers
from api import readable
from fill import BLOCK, privates
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages and pictures of the repository that are part of the site, at the place where they lie there.
ELSEWHERE = ("CHANGELOG.md", "benchmarks/README.md", "benchmarks/results", "examples/README.md", "examples/pictures",
             "examples/existing/README.md")  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add files from outside docs/."""
    for name in ELSEWHERE:
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            if file.suffix in (".md", ".png", ".svg"):
                files.append(File.generated(config, file.relative_to(ROOT).as_posix(), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the parts of a page that come from elsewhere."""
    up = "../" * page.file.src_uri.count("/")
    made = {
        "reference": lambda name: f"::: {name}",
        "papers": lambda rooms: sources(rooms.split()),
        "groups": lambda _: options(),
        "messages": lambda _: listed(),
        "privates": lambda room: privates(room, None),
    }
    markdown = BLOCK.sub(lambda found: made[found[1]](found[2] or ""), markdown)
    # What lies outside of docs/ in the repository is one step nearer here.
    return re.sub(rf"\]\({re.escape(up)}\.\./(?={'|'.join(ELSEWHERE)})", f"]({up}", markdown)


def sources(rooms: list[str]) -> str:
    """List the public names of these rooms whose docstrings name papers."""
    rows = ["| paper | name | what it is |", "|---|---|---|"]
    for source in papers.collect():
        if source.name.partition(".")[0] in rooms:
            links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in source.papers)
            rows.append(f"| {links} | `{source.name}` | {readable(source.about)} |")
    return "\n".join(rows)


def options() -> str:
    """List Hydra's groups and the options of each."""
    parts = []
    for group, of in groupby(groups.collect(), key=attrgetter("group")):
        rows = ["| option | what it is |", "|---|---|"]
        rows += [f"| `{each.name}` | {each.about.replace('|', '&#124;').replace('*', '&#42;')} |" for each in of]
        parts.append("\n".join([f"### `{group}`", "", *rows]))
    return "\n\n".join(parts)


def listed() -> str:
    """List all messages, by the part of the package that gives them."""
    parts = []
    for room, told in groupby(messages.collect(), key=lambda message: message.room):
        rows: list[Any] = [f"## {room}", "", "| kind | message |", "|---|---|"]
        rows += [f"| {each.kind} | {_code(each.text)} |" for each in told]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;').replace('*', '&#42;').replace('_', '&#95;')}</code>"
