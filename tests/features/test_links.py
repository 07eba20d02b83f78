"""Whoever reads README.md and docs/ in the repository, without the site, comes by every link to text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.features.test_docs import DOCS, PAGES, ROOT, tool

FILES = [ROOT / "README.md", *(DOCS / page for page in PAGES)]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMENT = re.compile(r"<!--.*?-->", re.S)
FEWEST_WORDS = 15
"""Of a page that is more than a heading and a mark for the site."""


def shown(page: Path) -> str:
    """What a browser of repositories shows of a page, without its code."""
    return re.sub(r"^```.*?^```", "", COMMENT.sub("", page.read_text("utf8")), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of a page's headings."""
    return {tool("fill").slug(heading) for heading in re.findall(r"^#+ (.+?)\s*$", shown(page), re.M)}


def spelled(path: Path) -> bool:
    """Whether there is such a file, in these letters also where the file system does not mind capitals."""
    return path.name in {each.name for each in path.parent.iterdir()}


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_text(page: Path) -> None:
    for link in LINK.findall(shown(page)):
        if re.match(r"\w+:", link):
            continue  # to elsewhere
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert spelled(target), f"{link} leads nowhere"
        if target.suffix == ".md":
            assert len(shown(target).split()) >= FEWEST_WORDS, f"{link}: there is nothing to read without the site"
            assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"
        elif target.suffix == ".py":
            assert '"""' in target.read_text("utf8"), f"{link}: there is no docstring"
        elif target.is_dir():
            assert any(target.iterdir()), f"{link}: there is nothing"


@pytest.mark.parametrize("page", PAGES)
def test_what_the_site_fills_in_is_there_in_other_words(page: str) -> None:
    fill = tool("fill")
    text = (DOCS / page).read_text("utf8")
    marks = re.findall(r"^<!-- (?!end).*-->$", text, re.M)
    assert len(fill.BLOCK.findall(text)) == len(marks), f"{page}: end each mark by <!-- end -->"
    assert ":::" not in text, f"{page}: say <!-- reference: MODULE -->, which a reader of the repository is spared"
    assert fill.filled(DOCS / page) == text, f"{page} is out of date: python docs/fill.py"


def test_the_readme_links_to_what_it_names() -> None:
    links = {link.partition("#")[0] for link in LINK.findall(shown(ROOT / "README.md"))}
    assert {"docs/quick-start.md", "docs/how-to/index.md", "docs/reference/index.md"} <= links
    assert {"CONTRIBUTING.md", "docs/how-to/add-a-method.md", "docs/how-to/add-a-callback-argument.md"} <= links
    # The reference leads on to the docstrings of all that a user types.
    strategy = (DOCS / "reference/strategy.md").read_text("utf8")
    assert "[`FederatedStrategy`](../../lightning_fedscale/strategy.py)" in strategy
