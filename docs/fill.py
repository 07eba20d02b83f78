"""Fill in pages for readers of the repository, where the site has the reference and long lists.

``python docs/fill.py`` writes it between ``<!-- kind: argument -->`` and ``<!-- end -->``: links to what can be read
without the site, and for the reference every public name with the file that its docstring is in.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BLOCK = re.compile(r"^<!-- (\w+)(?:: (.+?))? -->\n(?:(?!<!-- ).*\n)*<!-- end -->$", re.M)
SAYS = re.compile(r"^Lightning: (.+?)\nUpgrade: (.+?)(?:\n\n|\Z)", re.M | re.S)
ROLE = re.compile(r":\w+:`~?([^`]+)`")


def filled(page: Path) -> str:
    """Return a page's text with everything between its marks updated."""
    up = "../" * len(page.relative_to(ROOT).parts[:-1])

    def block(found: re.Match[str]) -> str:
        kind, argument = found[1], found[2] or ""
        text = {
            "reference": reference, "papers": papers, "messages": messages, "groups": groups, "privates": privates,
        }  # fmt: skip
        return f"{found[0].splitlines()[0]}\n\n{text[kind](argument, up)}\n\n<!-- end -->"

    return BLOCK.sub(block, page.read_text("utf8"))


def slug(heading: str) -> str:
    """Return the anchor that browsers of repositories give a heading.

    Example:
        >>> slug("Critical phases, and the noise that large batches lose")
        'critical-phases-and-the-noise-that-large-batches-lose'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def reference(name: str, up: str) -> str:
    """List the public names of a module, with the files of their docstrings."""
    module: Any = import_module(name)
    names = getattr(module, "__all__", None) or [each for each, thing in vars(module).items() if _is_own(thing, module)]
    rows = ["| name, and where its docstring is | what it is |", "|---|---|"]
    for each in sorted(names):
        thing = inspect.unwrap(getattr(module, each))
        if inspect.isclass(thing) or inspect.isfunction(thing):
            file = Path(inspect.getsourcefile(thing) or "").resolve().relative_to(ROOT)
            rows.append(f"| [`{each}`]({up}{file.as_posix()}) | {_about(thing)} |")
    return "\n".join(rows)


def _is_own(thing: Any, module: Any) -> bool:
    named = inspect.isclass(thing) or inspect.isfunction(thing)
    return named and thing.__module__ == module.__name__ and not thing.__name__.startswith("_")


def _about(thing: Any) -> str:
    paragraph = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    return re.sub(r"(?<!\\)\|", r"\\|", ROLE.sub(r"`\1`", paragraph))  # a bare one would end the cell


class Private(NamedTuple):
    """The use of private names of Lightning, from the docstring of a function or class.

    Attributes:
        thing: the function or class.
        names: of Lightning, in the order in which it is said what they are.
        kept: what Lightning keeps under them, and why there is no public way to it.
        look_at: where, when Lightning changes.
    """

    thing: Any
    names: list[str]
    kept: str
    look_at: str


def privates_of(module: Any) -> list[Private]:
    """Return what a module says about Lightning, in the order of its source."""
    found = []
    for thing in vars(module).values():
        paragraphs = SAYS.search(inspect.getdoc(thing) or "") if _is_own(thing, module) else None
        if paragraphs is not None:
            kept, look_at = (" ".join(each.split()) for each in paragraphs.groups())
            found.append(Private(thing, list(dict.fromkeys(re.findall(r"`(_(?!_)\w+)`", kept))), kept, look_at))
    return found


def privates(room: str, up: str | None) -> str:
    """List the functions and classes of a room that use private names of Lightning, with links to their files."""
    rows = [
        "| where | private names | what it is for | what Lightning keeps there | what to look at |",
        "|---|---|---|---|---|",
    ]
    for each in pkgutil.iter_modules(import_module(room).__path__, f"{room}."):
        for thing, names, kept, look_at in privates_of(import_module(each.name)):
            name = f"`{each.name.rpartition('.')[2]}.{thing.__name__}`"
            where = name if up is None else f"[{name}]({up}{each.name.replace('.', '/')}.py)"
            cells = where, ", ".join(f"`{one}`" for one in names), _about(thing), _capital(kept), _capital(look_at)
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def papers(rooms: str, up: str) -> str:
    """Say where the names and their papers are."""
    return f"In the docstrings of {_rooms(rooms.split(), up)}."


def messages(_: str, up: str) -> str:
    """Say where messages are."""
    files = ("core/options", "core/round", "partitioners", "scaling", "callbacks")
    return f"`make docs` lists them all here; they are words of the source, above all of {_rooms(files, up)}."


def groups(_: str, up: str) -> str:
    """Say where Hydra's groups are."""
    folder = f"{up}lightning_fedscale/conf"
    return f"`make docs` lists them all here; each is a folder of [conf]({folder}), and each file says what it is."


def _rooms(names: Iterable[str], up: str) -> str:
    return ", ".join(_room(name, up) for name in names)


def _room(name: str, up: str) -> str:
    path = ROOT / "lightning_fedscale" / name
    path = (path if path.is_dir() else path.with_suffix(".py")).resolve()
    return f"[{name}]({up}{path.relative_to(ROOT).as_posix()})"


def main() -> None:
    """Update all pages."""
    sys.path.insert(0, str(ROOT))
    for page in sorted(DOCS.rglob("*.md")):
        if (text := filled(page)) != page.read_text("utf8"):
            page.write_text(text, "utf8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
