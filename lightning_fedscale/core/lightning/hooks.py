"""Hooks of the user's module that belong to local batches, kept silent where a step is a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

PER_LOCAL_BATCH = ("on_train_batch_start", "on_train_batch_end")


class LocalBatchHooks:
    """While in place, the module's per-batch hooks answer only inside a client.

    The Trainer calls them once per step, that is per round, with the global model; they were written for batches.

    Args:
        module: the user's module.
        in_client: whether a client is training right now.
    """

    def __init__(self, module: pl.LightningModule, in_client: Callable[[], bool]) -> None:
        self._module = module
        self._names = [name for name in PER_LOCAL_BATCH if is_overridden(name, module)]
        self._own = {name: vars(module)[name] for name in self._names if name in vars(module)}
        for name in self._names:
            setattr(module, name, _Gated(getattr(module, name), in_client))

    def remove(self) -> None:
        """The module is as it was."""
        for name in self._names:
            delattr(self._module, name)
        for name, hook in self._own.items():
            setattr(self._module, name, hook)


def listeners(trainer: pl.Trainer) -> Iterator[Any]:
    """Who hears of the events of a round: the Trainer's callbacks, each followed by what it keeps in ``listeners``.

    Those do not show up in ``trainer.callbacks``, where others look, or in checkpoints.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield callback
        yield from vars(callback).get("listeners", ())


class RoundEnd(Callback):
    """The first of the Trainer's callbacks: ends a round where the Trainer's own count of it is complete.

    A checkpoint that a callback saves at the end of a round, or that an exception there leads to, then holds the new
    global model together with the counters and schedules that belong to it.

    Args:
        end: what to do.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def on_train_batch_end(self, *_: Any) -> None:
        """The Trainer has counted the round; the other callbacks have yet to be told."""
        self._end()


class _Gated:
    def __init__(self, hook: Callable[..., Any], in_client: Callable[[], bool]) -> None:
        self.__wrapped__ = hook  # where Lightning looks for what the user wrote
        self._in_client = in_client

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs) if self._in_client() else None

    def __reduce__(self) -> tuple[Any, ...]:
        # A module that is copied or pickled during `fit` has its own hook again.
        return as_it_was, (self.__wrapped__,)


def as_it_was(hook: Callable[..., Any]) -> Callable[..., Any]:
    """What a stand-in for a hook becomes when its module is copied or pickled: the hook."""
    return hook
