"""How the Trainer's callbacks, loggers and progress bar follow a round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedscale.core.executors import ClientLog, listeners
from lightning_fedscale.core.lightning.hooks import is_listened_to
from lightning_fedscale.core.lightning.monitors import Monitors
from lightning_fedscale.core.lightning.progress import ClientProgress
from lightning_fedscale.core.lightning.run_state import publish_round
from lightning_fedscale.types import ClientUpdate, IntArray, Params, RoundRecord


class Notifier:
    """Calls the hooks of `lightning_fedscale.callbacks.RoundEvents`, shows progress, and logs the results of a round.

    It is the `lightning_fedscale.core.executors.round_context.Watcher` of the executors.

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
        """Let clients train inside without calling hooks or logging."""
        self._silent = True
        try:
            with self._log.silenced():
                yield
        finally:
            self._silent = False

    def expect_clients(self, due: int) -> None:
        """Prepare for a round in which this rank trains so many clients."""
        self._progress = ClientProgress(self._trainer, due)

    def round_started(self, round: int, cohort: IntArray) -> None:
        """Tell callbacks that the cohort is known and the module holds the global model."""
        self._call("on_round_start", round, cohort)

    def client_started(self, client: int) -> None:
        """See `lightning_fedscale.core.executors.round_context.Watcher`."""
        self._call("on_client_start", client)

    def client_stepped(self, done: int, loss: Tensor | None) -> None:
        """See `lightning_fedscale.core.executors.round_context.Watcher`."""
        self._progress.show(done, loss)

    def client_ended(self, update: ClientUpdate) -> None:
        """See `lightning_fedscale.core.executors.round_context.Watcher`."""
        self._call("on_client_end", update)

    def aggregated(self, record: RoundRecord, delta: Params) -> None:
        """Tell callbacks that the updates are merged and the server is about to step."""
        self._call("on_before_server_step", record, delta)

    def server_step(self, step: Params) -> Params:
        """Let callbacks change a copy of the step, since a server optimizer may keep the original."""
        if is_listened_to(self._trainer, "on_server_step"):
            step = {name: value.clone() for name, value in step.items()}
            self._call("on_server_step", step)
        return step

    def round_ended(self, record: RoundRecord) -> None:
        """Log the round and tell callbacks, once the Trainer has counted it and stepped its schedules."""
        self._warn_of_no_loss(record)
        self._report(record)
        self._call("on_round_end", record)

    def _call(self, hook: str, *values: Any) -> None:
        for each in () if self._silent else listeners(self._trainer):
            if (method := getattr(each, hook, None)) is not None:
                method(self._trainer, self._trainer.lightning_module, *values)

    def _report(self, record: RoundRecord) -> None:
        """Send the metrics of each round straight to the loggers, and to where callbacks monitor them."""
        self._log.points.send()
        publish_round(self._trainer, record.metrics(), empty=record.empty)
        self.monitors.end_round(empty=record.empty)

    def _warn_of_no_loss(self, record: RoundRecord) -> None:
        """Warn in the first round if ``training_step`` returned nothing for all batches; it may skip some."""
        if record.round or not self._trainer.lightning_module.automatic_optimization:
            return
        if len(record.clients) and np.isnan(record.losses).all() and not record.delta_norms.any():
            rank_zero_warn(
                "training_step returned None for every batch of the first round, so no client has learnt anything:"
                " return the loss, or set automatic_optimization=False to step optimizers yourself."
            )
