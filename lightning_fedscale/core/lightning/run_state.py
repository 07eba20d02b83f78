"""Where a Trainer stands: what of its loops and results has no public name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.data_connector import _worker_check


def next_round(trainer: pl.Trainer) -> int:
    """Index of the round that is to begin."""
    loop = trainer.fit_loop
    # Steps stand still in an epoch that only feeds BatchNorm; its rounds differ all the same.
    return trainer.global_step + (loop.epoch_loop.batch_progress.current.ready if loop._skip_backward else 0)


def is_train_iterator(trainer: pl.Trainer, iterator: Iterator[Any]) -> bool:
    """Whether the Trainer itself asks an iterator over the train loader for batches."""
    running = getattr(trainer.fit_loop._combined_loader, "_iterator", None)
    return running is None or any(each is iterator for each in running.iterators)


def advise_on_workers(trainer: pl.Trainer, loader: object) -> None:
    """Lightning's own advice about ``num_workers``, for a train loader that it does not get to see."""
    _worker_check(trainer, loader, "train_dataloader")


@contextmanager
def last_batch_kept(trainer: pl.Trainer) -> Iterator[None]:
    """What is inside may say which of its batches is the last one; the Trainer's own answer is back afterwards."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_last = progress.is_last_batch
    try:
        yield
    finally:
        progress.is_last_batch = is_last


def modes_before_validation(trainer: pl.Trainer) -> dict[str, bool]:
    """Which modules were in training mode before validation put all in evaluation mode; empty outside of it."""
    # Checkpoints are saved in the end of validation.
    return dict(trainer.fit_loop.epoch_loop.val_loop._module_mode.mode) if trainer.evaluating else {}


def publish_round(trainer: pl.Trainer, metrics: dict[str, float], *, empty: bool) -> None:
    """Give a round's metrics to the loggers, and put them where callbacks look for what they monitor.

    Args:
        trainer: the Trainer.
        metrics: by name; in float32, as what is logged.
        empty: whether nobody trained, of whom nothing new is known: who watches a loss goes on with the last one.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    values = dict(zip(metrics, torch.tensor([*metrics.values()]).unbind(), strict=True))
    for known in (trainer._logger_connector._callback_metrics, trainer._logger_connector._logged_metrics):
        if not empty:
            known.pop("round/loss", None)  # else a round without a loss would show that of an earlier one
        known.update(values)
