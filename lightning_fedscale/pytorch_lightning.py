"""The package for projects that import ``pytorch_lightning`` instead of ``lightning.pytorch``.

``pytorch_lightning`` is a separate package, whose classes do not mix with those of ``lightning.pytorch``. This module
provides for it what ``lightning_fedscale`` provides for ``lightning.pytorch``.

There is one source: ``lightning_fedscale.pytorch_lightning.NAME`` is read from the file of ``lightning_fedscale.NAME``;
its imports of Lightning, and of parts that use Lightning, are replaced. Parts that do not use Lightning (partitioners,
servers, aggregators, device classes, records, ...) are the same modules, so their objects work with both. Line numbers
are kept, so tracebacks and debuggers show the real files, and pickled objects find their class in other processes.

Example:
    >>> from lightning_fedscale.pytorch_lightning import FederatedStrategy, callbacks
    >>> from pytorch_lightning import Trainer
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> trainer = Trainer(strategy=FederatedStrategy(num_clients=4), max_epochs=3, accelerator="cpu", logger=False,
    ...                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    >>> trainer.fit(BoringModel())
    >>> trainer.global_step
    3
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from types import CodeType, ModuleType
from typing import Any

from pytorch_lightning.strategies import StrategyRegistry

from lightning_fedscale import (
    aggregators,
    attacks,
    compressors,
    local_rules,
    partitioners,
    privacy,
    samplers,
    server,
)
from lightning_fedscale.core.options import lightning_cli
from lightning_fedscale.local_rules import schedules
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.types import ClientUpdate, RoundRecord

__all__ = [
    "ClientUpdate",
    "FedBuff",
    "FederatedStrategy",
    "Partition",
    "RoundRecord",
    "aggregators",
    "attacks",
    "callbacks",
    "compressors",
    "local_rules",
    "partitioners",
    "privacy",
    "samplers",
    "schedules",
    "server",
]
__path__: list[str] = []  # the modules below this one have no files

_PACKAGE = __name__.rpartition(".")[0]
_COUNTERPARTS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
KNOW_LIGHTNING = {"callbacks", "core", "strategy", "study"}
"""The parts of the package that exist twice."""


def _counterpart_of(module: str) -> str:
    """Return the name of the module to import instead."""
    for one, other in _COUNTERPARTS.items():
        if module == one or module.startswith(one + "."):
            return other + module.removeprefix(one)
    package, _, below = module.partition(".")
    return f"{__name__}.{below}" if package == _PACKAGE and below.partition(".")[0] in KNOW_LIGHTNING else module


class _OtherImports(ast.NodeTransformer):
    """Replaces the imports of a source; everything stays on its line."""

    def visit_Import(self, node: ast.Import) -> ast.Import:  # import lightning.pytorch as pl
        for alias in node.names:
            if (counterpart := _counterpart_of(alias.name)) != alias.name:
                if alias.asname is None:
                    raise ImportError(
                        f"line {node.lineno}: write `import {alias.name} as ...`, so that its import can be replaced"
                    )
                alias.name = counterpart
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.ImportFrom]:  # from lightning.pytorch import Callback
        assert node.module is not None
        if node.module != _PACKAGE:
            node.module = _counterpart_of(node.module)
            return [node]
        doubled = [alias for alias in node.names if alias.name in KNOW_LIGHTNING]
        others = [alias for alias in node.names if alias.name not in KNOW_LIGHTNING]
        both = ast.ImportFrom(__name__, doubled, 0), ast.ImportFrom(_PACKAGE, others, 0)
        return [ast.copy_location(each, node) for each in both if each.names]


class _CounterpartLoader(SourceFileLoader):
    """Runs a file with replaced imports, without ``__pycache__``, which belongs to the original."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        return compile(_OtherImports().visit(tree), path, "exec", dont_inherit=True)


class _SameModule(Loader):
    """Loads a module that needs no copy: the original itself."""

    def __init__(self, original: str) -> None:
        self._original = original

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self._original)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(__name__ + "."):
            return None
        below = fullname.removeprefix(__name__ + ".")
        original = find_spec(f"{_PACKAGE}.{below}")
        if original is None or original.origin is None or original.name == __name__:
            return None
        if below.partition(".")[0] not in KNOW_LIGHTNING:
            return ModuleSpec(fullname, _SameModule(original.name))
        loader = _CounterpartLoader(fullname, original.origin)
        folders = original.submodule_search_locations
        return spec_from_file_location(fullname, loader=loader, submodule_search_locations=folders)


# First in the list, since the copies have the folders of the originals.
sys.meta_path.insert(0, _Finder())

# Typed as Any, since a type checker finds no files for them.
callbacks: Any = import_module(f"{__name__}.callbacks")
FederatedStrategy: Any = import_module(f"{__name__}.strategy").FederatedStrategy
FederatedStrategy.register_strategies(StrategyRegistry)
lightning_cli.register()  # as soon as either package is imported, since both have the same options
