"""SLURM's signal that a job's time is nearly over, which may come at any moment."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_fedscale.core.lightning.trainer_state import replaced


class Requeue(Callback):
    """Lightning answers the signal with a checkpoint and has SLURM run the job again; here at the end of the round.

    Lightning does so between any two instructions. Inside a round the ranks are at different places, some wait for
    others, and no collective would meet its own. So the signal is only noted, and the round's collective tells all
    ranks.

    Lightning: `_slurm_sigusr_handler_fn` of its `_signal_connector` is the handler, which is installed when `fit`
    begins. There is no argument for another one.
    Upgrade: `_SignalConnector.register_signal_handlers` in `trainer/connectors/signal_connector.py`.

    Args:
        trainer: the Trainer, before it sets its signal handlers.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._connector = trainer._signal_connector
        self._answer = self._connector._slurm_sigusr_handler_fn
        self._signal: int = signal.SIGTERM  # replaced by the one that came
        self.heard = False
        self.agreed = False

    def take_over(self) -> Callable[[], None]:
        """Hear the signal in Lightning's place; returns what undoes it."""
        return replaced(self._connector, "_slurm_sigusr_handler_fn", self.hear)

    def hear(self, signum: int, frame: Any) -> None:
        """Take note; this is the handler."""
        self._signal, self.heard = signum, True

    def on_train_batch_end(self, *_: Any) -> None:
        """The round is over for everybody: save, and ask for another run."""
        if self.agreed:
            self.heard = self.agreed = False
            self._answer(self._signal, None)  # type: ignore[arg-type]  # the frame, which it does not look at
