"""The list of slow tests names tests that there are, and a run of some tests leaves the others in it."""

from __future__ import annotations

import ast

from tests import slow


def functions_of(file: str) -> set[str]:
    """The functions of a file below tests/, and the methods of its classes, as pytest names them."""
    path = slow.LIST.parent / file
    found = set()
    for node in ast.parse(path.read_text()).body if path.is_file() else []:
        parts, owner = ([node], "") if not isinstance(node, ast.ClassDef) else (node.body, f"{node.name}::")
        found |= {f"{file}::{owner}{part.name}" for part in parts if isinstance(part, ast.FunctionDef)}
    return found | {file} if found else found


def test_every_name_of_the_list_is_a_test() -> None:
    names = slow.LIST.read_text().split()
    known = set().union(*map(functions_of, {name.partition("::")[0] for name in names}))
    assert [name for name in names if name not in known] == []
    assert names == sorted(set(names))


def test_functions_that_did_not_run_stay_as_they_are_listed() -> None:
    seconds = {"unit/a.py::test_slow": {"one": 0.1, "two": 0.8}, "unit/a.py::test_fast": {"one": 0.1}}
    before = ["unit/a.py::test_fast", "unit/b.py::test_of_another_file"]
    assert slow.slow_of(seconds, {"unit/a.py": 0.1}, before) == [
        "unit/a.py::test_slow", "unit/b.py::test_of_another_file",
    ]  # fmt: skip


def test_a_file_is_slow_if_what_its_tests_share_is() -> None:
    seconds = {"unit/a.py::test_first": {"one": 9.0}, "unit/a.py::test_second": {"one": 0.0}}
    assert slow.slow_of(seconds, {"unit/a.py": 8.9, "unit/b.py": 0.1}, ["unit/b.py"]) == ["unit/a.py"]
    assert slow.is_slow("tests/unit/a.py::test_second[1]", ["unit/a.py"])
    assert not slow.is_slow("tests/unit/b.py::test_second[1]", ["unit/a.py"])
