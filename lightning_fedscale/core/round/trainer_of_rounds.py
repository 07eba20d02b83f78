"""What changes in a Trainer while its steps are rounds."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_fedscale.core.lightning.hooks import RoundEnd
from lightning_fedscale.core.lightning.round_loops import NoAccumulation
from lightning_fedscale.core.lightning.trainer_state import replaced, without_placeholder_metric
from lightning_fedscale.core.round.federation import Federation
from lightning_fedscale.core.round.run_settings_logger import RunSettingsLogger
from lightning_fedscale.utils.foreign import is_really


def prepared_for_rounds(trainer: pl.Trainer, federation: Federation, share: float | int) -> ExitStack:
    """Add the callbacks of rounds to a Trainer, and let its arguments count rounds; return what undoes both.

    Args:
        trainer: the Trainer, about to fit.
        federation: what it trains.
        share: share or number of each client's batches to use, see `share_of_batches`.
    """
    options, requeue = federation.fit.options, federation.fit.requeue
    settings: Any = trainer  # these are set from outside the class, where mypy does not see them
    callbacks: list[Any] = settings.callbacks
    with ExitStack() as undo:
        settings_logger = RunSettingsLogger(options, lambda: federation.fit.executor.chosen)
        for own in (settings_logger, RoundEnd(federation.end_round)):  # the end of the round first
            callbacks.insert(0, own)
            undo.callback(callbacks.remove, own)
        callbacks.append(requeue)  # what it saves has every callback's state after the round
        undo.callback(callbacks.remove, requeue)
        undo.callback(requeue.take_over())
        for logger in trainer.loggers:
            if is_really(logger, TensorBoardLogger):  # HParams gets real metrics instead of its placeholder
                undo.callback(without_placeholder_metric(logger))
        undo.callback(replaced(trainer, "accumulate_grad_batches", NoAccumulation(1)))
        every = min(settings.log_every_n_steps, options.rounds_per_epoch)
        undo.callback(replaced(trainer, "log_every_n_steps", every))
        if share != 1.0 or isinstance(share, int):
            undo.callback(replaced(trainer, "limit_train_batches", 1.0))
        return undo.pop_all()


def share_of_batches(trainer: pl.Trainer) -> float | int:
    """Return the share or number of each client's batches that the Trainer's arguments leave."""
    settings: Any = trainer
    if settings.overfit_batches:
        batches: float | int = settings.overfit_batches
        return batches
    # As a float it is a share of every client's batches; as an int it counts steps, that is rounds.
    limit = trainer.limit_train_batches
    return limit if isinstance(limit, float) and limit > 0 else 1.0
