"""Hooks of the user's module that belong to local batches, kept silent where a step is a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

_PER_LOCAL_BATCH = ("on_train_batch_start", "on_train_batch_end")


class LocalBatchHooks:
    """While in place, the module's per-batch hooks answer only inside a client.

    The Trainer calls them once per step, that is per round, with the global model; they were written for batches.

    Args:
        module: the user's module.
        in_client: whether a client is training right now.
    """

    def __init__(self, module: pl.LightningModule, in_client: Callable[[], bool]) -> None:
        self._module = module
        self._names = [name for name in _PER_LOCAL_BATCH if is_overridden(name, module)]
        for name in self._names:
            setattr(module, name, _gated(getattr(module, name), in_client))

    def remove(self) -> None:
        """The module is as it was."""
        for name in self._names:
            delattr(self._module, name)


def _gated(hook: Callable[..., Any], in_client: Callable[[], bool]) -> Callable[..., Any]:
    def gated(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if in_client() else None

    return gated
