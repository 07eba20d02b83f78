"""Dependencies point one way, as DESIGN.md draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_fedscale"

# A part imports only from levels above its own, so the parts of one level never import each other.
LEVELS = [
    {"types"},
    {"calls", "checks", "collectives", "energy", "fairness", "foreign", "memory", "model_size", "randomness", "tree"},
    # The rooms.
    {
        "aggregators",
        "asynchrony",
        "buffers",
        "clients",
        "compressors",
        "devices",
        "local_rules",
        "noise",
        "partitioners",
        "phases",
        "samplers",
        "scaling",
        "schedules",
        "server",
        "update_scaling",
    },
    {"attacks", "privacy", "report"},  # what changes or hides the updates that aggregators see; a page about a run
    {"rules"},
    {"arguments", "class_paths", "phase_keeper", "rounds"},
    {"custody", "older_models", "records", "settings"},
    {"sums"},
    {"executors"},
    {"combinations", "uplink"},
    {
        "checkpointing",
        "global_model",
        "half_batches",
        "handover",
        "loggers",
        "monitors",
        "metering",
        "module_flags",
        "progress",
        "refusals",
        "requeue",
        "side_effects",
        "train_data",
        "workload",
    },
    {"federation", "run_board"},
    {"strategy"},
    {"callbacks"},
    {"study"},
    {"cli", "conf"},
    {"__init__", "pytorch_lightning"},  # the front doors
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

KNOW_LIGHTNING = {
    "__init__",
    "callbacks",
    "checkpointing",
    "cli",
    "combinations",
    "executors",
    "federation",
    "global_model",
    "half_batches",
    "handover",
    "loggers",
    "metering",
    "monitors",
    "progress",
    "pytorch_lightning",
    "refusals",
    "requeue",
    "run_board",
    "side_effects",
    "strategy",
    "study",
    "train_data",
    "uplink",
    "workload",
}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
WITHOUT_TORCH = {"scaling"}


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
    return module.split(".")[0]


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
        elif top == PACKAGE and part_of(below) not in LEVEL:
            found.append(
                f"imports {name}, which is no part of the package in LEVELS; import the module that defines it"
            )
        elif top == PACKAGE and part_of(below) != part:
            if LEVEL[part_of(below)] >= LEVEL[part]:
                found.append(f"imports {name}, which does not lie below {part} in LEVELS")
            if part in WITHOUT_TORCH:
                found.append(f"imports {name}, which may import torch; {part} works without torch")
    return found


@pytest.mark.parametrize("module", files())
def test_imports_point_down(module: str) -> None:
    part = part_of(module)
    assert part in LEVEL, f"{module} is new: add {part!r} to LEVELS in {Path(__file__).name}, where DESIGN.md puts it"
    assert complaints(module, files()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("types", "from lightning_fedscale.tree import FlatView", "does not lie below types"),
        ("server.base", "from lightning_fedscale import samplers", "does not lie below server"),
        ("rounds", "def f():\n    import lightning_fedscale.strategy", "does not lie below rounds"),
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
    assert complaints("executors.loops", "from lightning_fedscale.executors.hooks import LocalBatchHooks") == []


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="full name"):
        complaints("server.base", "from . import fed_avg")
