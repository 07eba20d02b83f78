"""The cost of what a run computes besides training: its evaluation, and the extra steps of other callbacks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_fedscale.callbacks.compute_accounting.counting import Counting
from lightning_fedscale.callbacks.compute_accounting.flop_meter import MeteredStep
from lightning_fedscale.strategy import FederatedStrategy


class EvaluationCounter(Callback):
    """The hooks of `ComputeAccounting` for validation and test batches, evaluations of clients' data and probing steps.

    A subclass sets the counting, which has the meter and the costs to add to.
    """

    _counting: Counting

    def __init__(self) -> None:
        self._evaluation: MeteredStep | None = None

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Open the count of a validation batch."""
        if not trainer.sanity_checking:
            self._open_evaluation(batch, "validation_step")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Close the count of the batch."""
        self._close_evaluation()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum the costs of the ranks; while clients train, the next round's collective does so."""
        in_rounds = isinstance(trainer.strategy, FederatedStrategy) and trainer.state.fn == TrainerFn.FITTING
        if not trainer.sanity_checking and not in_rounds:
            self._counting.add_up()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Open the count of a test batch."""
        self._open_evaluation(batch, "test_step")

    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum the costs of the ranks."""
        self._counting.add_up()

    def on_probe(self, trainer: pl.Trainer, batch: Any = None, flops: float = 0.0) -> None:
        """Count an extra training step of another callback, with this batch or of so many FLOPs."""
        self._counting.costs.add_probe(batch, flops)

    def on_client_evaluation(self, trainer: pl.Trainer, batch: Any) -> AbstractContextManager[Any]:
        """Return a context manager that counts another callback's evaluation of a client's batch."""
        if (meter := self._counting.meter) is None:
            return nullcontext()
        return meter.step(batch, name="validation_step", everything=True, charge=self._counting.costs.add_evaluation)

    def _open_evaluation(self, batch: Any, name: str) -> None:
        self._close_evaluation()
        if (meter := self._counting.meter) is not None:
            self._evaluation = meter.step(batch, name=name, charge=self._counting.costs.add_evaluation).__enter__()

    def _close_evaluation(self) -> None:
        step, self._evaluation = self._evaluation, None
        if step is not None:
            step.__exit__()

    def _drop_evaluation(self) -> None:
        """Discard the open count of a batch whose evaluation did not complete."""
        step, self._evaluation = self._evaluation, None
        if step is not None:
            step.__exit__(RuntimeError)
