"""Where a run stands: what of the Trainer's loops and results the federation reads, and has no public name.

A paragraph `Lightning:` says what Lightning keeps under which private name, and why there is no other way to it; a
paragraph `Upgrade:` says where to look when Lightning changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.data_connector import _worker_check


def next_round(trainer: pl.Trainer) -> int:
    """Index of the round that is to begin.

    Lightning: `_skip_backward` of the fit loop says that an epoch only feeds BatchNorm. Steps stand still in it; its
    rounds differ all the same.
    Upgrade: `StochasticWeightAveraging.on_train_epoch_start` in `callbacks/stochastic_weight_avg.py`.
    """
    loop = trainer.fit_loop
    return trainer.global_step + (loop.epoch_loop.batch_progress.current.ready if loop._skip_backward else 0)


def is_train_iterator(trainer: pl.Trainer, iterator: Iterator[Any]) -> bool:
    """Whether the Trainer itself asks an iterator over the train loader for batches.

    Lightning: `_combined_loader` of the fit loop has the loader that the Trainer reads, and `_iterator` of that the
    iterators of its parts.
    Upgrade: `CombinedLoader.__iter__` in `utilities/combined_loader.py`.
    """
    running = getattr(trainer.fit_loop._combined_loader, "_iterator", None)
    return running is None or any(each is iterator for each in running.iterators)


def advise_on_workers(trainer: pl.Trainer, loader: object) -> None:
    """Give Lightning's own advice about ``num_workers``, for a train loader that it does not get to see.

    Lightning: `_worker_check`, which it calls for a DataLoader only.
    Upgrade: `_worker_check` in `trainer/connectors/data_connector.py`.
    """
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
    """Which parts of the module were in training mode when the running validation began; empty if none is running.

    Lightning: `_module_mode` of the validation loop, which puts all parts into evaluation mode and back; checkpoints
    are saved before it is over.
    Upgrade: `_EvaluationLoop._on_evaluation_model_eval` in `loops/evaluation_loop.py`.
    """
    return trainer.fit_loop.epoch_loop.val_loop._module_mode.mode if trainer.evaluating else {}


def publish_round(trainer: pl.Trainer, metrics: dict[str, float], *, empty: bool) -> None:
    """Give a round's metrics to the loggers, and put them where callbacks look for what they monitor.

    Lightning: `_batches_that_stepped` of the epoch loop is the step under which `self.log` gives values to loggers;
    `_callback_metrics` and `_logged_metrics` of its `_logger_connector` are what callbacks and loggers read.
    Upgrade: `_LoggerConnector.log_metrics` in `trainer/connectors/logger_connector/logger_connector.py`.

    Args:
        trainer: the Trainer.
        metrics: by name.
        empty: whether nobody trained, of whom nothing new is known: who watches a loss goes on with the last one.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    values = dict(zip(metrics, torch.tensor([*metrics.values()]).unbind(), strict=True))
    for known in (trainer._logger_connector._callback_metrics, trainer._logger_connector._logged_metrics):
        if not empty:
            known.pop("round/loss", None)  # else a round without a loss would show that of an earlier one
        known.update(values)
