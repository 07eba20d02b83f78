"""Files, classes and functions stay small enough to be read, and the way through a round stays straight."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import pytest

import lightning_fedscale.core.round as room
from tests.unit.test_imports import files

LINES, METHODS, BODY = 400, 20, 60

# What is larger today, with its size: it may shrink, and leaves this table when it fits. Nothing comes in.
LONG_FILES = {
    "strategy": 515,
}
LARGE_CLASSES = {
    "strategy.FederatedStrategy": 39,  # overrides hooks of Lightning, of which there are that many
}
LONG_FUNCTIONS = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[str, str]:
    return {module: path.read_text(encoding="utf-8") for module, path in files().items()}


def definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Every class and function below a node, by its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | Function):
            yield f"{name}.{child.name}", child
            yield from definitions(child, f"{name}.{child.name}")
        else:
            yield from definitions(child, name)


def methods(node: ast.AST) -> int:
    return sum(isinstance(child, Function) for child in node.body) if isinstance(node, ast.ClassDef) else 0


def body(node: ast.AST) -> int:
    """Lines of a function without its docstring."""
    if not isinstance(node, Function):
        return 0
    assert node.end_lineno is not None
    told = node.body[0]
    docstring = 0 if ast.get_docstring(node) is None else (told.end_lineno or 0) - told.lineno + 1
    return node.end_lineno - node.lineno + 1 - docstring


def too_large(sizes: dict[str, int], limit: int) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > limit}


def exceeded(found: dict[str, int], known: dict[str, int]) -> list[str]:
    """What is new in the table of exceptions, has grown, or could leave it."""
    grown = [
        f"{name} has {size}, at most {known[name]}" for name, size in found.items() if size > known.get(name, size)
    ]
    new = [f"{name} has {found[name]}: split it" for name in sorted(found.keys() - known.keys())]
    gone = [f"{name} fits: take it out of the table" for name in sorted(known.keys() - found.keys())]
    return grown + new + gone


def test_no_file_above_400_lines() -> None:
    sizes = {module: source.count("\n") for module, source in sources().items()}
    assert exceeded(too_large(sizes, LINES), LONG_FILES) == []


@pytest.mark.parametrize(
    ("measure", "limit", "known"), [(methods, METHODS, LARGE_CLASSES), (body, BODY, LONG_FUNCTIONS)]
)
def test_no_class_above_20_methods_and_no_function_above_60_lines(
    measure: Callable[[ast.AST], int], limit: int, known: dict[str, int]
) -> None:
    sizes = {
        name: measure(node)
        for module, source in sources().items()
        for name, node in definitions(ast.parse(source), module)
    }
    assert exceeded(too_large(sizes, limit), known) == []


def test_the_room_of_rounds_has_no_exception() -> None:
    assert not [name for name in (LONG_FILES | LARGE_CLASSES | LONG_FUNCTIONS) if name.startswith("core.round.")]


@pytest.mark.parametrize(
    ("found", "known", "said"),
    [
        ({"a": 61}, {}, "split it"),
        ({"a": 62}, {"a": 61}, "at most 61"),
        ({}, {"a": 61}, "take it out"),
    ],
)
def test_a_table_of_exceptions_can_only_shrink(found: dict[str, int], known: dict[str, int], said: str) -> None:
    (complaint,) = exceeded(found, known)
    assert said in complaint
    assert exceeded(known, known) == []


def test_a_docstring_is_no_line_of_a_function() -> None:
    (_, function), (_, inner) = definitions(
        ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    def g(): ...\n'), "m"
    )
    assert (body(function), body(inner)) == (2, 1)


def test_the_way_from_the_strategy_to_training_step_is_the_one_that_is_drawn() -> None:
    assert room.__doc__ is not None
    path = re.findall(r"^    (\S+\.py) +(\S+)$", room.__doc__, re.MULTILINE)
    assert path[0][0] == "strategy.py"
    found = sources()
    calls = [name.rpartition(".")[2] for _, name in path[2:]] + ["training_step"]
    for (file, name), called in zip(path, ["RoundLoops", "_run_round", *calls[1:]], strict=True):
        module = file.removesuffix(".py").replace("/", ".")
        known = dict(definitions(ast.parse(found.get(module, "")), module))
        assert f"{module}.{name}" in known, f"{name} is not in {file}: draw the way in core/round/__init__.py again"
        node = known[f"{module}.{name}"]
        said = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
        said |= {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
        assert called in said, f"{name} in {file} does not call {called}"
