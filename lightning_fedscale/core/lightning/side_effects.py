"""Undoing the side effects of steps that run on a copy of the module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_fedscale.core.lightning.data_loaders import train_source
from lightning_fedscale.core.user_code.objects import is_installed, is_library
from lightning_fedscale.core.user_code.snapshot import Snapshot


@contextmanager
def undone(trainer: pl.Trainer) -> Iterator[None]:
    """Undo changes inside the context to any Python object that the module, the data and the callbacks can reach.

    A copy of a module shares the module's classes, the objects to which their functions refer, and the variables of the
    Python modules in which they are written. Files and the values of large tensors are not restored.

    Example:
        >>> from types import SimpleNamespace as Namespace
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Collecting(BoringModel):
        ...     __module__ = "of_the_project"
        ...     losses = []
        >>> source = Namespace(instance=None)
        >>> trainer = Namespace(lightning_module=Collecting(), callbacks=[], fit_loop=Namespace(_data_source=source))
        >>> with undone(trainer):
        ...     Collecting.losses.append(1.0)
        >>> Collecting.losses
        []
    """
    module = trainer.lightning_module
    roots = {
        "module": module,
        "data": getattr(trainer, "datamodule", None),
        "loaders": train_source(trainer).instance,
        "callbacks": [*_callbacks(trainer)],
    }
    variables = {name: dict(found) for name, found in _variables(module, roots["data"])}
    snapshot = Snapshot(roots | variables, module, most=0)
    try:
        yield
    finally:
        snapshot.restore()
        for name, before in variables.items():
            _put_back(vars(sys.modules[name]), before)


def _callbacks(trainer: pl.Trainer) -> Iterator[Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not is_library(type(callback).__module__):
            yield callback


def _variables(module: nn.Module, data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the variables of the project's own Python modules, by name."""
    kinds = [kind for each in (*module.modules(), data) for kind in type(each).__mro__]
    for name in dict.fromkeys(kind.__module__ for kind in kinds):
        if not is_installed(name) and name in sys.modules:
            yield name, vars(sys.modules[name])


def _put_back(variables: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in variables if name not in before]:
        del variables[name]
    for name, value in before.items():
        if variables.get(name, before) is not value:
            variables[name] = value
