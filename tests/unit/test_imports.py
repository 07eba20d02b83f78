"""Dependencies point one way, as DESIGN.md draws them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_fedscale"

# A part imports only from levels above its own, so the parts of one level never import each other.
LEVELS = [
    {"types", "utils"},
    {"aggregators", "compressors", "devices", "local_rules", "partitioners", "phases"},
    {"attacks", "privacy", "samplers", "scaling", "server"},
    {"core"},
    {"strategy"},
    {"callbacks", "__init__"},
    {"study"},
    {"cli", "conf", "pytorch_lightning"},
]
CORE = [{"plan", "user_code"}, {"lightning"}, {"client_state"}, {"executors"}, {"options"}, {"round"}]
LEVELS_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
LEVELS_OF |= {f"core.{room}": level for level, rooms in enumerate(CORE) for room in rooms}

KNOW_LIGHTNING = {
    "__init__", "callbacks", "cli", "core.executors", "core.lightning", "core.options", "core.round", "core.user_code",
    "pytorch_lightning", "strategy", "study",
}  # fmt: skip
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
WITHOUT_TORCH = {"scaling"}
PLAIN = "utils.moved"
"""A module of the package that imports Python's own library alone, so that parts without torch may import it."""


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; the link to callbacks/ is not followed."""
    package = ROOT / PACKAGE
    found = {
        path.relative_to(package): path
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "callbacks"
    }
    found |= {path.relative_to(ROOT): path for path in (ROOT / "callbacks").rglob("*.py")}
    return {".".join(name.with_suffix("").parts): path for name, path in sorted(found.items())}


def part_of(module: str) -> str:
    """The room of a module; those of core/ have levels among themselves."""
    first, *rest = module.removesuffix(".__init__").split(".")
    return f"core.{rest[0]}" if first == "core" and rest else first


def level_of(part: str) -> tuple[int, int]:
    room, _, inner = part.partition(".")
    return LEVELS_OF[room], LEVELS_OF.get(f"core.{inner}", 0) if inner else 0


def imports(source: str) -> Iterator[str]:
    """Dotted names that a source imports anywhere, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write the import with its full name"
            if node.module == PACKAGE:
                yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def complaints(module: str, source: str) -> list[str]:
    part, found = part_of(module), []
    for name in imports(source):
        top, _, below = name.partition(".")
        if top == "callbacks":
            found.append("imports top-level callbacks; import lightning_fedscale.callbacks")
        elif top in LIGHTNING and part not in KNOW_LIGHTNING:
            found.append(f"imports {name}; only {sorted(KNOW_LIGHTNING)} know Lightning")
        elif top == "torch" and part in WITHOUT_TORCH:
            found.append(f"imports {name}; {part} works without torch")
        elif top == PACKAGE and part_of(below) not in LEVELS_OF:
            found.append(
                f"imports {name}, which is no part of the package in LEVELS; import the module that defines it"
            )
        elif top == PACKAGE and part_of(below) != part:
            if level_of(part_of(below)) >= level_of(part):
                found.append(f"imports {name}, which does not lie below {part} in LEVELS")
            if part in WITHOUT_TORCH and not f"{below}.".startswith(f"{PLAIN}."):
                found.append(f"imports {name}, which may import torch; {part} works without torch")
    return found


def test_what_parts_without_torch_may_import_is_plain_python() -> None:
    names = {name.partition(".")[0] for name in imports(files()[PLAIN].read_text(encoding="utf-8"))}
    assert names <= sys.stdlib_module_names


@pytest.mark.parametrize("module", files())
def test_imports_point_down(module: str) -> None:
    part = part_of(module)
    assert part in LEVELS_OF, (
        f"{module} is new: add {part!r} to LEVELS in {Path(__file__).name}, where DESIGN.md puts it"
    )
    assert complaints(module, files()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("types", "from lightning_fedscale.utils.flat_view import FlatView", "does not lie below types"),
        ("server.base", "from lightning_fedscale import samplers", "does not lie below server"),
        ("core.plan", "def f():\n    import lightning_fedscale.strategy", "does not lie below core.plan"),
        (
            "core.lightning.hooks",
            "from lightning_fedscale.core.executors import local_step",
            "does not lie below core.lightning",
        ),
        ("callbacks.probe", "from lightning_fedscale import FederatedStrategy", "no part of the package"),
        ("cli", "import lightning_fedscale", "no part of the package"),
        ("samplers", "import lightning.pytorch as pl", "know Lightning"),
        ("scaling.laws", "import torch.nn", "works without torch"),
        ("scaling.laws", "from lightning_fedscale.types import Params", "may import torch"),
        ("cli", "from callbacks import RoundEvents", "top-level callbacks"),
    ],
)
def test_wrong_imports_are_found(module: str, source: str, complaint: str) -> None:
    (found,) = complaints(module, source)
    assert complaint in found


def test_right_imports_are_not() -> None:
    assert complaints("strategy", "import torch\nimport lightning\nfrom lightning_fedscale import server") == []
    assert complaints("server.base", "from lightning_fedscale.types import Params") == []
    assert (
        complaints("core.executors.auto", "from lightning_fedscale.core.lightning.hooks import LocalBatchHooks") == []
    )


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="full name"):
        complaints("server.base", "from . import fed_avg")
