"""Handling of SLURM's signal that a job's time is nearly over, which may come at any moment."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_fedscale.core.lightning.trainer_state import replaced


class Requeue(Callback):
    """Defers Lightning's answer to the signal, a checkpoint and a requeued job, to the end of the round.

    Lightning answers between any two instructions. Inside a round the ranks are at different points, some wait for
    others, and collectives would not match. The signal is therefore only recorded, and the round's collective informs
    all ranks.

    Lightning: `_slurm_sigusr_handler_fn` of its `_signal_connector` is the handler, which is installed when `fit`
    begins. There is no argument for another one.
    Upgrade: `_SignalConnector.register_signal_handlers` in `trainer/connectors/signal_connector.py`.

    Args:
        trainer: the Trainer, before it sets its signal handlers.

    Attributes:
        requested: whether this rank has received the signal.
        agreed: whether any rank has, as all ranks know from the round's collective.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._connector = trainer._signal_connector
        self._answer = self._connector._slurm_sigusr_handler_fn
        self._signal: int = signal.SIGTERM  # replaced by the received one
        self.requested = False
        self.agreed = False

    def take_over(self) -> Callable[[], None]:
        """Receive the signal in Lightning's place; return a function that undoes it."""
        return replaced(self._connector, "_slurm_sigusr_handler_fn", self.request)

    def request(self, signum: int, frame: Any) -> None:
        """Handle the signal: record that SLURM has requested a checkpoint."""
        self._signal, self.requested = signum, True

    def on_train_batch_end(self, *_: Any) -> None:
        """Save a checkpoint and requeue the job if all ranks have agreed, at the end of the round."""
        if self.agreed:
            self.requested = self.agreed = False
            self._answer(self._signal, None)  # type: ignore[arg-type]  # the frame, which it does not look at
