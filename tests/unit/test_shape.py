"""Files, classes and functions stay small enough to be read, and the way through a round stays straight."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import pytest

import lightning_fedscale.core.round as room
from tests.unit.test_imports import files

LINES, METHODS, BODY = 400, 20, 60

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


def test_no_file_above_400_lines() -> None:
    sizes = {module: source.count("\n") for module, source in sources().items()}
    assert too_large(sizes, LINES) == {}


@pytest.mark.parametrize(("measure", "limit"), [(methods, METHODS), (body, BODY)])
def test_no_class_above_20_methods_and_no_function_above_60_lines(
    measure: Callable[[ast.AST], int], limit: int
) -> None:
    sizes = {
        name: measure(node)
        for module, source in sources().items()
        for name, node in definitions(ast.parse(source), module)
    }
    assert too_large(sizes, limit) == {}


@pytest.mark.parametrize(
    ("measure", "source"),
    [
        (methods, "class Many:\n" + "".join(f"    def m{i}(self): ...\n" for i in range(METHODS + 1))),
        (body, "def long():\n    '''One line.'''\n" + "    pass\n" * BODY),
    ],
)
def test_one_more_than_the_limit_is_too_large(measure: Callable[[ast.AST], int], source: str) -> None:
    limit = METHODS if measure is methods else BODY
    sizes = {name: measure(node) for name, node in definitions(ast.parse(source), "room")}
    assert list(too_large(sizes, limit).values()) == [limit + 1]


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
