"""What a round reads and writes of the Trainer's progress and results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch

from lightning_fedscale.core.lightning.trainer_state import learns_nothing, metric_stores, steps_logged


def next_round(trainer: pl.Trainer) -> int:
    """Return the index of the round that is about to begin.

    Steps stand still in an epoch that only feeds BatchNorm; its rounds differ all the same.
    """
    extra = trainer.fit_loop.epoch_loop.batch_progress.current.ready if learns_nothing(trainer) else 0
    return trainer.global_step + extra


@contextmanager
def last_batch_kept(trainer: pl.Trainer) -> Iterator[None]:
    """Restore the Trainer's own answer to which batch is the last one; inside, clients may set theirs."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_last = progress.is_last_batch
    try:
        yield
    finally:
        progress.is_last_batch = is_last


def publish_round(trainer: pl.Trainer, metrics: dict[str, float], *, empty: bool) -> None:
    """Give a round's metrics to the loggers and to the callbacks that monitor them.

    Args:
        trainer: the Trainer.
        metrics: by name.
        empty: whether no client trained; callbacks that watch a loss then keep the last one.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=steps_logged(trainer))
    values = dict(zip(metrics, torch.tensor([*metrics.values()]).unbind(), strict=True))
    for known in metric_stores(trainer):
        if not empty:
            known.pop("round/loss", None)  # else a round without a loss would show that of an earlier one
        known.update(values)
