"""The script that finds forbidden phrases looks at text, not at code, and says what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import phrases


def lines_found(path: Path, text: str) -> list[tuple[int, str]]:
    path.write_text(text)
    return [(line, phrase) for line, phrase, _ in phrases.found(path)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("module.py", '"""Clients train\n\n    side by side."""\n'),
        ("module.py", "x = 1\n\n# Clients train side by side.\n"),
        ("module.py", 'x = [\n    1,\n    f"{x} clients train Side by side"]\n'),
        ("page.md", "Clients train.\n\nThey train side by\nside.\n"),
        ("options.yaml", "a: 1\n\n# side by side\n"),
    ],
)
def test_a_phrase_is_found_at_its_line(tmp_path: Path, name: str, text: str) -> None:
    assert [(line, phrase.lower()) for line, phrase in lines_found(tmp_path / name, text)] == [(3, "side by side")]


def test_a_phrase_is_found_across_lines_of_comments_and_strings(tmp_path: Path) -> None:
    assert lines_found(tmp_path / "module.py", "# They train side by\n# side.\n") == [(1, "side by side")]
    assert lines_found(tmp_path / "module.py", 'x = ("they train side by"\n     " side")\n') == [(1, "side by side")]


def test_code_is_not_text(tmp_path: Path) -> None:
    assert lines_found(tmp_path / "module.py", "anew = 1\nas_ever(anew)\n") == []
    assert lines_found(tmp_path / "module.py", '"""See `anew` and ``as_ever``."""\n') == []
    assert lines_found(tmp_path / "module.py", 'OLD = {"rehearsal": "core.dry_run"}\n') == []
    assert lines_found(tmp_path / "page.md", "Call `anew`; as every page.\n") == []


def test_only_the_unreleased_changes_count(tmp_path: Path) -> None:
    text = "## [Unreleased]\n\n- Trains anew.\n\n## [0.1.0]\n\n- Trained anew.\n"
    assert lines_found(tmp_path / "CHANGELOG.md", text) == [(3, "anew")]


@pytest.mark.parametrize("phrase", [p for p in phrases.BETTER if not set("|(?\\") & set(p)])
def test_every_phrase_is_found(tmp_path: Path, phrase: str) -> None:
    assert lines_found(tmp_path / "page.md", f"A page: {phrase}.") == [(1, phrase)]


def test_the_command_names_file_line_and_better_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phrases, "PLACES", ("docs",))
    (tmp_path / "docs").mkdir()
    assert phrases.main(tmp_path) == 0
    (tmp_path / "docs" / "page.md").write_text("One\none by one.\n")
    assert phrases.main(tmp_path) == 1
    assert capsys.readouterr().out == "docs/page.md:2: 'one by one': write sequentially\n"


def test_a_place_that_is_gone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "PLACES", ("README.md", "pages"))
    (tmp_path / "README.md").write_text("A page.\n")
    with pytest.raises(FileNotFoundError, match="pages"):
        phrases.main(tmp_path)
