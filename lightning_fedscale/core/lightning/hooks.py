"""The module's hooks for local batches, which must not run when a step is a round, and the callbacks' own events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

PER_LOCAL_BATCH = ("on_train_batch_start", "on_train_batch_end")


class LocalBatchHooks:
    """Makes the module's per-batch hooks run only inside a client, until removed.

    The Trainer calls them once per step, that is once per round, with the global model; but they were written for
    batches.

    Args:
        module: the user's module.
        in_client: returns whether a client is training now.
    """

    def __init__(self, module: pl.LightningModule, in_client: Callable[[], bool]) -> None:
        self._module = module
        self._names = [name for name in PER_LOCAL_BATCH if is_overridden(name, module)]
        self._own = {name: vars(module)[name] for name in self._names if name in vars(module)}
        for name in self._names:
            setattr(module, name, _Gated(getattr(module, name), in_client))

    def remove(self) -> None:
        """Restore the module."""
        for name in self._names:
            delattr(self._module, name)
        for name, hook in self._own.items():
            setattr(self._module, name, hook)


_NAMES_EVENTS = "lightning_fedscale.callbacks.round_events"
"""The module whose hooks do nothing."""


def listeners(trainer: pl.Trainer) -> Iterator[Any]:
    """Yield the receivers of a round's events: the Trainer's callbacks, each followed by those in its ``listeners``.

    The latter do not appear in ``trainer.callbacks``, which others read, or in checkpoints.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield callback
        yield from vars(callback).get("listeners", ())


def is_listened_to(trainer: pl.Trainer, event: str) -> bool:
    """Return whether somebody does something at an event of a round; the hooks of `RoundEvents` only name it."""
    hooks = [getattr(each, event, None) for each in listeners(trainer)]
    return any(hook is not None and getattr(hook, "__module__", "") != _NAMES_EVENTS for hook in hooks)


def announce_probe(trainer: pl.Trainer, batch: Any = None, flops: float = 0.0) -> None:
    """Call `on_probe` of the Trainer's callbacks: an extra training step ran, with this batch or of so many FLOPs."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (hook := getattr(callback, "on_probe", None)) is not None:
            hook(trainer, batch, flops=flops)


class RoundEnd(Callback):
    """The first of the Trainer's callbacks: ends a round when the Trainer has counted it.

    A checkpoint that a callback saves at the end of a round, or that is saved after an exception there, then holds the
    new global model together with the matching counters and schedules.

    Args:
        end: ends the round.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def on_train_batch_end(self, *_: Any) -> None:
        """End the round, after the Trainer counted it and before other callbacks are called."""
        self._end()


class _Gated:
    def __init__(self, hook: Callable[..., Any], in_client: Callable[[], bool]) -> None:
        self.__wrapped__ = hook  # where Lightning looks for the user's hook
        self._in_client = in_client

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs) if self._in_client() else None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copying or pickling a module during `fit` restores its own hook.
        return as_it_was, (self.__wrapped__,)


def as_it_was(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook; copying or pickling a module calls this in place of the hook's replacement."""
    return hook
