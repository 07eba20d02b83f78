"""What the Trainer's callbacks, loggers and progress bar hear of a round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedscale.core.executors import ClientLog, listeners
from lightning_fedscale.core.lightning.monitors import Monitors
from lightning_fedscale.core.lightning.progress import ClientProgress
from lightning_fedscale.core.lightning.run_state import publish_round
from lightning_fedscale.types import ClientUpdate, IntArray, Params, RoundRecord


class Notifier:
    """Calls the hooks of `lightning_fedscale.callbacks.RoundEvents`, shows progress, and logs what a round came to.

    It is the `lightning_fedscale.core.executors.sequential.Watcher` of the executors.

    Args:
        trainer: the Trainer.
        log: what clients log.

    Attributes:
        monitors: what callbacks and schedulers watch.
    """

    def __init__(self, trainer: pl.Trainer, log: ClientLog) -> None:
        self._trainer = trainer
        self._log = log
        self._progress = ClientProgress(trainer, 0)
        self._silent = False
        self.monitors = Monitors(trainer)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Clients train inside, and nobody hears of it."""
        self._silent = True
        try:
            with self._log.silenced():
                yield
        finally:
            self._silent = False

    def expect_clients(self, due: int) -> None:
        """A round begins, in which this rank trains so many clients."""
        self._progress = ClientProgress(self._trainer, due)

    def round_started(self, round: int, cohort: IntArray) -> None:
        """The cohort is known and the module holds the global model."""
        self._call("on_round_start", round, cohort)

    def client_started(self, client: int) -> None:
        """See `lightning_fedscale.core.executors.sequential.Watcher`."""
        self._call("on_client_start", client)

    def client_stepped(self, done: int, loss: Tensor | None) -> None:
        """See `lightning_fedscale.core.executors.sequential.Watcher`."""
        self._progress.show(done, loss)

    def client_ended(self, update: ClientUpdate) -> None:
        """See `lightning_fedscale.core.executors.sequential.Watcher`."""
        self._call("on_client_end", update)

    def aggregated(self, record: RoundRecord, delta: Params) -> None:
        """The updates are merged, and the server is about to step."""
        self._call("on_before_server_step", record, delta)

    def server_step(self, step: Params) -> Params:
        """Let callbacks change the step; what they get is theirs, since a server optimizer may keep its own."""
        if any(hasattr(each, "on_server_step") for each in listeners(self._trainer)):
            step = {name: value.clone() for name, value in step.items()}
            self._call("on_server_step", step)
        return step

    def round_ended(self, record: RoundRecord) -> None:
        """The Trainer has counted the round and stepped its schedules: log it and tell callbacks."""
        self._warn_of_no_loss(record)
        self._report(record)
        self._call("on_round_end", record)

    def _call(self, hook: str, *values: Any) -> None:
        for each in () if self._silent else listeners(self._trainer):
            if (method := getattr(each, hook, None)) is not None:
                method(self._trainer, self._trainer.lightning_module, *values)

    def _report(self, record: RoundRecord) -> None:
        """Straight to the loggers, every round, and to where callbacks look for what they monitor."""
        self._log.send()
        publish_round(self._trainer, record.metrics(), empty=record.empty)
        self.monitors.end_round(empty=record.empty)

    def _warn_of_no_loss(self, record: RoundRecord) -> None:
        """Once: a ``training_step`` that returns nothing may skip a batch, but to skip all of them is a mistake."""
        if record.round or not self._trainer.lightning_module.automatic_optimization:
            return
        if len(record.clients) and np.isnan(record.losses).all() and not record.delta_norms.any():
            rank_zero_warn(
                "training_step returned None for every batch of the first round, so no client has learnt anything:"
                " return the loss, or set automatic_optimization=False to step optimizers yourself."
            )
