"""`ComputeAccounting`: count the cost of a run, and compare its model with the best size for that compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedscale.callbacks.compute_accounting.counting import Counting
from lightning_fedscale.callbacks.compute_accounting.curves import ComputeCurves
from lightning_fedscale.callbacks.compute_accounting.evaluation_counter import EvaluationCounter
from lightning_fedscale.callbacks.compute_accounting.flop_meter import Meter
from lightning_fedscale.callbacks.compute_accounting.limit import ComputeLimit
from lightning_fedscale.callbacks.compute_accounting.metrics import (
    cost_metrics,
    critical_batch,
    learning_rate,
    position_metrics,
)
from lightning_fedscale.callbacks.compute_accounting.position_finder import PositionFinder
from lightning_fedscale.callbacks.compute_accounting.report import Report, report_run
from lightning_fedscale.callbacks.compute_accounting.study import Measured, measured_for, study_of
from lightning_fedscale.core.lightning.loggers import send
from lightning_fedscale.core.lightning.trainer_state import logs_now
from lightning_fedscale.core.options.trainer_checks import check_package
from lightning_fedscale.devices.profiling.operator_counter import Operator
from lightning_fedscale.scaling import Law, Position
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.scaling.rho import Rho
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import RoundRecord
from lightning_fedscale.utils import collectives
from lightning_fedscale.utils.checks import flag, integer, is_number

_GROWTH = 1.02
"""Compute must grow by this factor before the next log, since closer points only cost time."""


class ComputeAccounting(EvaluationCounter):
    """Counts the cost of training, and compares the model with the best size for that compute.

    FLOPs are counted while the module's own steps run: the first steps of every batch signature, then a sample of them.
    The other steps are estimated from these, with an interval if costs differ (`Ledger.flops_interval`). FLOPs are
    summed by client under `FederatedStrategy`, with any executor, and by step under any other strategy. They are
    logged as ``compute/...`` as often as the Trainer logs, but only after compute has grown by two percent. All ranks
    share one ledger, which checkpoints save, so that nothing is counted twice after an interruption. The trials of
    Lightning's tuner and of ``executor="auto"`` are not counted.

    A scaling law turns the counts into a position: the best size for this compute and number of clients, the loss that
    the law predicts for that size and for this one, and one sentence of advice at the end. A law holds for the data it
    was fitted on. ``law="auto"`` takes the project's own, else Chinchilla's for language modelling, else none. If the
    law does not apply, only the counts and the reason are reported: the run is more than 100 times outside of the
    fitted range, its loss is more than twice, or less than half, the predicted one, or most parameters are frozen. Then
    fit a law to the task (`lightning_fedscale.scaling.fit`).

    Measurements take precedence: if ``fedscale size`` made a study of this partition, method and budget, the final
    report begins with its result.

    Args:
        law: "auto", the name of a law, a file of `Fit.save`, a law, or None for counts only.
        rho: cost of dividing data among clients, ``C_eff = C clients**-rho``: 1 counts the average client's compute
            (arXiv 2511.12188), 0 all of it; or the two ends of a span. "auto" takes the value measured with the law,
            with its interval. Without one, the span is 0 to 1, and there is a verdict only if it is the same for the
            whole span.
        clients: number of clients to ask the law about. None takes those that train in a round, since the others get
            none of its data and compute; pass a number to ask about another one.
        budget: FLOPs that the run will take in total; the position is then that at its end, extrapolated at the present
            ratio of tokens to FLOPs.
        tokens_fn: function of a batch that returns its number of tokens; called for batches whose step is counted. None
            counts the entries of the first tensor if these are integers in two dimensions, else samples.
        max_flops: stop training at the end of the step, or round, in which so many training FLOPs are spent. With
            several processes and no clients, every step then ends in a small collective.
        study: the ``size.json`` of ``fedscale size``; "auto" for the one in this folder, if any; None for none.
        report: False leaves out the report at the end: the table and the advice in the terminal, ``position.json``, and
            the texts and the figure in TensorBoard. What is logged during training stays, and so do ``position``,
            ``no_position`` and ``measured``.

    Attributes:
        position: a `Position`, once compute was spent, if a law applies. It is also saved, with the ledger's sums, in
            ``position.json`` in the run's folder.
        no_position: why there is none, in words; empty if there is one, or no law.
        measured: after training, the study's result for runs like this one; None without a matching study.

    Raises:
        TypeError, ValueError: for invalid arguments; from ``fit``, before the first step, if ``tokens_fn`` does not
            return a number above 0; after it, for ``max_flops`` if nothing in the step can be counted.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> accounting = ComputeAccounting()
        >>> trainer = pl.Trainer(max_steps=10, callbacks=[accounting], accelerator="cpu", logger=False,
        ...                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        What the run cost...
        >>> accounting.ledger.training_flops  # 10 x (2 x 32 x 2), forward and again for the gradients of the weights
        2560.0
    """

    def __init__(
        self,
        law: str | Law | None = "auto",
        rho: float | tuple[float, float] | Rho | str | None = "auto",
        budget: float | None = None,
        tokens_fn: Callable[[Any], float] | None = None,
        max_flops: float | None = None,
        clients: int | None = None,
        study: str | Path | None = "auto",
        report: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("budget", budget), ("max_flops", max_flops)):
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r}: pass a number of FLOPs above 0, or None.")
        if tokens_fn is not None and not callable(tokens_fn):
            raise TypeError(f"tokens_fn={tokens_fn!r}: pass a function that returns the number of tokens in a batch.")
        study_of(study)
        if clients is not None:
            integer("clients", clients, 1)
        self._finder = PositionFinder(law, rho, clients, budget)
        self._tokens_fn = tokens_fn
        self._limit = ComputeLimit(max_flops)
        self._study = study
        self._reports = flag("report", report)
        self._counting = Counting()
        self._curves = ComputeCurves()
        self._logged = 0.0  # FLOPs when there was last a log
        self._trainer: pl.Trainer | None = None
        self.position: Position | None = None
        self.no_position = ""
        self.measured: Measured | None = None

    @property
    def clients(self) -> int:
        """Number of clients of the position: those that train in a round, unless the argument sets it."""
        return self._finder.clients(self.ledger)

    @property
    def law(self) -> Law | None:
        """The law in use; None if there is none for this task."""
        return self._finder.law

    @property
    def ledger(self) -> Ledger:
        """The costs so far; with several processes and no clients, up to the last log."""
        return self._counting.ledger

    @property
    def remaining(self) -> float:
        """FLOPs left of ``max_flops``; infinite without a limit."""
        return self._limit.remaining(self.ledger)

    @property
    def operators(self) -> dict[str, Operator]:
        """All operators of the counted steps, and whether their FLOPs are counted, free or unknown."""
        return {} if self._counting.meter is None else self._counting.meter.coverage.operators

    def metrics_to_come(self) -> tuple[str, ...]:
        """Return the names of metrics for comparing runs that are logged later, since a position takes some steps."""
        return () if self.law is None else ("compute/size_ratio", "compute/excess_loss")

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a ledger, unless a run is continued."""
        if stage == "predict":
            return
        self._trainer = trainer
        if stage == "fit" and trainer.global_step == 0:
            self._counting, self._curves, self._logged = Counting(), ComputeCurves(), 0.0
            self.position, self.no_position, self.measured = None, "", None
            self._finder.begin()
        self._counting.meter = Meter(pl_module, self._tokens_fn)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start metering clients and energy, and stop at once if ``max_flops`` are spent."""
        check_package(self, trainer)
        meter = self._counting.meter
        assert meter is not None
        self._counting.begin_fit(trainer)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            meter.evaluations.counting = True
            trainer.callbacks.append(meter.evaluations)  # type: ignore[attr-defined]
        self._limit.stop_if_spent(trainer, self.ledger)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update the parameters, which may have been added, removed or pruned."""
        assert self._counting.meter is not None
        self._counting.meter.parameters.refresh()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the count of a step."""
        self._finder.observe_batch(batch)
        self._counting.begin_step(trainer, batch, batch_idx)

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """Count a completed round."""
        self._counting.count_round(trainer, record)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, stop if ``max_flops`` are spent, and log."""
        meter = self._counting.meter
        assert meter is not None
        self._counting.end_step()
        logs, in_rounds = logs_now(trainer), isinstance(trainer.strategy, FederatedStrategy)
        if logs:
            self._counting.measure_energy()
        if collectives.world_size() == 1 or (not in_rounds and (logs or self._limit.max_flops is not None)):
            self._counting.add_up()  # rounds share their costs in their own collective
        self._limit.check(pl_module, self.ledger, meter.coverage)
        self._limit.stop_if_spent(trainer, self.ledger)
        if (loss := _loss_of(outputs)) is not None:
            self._finder.losses.append(loss)
        if logs and self.ledger.training_flops > _GROWTH * self._logged:
            self._log(trainer, None if loss is None else float(loss))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the costs and the position of the run."""
        self._counting.end_step()
        self._counting.drop_step()
        self._counting.measure_energy()
        self._counting.add_up()
        if not self.ledger.tokens:
            return
        meter = self._counting.meter
        assert meter is not None
        if not self.ledger.training_flops:
            reason = meter.coverage.why_nothing(pl_module)
            rank_zero_warn(f"ComputeAccounting: the FLOPs of this run are unknown, since {reason}.")
        self._log(trainer, None, full=True)
        meter.coverage.warn_if_incomplete()
        spent = self._finder.budget or self.ledger.training_flops
        self.measured = measured_for(self._study, trainer, self.ledger.average_params, spent)
        if self._reports:
            report = Report(
                self.ledger, meter.parameters.size, self.clients, meter.coverage, self.position, self.law,
                self._finder.chosen_by_task, self.no_position, self.measured,
            )  # fmt: skip
            report_run(trainer, pl_module, report)
        self._curves.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Call `teardown`, which the Trainer skips after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the Trainer's callbacks."""
        self._counting.drop_step()
        self._drop_evaluation()
        meter, callbacks = self._counting.meter, trainer.callbacks  # type: ignore[attr-defined]
        if meter is not None and meter.evaluations in callbacks:
            callbacks.remove(meter.evaluations)

    # ---- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: all results, but nothing that belongs to a Trainer."""
        return {**vars(self), "_trainer": None, "_evaluation": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger and counts for the checkpoint; call it on all ranks, as for checkpoints."""
        if self._trainer is not None:
            self._counting.count_ended(self._trainer)
            self._counting.measure_energy()
            self._counting.add_up()
        state = {
            "ledger": self.ledger.state_dict(), "unit": self._curves.unit, "logged": self._logged,
            "losses": [float(loss) for loss in self._finder.losses],
        }  # fmt: skip
        meter = self._counting.meter
        return state if meter is None else {**state, "costs": meter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts from a checkpoint."""
        self.ledger.load_state_dict(state_dict["ledger"])
        self._curves.unit, self._logged = state_dict["unit"], state_dict["logged"]
        if self._counting.meter is not None and "costs" in state_dict:
            self._counting.meter.load_state_dict(state_dict["costs"])
        self._finder.losses.extend(map(torch.tensor, state_dict.get("losses", ())))

    def _log(self, trainer: pl.Trainer, loss: float | None, *, full: bool = False) -> None:
        """Update the position, and log it with the costs if there are new ones."""
        ledger, meter = self.ledger, self._counting.meter
        assert meter is not None
        here, self.position, self.no_position = self._finder.locate(trainer, ledger, meter, full=full)
        before, self._logged = self._logged, ledger.training_flops
        if self._logged > before:
            self._curves.add(trainer, self._logged, loss, here)
            batch_ratio = self._counting.batch / critical_batch(trainer, ledger, self.law, self.position)
            values = {
                **cost_metrics(ledger, self.clients, self._limit.max_flops or self._finder.budget),
                "compute/learning_rate": learning_rate(trainer),
                "compute/critical_batch_ratio": batch_ratio,
                **position_metrics(self.position),
            }
            send(trainer, {name: value for name, value in values.items() if math.isfinite(value)})


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None
