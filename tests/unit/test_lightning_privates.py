"""One room names private attributes of Lightning, so that an upgrade of Lightning has one place to look at."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsource
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any, NamedTuple

import lightning.fabric
import lightning.pytorch
import pytest
import torchmetrics
from torch import Tensor, nn

from tests.unit.test_imports import PACKAGE, ROOT, files

ROOM = "core.lightning"
PACKAGES = ("lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics")
OF_TRAINER = {"trainer", "_trainer", "fit_loop", "epoch_loop", "lightning_module", "pl_module"}
"""Whatever is reached through one of these belongs to Lightning, also under a name that a class of ours has too."""
FOLDERS = [Path(str(each.__file__)).parent for each in (lightning.pytorch, lightning.fabric, torchmetrics)]


class Use(NamedTuple):
    line: int
    name: str


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


def defined_in(tree: ast.AST) -> set[str]:
    """Private names that a source defines on modules, classes and objects; not variables of its functions."""
    names = set()
    for scope in ast.walk(tree):
        if isinstance(scope, ast.Attribute) and isinstance(scope.ctx, ast.Store):
            names.add(scope.attr)
        if isinstance(scope, ast.Module | ast.ClassDef):
            for node in scope.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if is_private(name)}


@cache
def lightnings() -> frozenset[str]:
    """Private names that Lightning's sources define, without those that torch gives every module and tensor."""
    pytorch, fabric, metrics = FOLDERS
    sources = [*pytorch.rglob("*.py"), *fabric.rglob("*.py"), metrics / "metric.py", metrics / "collections.py"]
    found = {name for source in sources for name in defined_in(ast.parse(source.read_text(encoding="utf-8")))}
    return frozenset(found - vars(nn.Module()).keys() - set(dir(Tensor)))


def own_names(tree: ast.AST) -> set[str]:
    """Private names that classes of a source define, in their bodies and on ``self``."""
    kinds = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bodies = {each.name for kind in kinds for each in kind.body if isinstance(each, ast.FunctionDef)}
    return bodies | {name for kind in kinds for name in of_self(kind, ast.Store)}


def of_self(kind: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """Attributes of ``self`` and ``cls`` in a class, those that are set or those that are read."""
    nodes = [node for node in ast.walk(kind) if isinstance(node, ast.Attribute) and isinstance(node.ctx, context)]
    return {node.attr for node in nodes if _is_self(node.value)}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _words(node: ast.expr) -> set[str]:
    """All names and attributes that an object is reached by."""
    nodes = list(ast.walk(node))
    return {each.id for each in nodes if isinstance(each, ast.Name)} | {
        each.attr for each in nodes if isinstance(each, ast.Attribute)
    }


def uses(tree: ast.AST, own: set[str], names: frozenset[str]) -> Iterator[Use]:
    """Where a source takes hold of Lightning's private names: as attributes, in imports, in strings and as arguments.

    Args:
        tree: the source.
        own: names of classes of the same module, which their objects may be asked for.
        names: Lightning's.
    """
    types = {id(node.args[0]) for node in ast.walk(tree) if isinstance(node, ast.Call) and _makes_type(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names and not _is_self(node.value):
            if node.attr not in own or _words(node.value) & OF_TRAINER:
                yield Use(node.lineno, node.attr)
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in PACKAGES:
            yield from (Use(node.lineno, alias.name) for alias in node.names if alias.name in names)
        elif isinstance(node, ast.keyword) and node.arg in names:
            yield Use(node.value.lineno, str(node.arg))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in types:
            parts = node.value.split(".")  # also "lightning.pytorch.some._thing", as `monkeypatch.setattr` is given it
            if all(map(str.isidentifier, parts)) and (len(parts) > 1 or parts[0] not in own):
                yield from (Use(node.lineno, part) for part in parts if part in names)


def _makes_type(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in ("TypeVar", "NamedTuple") and bool(call.args)


def complaints(module: str, source: str, names: frozenset[str]) -> list[str]:
    tree = ast.parse(source)
    return [
        f"{module}, line {line}: {name} is private to Lightning; write a function for it in"
        f" {PACKAGE}/{ROOM.replace('.', '/')}/, or give your own attribute another name"
        for line, name in sorted(set(uses(tree, own_names(tree), names)))
    ]


@cache
def inherited(kind: type) -> set[str]:
    """Private names that a class has from classes of Lightning."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in PACKAGES]
    found = {name for base in bases for name in vars(base)}
    found |= {name for base in bases for name in set_by(base)}
    return {name for name in found if is_private(name)} & lightnings()


@cache
def set_by(kind: type) -> set[str]:
    """Attributes that methods of a class set on ``self``."""
    return of_self(ast.parse(dedent(getsource(kind))), ast.Store)


def taken_over(module: str, source: str) -> dict[str, set[str]]:
    """By class of a module, what it reads, sets or overrides of the private names of Lightning's class that it extends.

    A name that one of our own classes in between defines as well still counts: it is Lightning's all the same.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.bases:
            names = inherited(getattr(import_module(f"{PACKAGE}.{module}"), node.name))
            methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            found[node.name] = (of_self(node, ast.Store) | of_self(node, ast.Load) | methods) & names
    return {name: names for name, names in found.items() if names}


def _fill() -> ModuleType:
    """What fills the pages of docs/, which is no package."""
    spec = spec_from_file_location("fill", ROOT / "docs" / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILL = _fill()


def privates_of(module: str) -> list[Any]:
    """What docstrings of a module of the room say of Lightning: see `Private` in docs/fill.py."""
    found: list[Any] = FILL.privates_of(import_module(f"{PACKAGE}.{module}"))
    return found


SOURCES = {name: path.read_text(encoding="utf-8") for name, path in files().items()}
ELSEWHERE = [name for name in SOURCES if not name.startswith(f"{ROOM}.")]
HERE = [name for name in SOURCES if name.startswith(f"{ROOM}.") and name != f"{ROOM}.__init__"]


def test_only_one_room_names_what_is_private_to_lightning() -> None:
    found = {module: complaints(module, SOURCES[module], lightnings()) for module in ELSEWHERE}
    assert [each for names in found.values() for each in names] == []


def test_classes_elsewhere_leave_private_names_of_their_bases_alone() -> None:
    found = {module: taken_over(module, SOURCES[module]) for module in ELSEWHERE}
    assert {module: names for module, names in found.items() if names} == {}, f"move it to a class in {ROOM}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(trainer):\n    return trainer._kept", ["_kept"]),
        ("def f(trainer):\n    trainer.fit_loop._kept = 1", ["_kept"]),
        ("def f(module):\n    return getattr(module, '_kept', None)", ["_kept"]),
        ("def f(module):\n    vars(module)['_kept'] = 1", ["_kept"]),
        ("def f(module):\n    vars(module).update(_kept=1)", ["_kept"]),
        ("def f(patch):\n    patch.setattr('lightning.pytorch.core._kept.name', 1)", ["_kept"]),
        ("from lightning.pytorch.core import _kept as kept", ["_kept"]),
        ("from pytorch_lightning.core import _kept", ["_kept"]),
        # What a class of ours calls by the same name it may ask its objects for, but not those of Lightning.
        ("class A:\n    def __init__(self):\n        self._kept = 1\n    def f(self, b):\n        return b._kept", []),
        ("class A:\n    def _kept(self): ...\ndef f(a: A):\n    a._kept()", []),
        ("class A:\n    def _kept(self, trainer):\n        return trainer.loop._kept", ["_kept"]),
        ("class A:\n    def _kept(self):\n        return self.trainer._kept", ["_kept"]),
        (
            "class A:\n    def __init__(self):\n        self._kept = 1\n    def s(self):\n        return {'_kept': 1}",
            [],
        ),
        ("def f(b):\n    return b._kept\n_kept = 1", ["_kept"]),
        ("_kept = TypeVar('_kept')", []),
        ("from our.core import _kept", []),
        ("def f(trainer):\n    return trainer._other, '_kept and more'", []),
    ],
)
def test_what_counts(source: str, found: list[str]) -> None:
    named = [Use(0, name).name for name in found]
    told = complaints("part", source, frozenset({"_kept"}))
    assert [re.match(r"part, line \d+: (\w+) is private", each)[1] for each in told] == named  # type: ignore[index]


def test_the_names_are_lightnings() -> None:
    """Of every kind of definition one, and nothing that only torch or a function's variable is called."""
    assert {
        "_batches_that_stepped", "_logger_connector", "_call_lightning_module_hook", "_ResultCollection", "_trainer",
        "_update_count",
    } <= lightnings()  # fmt: skip
    assert not {"_modules", "_parameters", "_backward_hooks", "_version", "_replace", "__init__", "_"} & lightnings()
    own = "class A:\n    _one: int = 1\n    def _two(self):\n        self._three = _local = 1\n_five = 1"
    assert defined_in(ast.parse(own)) == {"_one", "_two", "_three", "_five"}


@pytest.mark.parametrize("module", HERE)
def test_the_room_says_what_it_names(module: str) -> None:
    """Each function names in its paragraph what it uses, those of a module together all that stands in it."""
    tree, said = ast.parse(SOURCES[module]), {each.thing.__name__: set(each.names) for each in privates_of(module)}
    own = own_names(tree)
    lines = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    imported = {use.name for node in lines for use in uses(node, own, lightnings())}
    everything = set(imported)
    for node in tree.body:
        named = {use.name for use in uses(node, own, lightnings())}
        named |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and each.id in imported}
        if isinstance(node, ast.ClassDef):
            named |= taken_over(module, ast.unparse(node)).get(node.name, set())
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            missing = named - said.get(node.name, set())
            assert not missing, f"{node.name}: say in its docstring, after 'Lightning:', what {sorted(missing)} is"
        everything |= named
    assert set().union(*said.values()) == everything, "what is said and what is used differ"


@pytest.mark.parametrize("module", HERE)
def test_what_the_room_names_is_there(module: str) -> None:
    """An upgrade of Lightning fails here, by name, and not in somebody's training."""
    for each in privates_of(module):
        gone = set(each.names) - lightnings()
        assert not gone, (
            f"{each.thing.__name__} needs {sorted(gone)}, which Lightning has no more: look at {each.look_at}"
        )


@pytest.mark.parametrize("module", HERE)
def test_where_to_look_is_there(module: str) -> None:
    """Files exist, and classes and functions are defined in one of those that are named with them."""
    for each in privates_of(module):
        paths = re.findall(r"`([\w/]+\.py)`", each.look_at)
        texts = {path: [folder / path for folder in FOLDERS if (folder / path).exists()] for path in paths}
        assert all(texts.values()), f"{each.thing.__name__}: {texts}"
        text = "".join(path.read_text("utf8") for found in texts.values() for path in found)
        places = [name for name in re.findall(r"`([\w.]+)`", each.look_at) if not name.endswith(".py")]
        if each.look_at.startswith("as for"):
            (other,) = places
            assert hasattr(import_module(f"{PACKAGE}.{module}"), other)
        elif not each.look_at.startswith("`torch."):
            assert paths
            for name in (part for place in places for part in place.split(".")):
                assert re.search(rf"(?:def|class) {name}\b", text), f"{each.thing.__name__}: no {name} in {paths}"


def test_the_page_has_every_function_of_the_room() -> None:
    page = ROOT / "docs" / "how-to" / "lightning-upgrades.md"
    assert FILL.filled(page) == page.read_text("utf8"), "run: python docs/fill.py"
    shown = set(re.findall(r"^\| \[`([\w.]+)`\]", page.read_text("utf8"), re.M))
    room = {module: privates_of(module) for module in HERE}
    assert shown == {f"{name.rpartition('.')[2]}.{each.thing.__name__}" for name in room for each in room[name]}


def test_a_class_that_overrides_a_private_method_is_found() -> None:
    found = taken_over("core.lightning.handover", SOURCES["core.lightning.handover"])
    assert {"_setup_model", "_checkpoint_io", "_layer_sync"} <= found["ReusableStrategy"]
    assert "_processes" not in found["ReusableStrategy"]
