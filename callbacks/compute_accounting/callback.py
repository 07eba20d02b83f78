"""`ComputeAccounting`: count the cost of a run, and compare its model with the best size for that compute."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_fedscale.callbacks.compute_accounting.advice import sweep_advice
from lightning_fedscale.callbacks.compute_accounting.counting import Counting
from lightning_fedscale.callbacks.compute_accounting.flop_meter import Meter
from lightning_fedscale.callbacks.compute_accounting.report import ComputeCurves, Report, print_report, save_report
from lightning_fedscale.callbacks.compute_accounting.run_facts import agreement_of
from lightning_fedscale.callbacks.compute_accounting.study import Measured, measured_of, study_of
from lightning_fedscale.callbacks.compute_accounting.task import has_targets_for_tokens, predicts_its_tokens, size_by
from lightning_fedscale.callbacks.critical_phase.callback import CriticalPhase
from lightning_fedscale.core.lightning.loggers import send
from lightning_fedscale.core.lightning.trainer_state import logs_now
from lightning_fedscale.core.options.trainer_checks import check_package
from lightning_fedscale.devices.profiling.operator_counter import UNKNOWN, Operator
from lightning_fedscale.scaling import (
    Kaplan,
    Law,
    Position,
    law_of,
    position_of,
)
from lightning_fedscale.scaling.applies import why_another_loss, why_far, why_frozen
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.scaling.rho import Rho, rho_of
from lightning_fedscale.scaling.runs import LOSSES
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import RoundRecord
from lightning_fedscale.utils import collectives
from lightning_fedscale.utils.checks import flag, integer

_GROWTH = 1.02
"""Compute must grow by this factor before the next log, since closer points only cost time."""

_LAST = 20
"""Number of the latest steps, or rounds, whose mean loss is compared with the law's."""

_LOOKS = 4
"""Steps after which, if none had operations to count, none is expected to."""

_UNCOUNTED = 0.01
"""Fraction of time in operators of unknown cost above which a warning is given."""


class ComputeAccounting(Callback):
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
        self._law, _ = law_of(law, text=False)
        self._auto = isinstance(law, str) and law == "auto"
        self._rho = rho
        rho_of(rho)
        study_of(study)
        self._asked_study = study
        self._reports = flag("report", report)
        if clients is not None:
            integer("clients", clients, 1)
        self._asked_clients = clients
        for name, value in (("budget", budget), ("max_flops", max_flops)):
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r}: pass a number of FLOPs above 0, or None.")
        if tokens_fn is not None and not callable(tokens_fn):
            raise TypeError(f"tokens_fn={tokens_fn!r}: pass a function of a batch.")
        self._budget = budget
        self._max_flops = max_flops
        self._tokens_fn = tokens_fn
        self._trainer: pl.Trainer | None = None
        self._curves = ComputeCurves()
        self._counting = Counting(Ledger())
        self._logged = 0.0  # FLOPs when there was last a log
        self._losses: deque[Tensor] = deque(maxlen=_LAST)  # of the last steps or rounds
        self._reads_tokens: bool | None = None  # None before the first batch
        self._module: pl.LightningModule | None = None
        self.position: Position | None = None
        self.no_position = ""
        self.measured: Measured | None = None

    @property
    def clients(self) -> int:
        """Number of clients of the position: those that train in a round, unless the argument sets it."""
        return self._asked_clients or self.ledger.average_cohort

    @property
    def law(self) -> Law | None:
        """The law in use; None if there is none for this task."""
        return self._law

    @property
    def ledger(self) -> Ledger:
        """The costs so far; with several processes and no clients, up to the last log."""
        return self._counting.ledger

    @property
    def remaining(self) -> float:
        """FLOPs left of ``max_flops``; infinite without a limit."""
        return math.inf if self._max_flops is None else max(0.0, self._max_flops - self.ledger.training_flops)

    @property
    def operators(self) -> dict[str, Operator]:
        """All operators of the counted steps, and whether their FLOPs are counted, free or unknown."""
        return {} if self._counting.meter is None else self._counting.meter.operators

    # ---- hooks: begin and end

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a ledger, unless a run is continued."""
        if stage == "predict":
            return
        self._trainer, self._module = trainer, pl_module
        if stage == "fit" and trainer.global_step == 0:
            self._counting, self._curves, self.position = Counting(Ledger()), ComputeCurves(), None
            self._logged, self.no_position, self._reads_tokens, self.measured = 0.0, "", None, None
            self._losses.clear()
            if self._auto:
                self._law, _ = law_of("auto", text=False)
        self._counting.meter = Meter(trainer, pl_module, self._tokens_fn)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start metering clients and energy, and stop at once if ``max_flops`` are spent."""
        check_package(self, trainer)
        meter = self._counting.meter
        assert meter is not None
        self._counting.begin_fit(trainer)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            meter.evaluations.counting = True
            trainer.callbacks.append(meter.evaluations)  # type: ignore[attr-defined]
        self._stop_if_spent(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the costs and the position of the run."""
        self._counting.end_step()
        self._counting.drop_step()
        self._counting.measure_energy()
        self._counting.add_up()
        if not self.ledger.tokens:
            return
        if not self.ledger.training_flops:
            rank_zero_warn(f"ComputeAccounting: {self._nothing()}, so the FLOPs of this run are not known.")
        meter = self._counting.meter
        assert meter is not None
        self._log(trainer, None)
        self._locate(trainer, full=True)
        self._check_coverage()
        self.measured = self._measured(trainer)
        if self._reports:
            self._report(trainer, pl_module, meter)
        self._curves.close()

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, meter: Meter) -> None:
        """Say at the end what the run cost, where it stands, and what to do next."""
        if trainer.is_global_zero:
            known = Report(
                self.ledger, meter.size, self.clients, meter.operators, self.position, self._law, self.no_position,
                self.measured,
            )  # fmt: skip
            print_report(known)
            save_report(trainer, known)
        if self.no_position and self._law is not None and not (self._auto and self._law.fitted_on is None):
            rank_zero_warn(f"ComputeAccounting: no position under {self._law.name}: {self.no_position}")
        nothing_said = self.measured is None and self.position is None and self._auto
        if nothing_said and (self._law is None or not self._law.problems):
            advice = sweep_advice(trainer, pl_module, self.ledger.training_flops)
            rank_zero_info(f"ComputeAccounting: no law for this task yet: fit one. {advice}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Call `teardown`, which the Trainer skips after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the Trainer's callbacks."""
        self._counting.drop_step()
        meter, callbacks = self._counting.meter, trainer.callbacks  # type: ignore[attr-defined]
        if meter is not None and meter.evaluations in callbacks:
            callbacks.remove(meter.evaluations)

    # ---- hooks: training

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update the parameters, which may have been added, removed or pruned."""
        assert self._counting.meter is not None
        self._counting.meter.refresh()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the count of a step."""
        if self._reads_tokens is None:
            self._reads_tokens = has_targets_for_tokens(batch)
        self._counting.begin_step(trainer, batch, batch_idx)

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """Count a completed round."""
        self._counting.count_round(trainer, record)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, stop if ``max_flops`` are spent, and log."""
        self._counting.end_step()
        logs, alone = logs_now(trainer), collectives.world_size() == 1
        if logs:
            self._counting.measure_energy()
        if alone or (not _federated(trainer) and (logs or self._max_flops is not None)):
            self._counting.add_up()  # rounds share their costs in their own collective
        if self._max_flops is not None and self.ledger.steps >= _LOOKS and not self.ledger.training_flops:
            raise ValueError(
                f"max_flops={self._max_flops:g}: {self._nothing()}, so that training would never end: pass max_steps,"
                " max_epochs or max_time to the Trainer instead."
            )
        self._stop_if_spent(trainer)
        if (loss := _loss_of(outputs)) is not None:
            self._losses.append(loss)
        if logs and self.ledger.training_flops > _GROWTH * self._logged:
            self._log(trainer, None if loss is None else float(loss))

    # ---- hooks: evaluation and probing

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Open the count of a validation batch, which is evaluation."""
        if not trainer.sanity_checking:
            self._counting.begin_evaluation(batch, "validation_step")

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
        self._counting.end_evaluation()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum the costs of the ranks; while clients train, the next round's collective does so."""
        if not trainer.sanity_checking and not (_federated(trainer) and trainer.state.fn == TrainerFn.FITTING):
            self._counting.add_up()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Open the count of a test batch, which is evaluation."""
        self._counting.begin_evaluation(batch, "test_step")

    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum the costs of the ranks."""
        self._counting.add_up()

    def on_probe(self, trainer: pl.Trainer, batch: Any = None, flops: float = 0.0) -> None:
        """Count an extra training step of another callback, with this batch or of so many FLOPs."""
        self._counting.count_probe(batch, flops)

    def on_client_evaluation(self, trainer: pl.Trainer, batch: Any) -> AbstractContextManager[Any]:
        """Return a context manager that counts another callback's evaluation of a client's batch."""
        return self._counting.evaluation(batch)

    # ---- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: all results, but nothing that belongs to a Trainer."""
        return {**vars(self), "_trainer": None, "_module": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger and counts for the checkpoint; call it on all ranks, as for checkpoints."""
        if self._trainer is not None:
            self._counting.settle(self._trainer)
            self._counting.measure_energy()
            self._counting.add_up()
        state = {
            "ledger": self.ledger.state_dict(), "unit": self._curves.unit, "logged": self._logged,
            "losses": [float(loss) for loss in self._losses],
        }  # fmt: skip
        meter = self._counting.meter
        return state if meter is None else {**state, "costs": meter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts from a checkpoint."""
        self.ledger.load_state_dict(state_dict["ledger"])
        self._curves.unit, self._logged = state_dict["unit"], state_dict["logged"]
        if self._counting.meter is not None and "costs" in state_dict:
            self._counting.meter.load_state_dict(state_dict["costs"])
        self._losses.extend(map(torch.tensor, state_dict.get("losses", ())))

    # ---- the position of the run

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        if self.remaining > 0.0 or trainer.should_stop:
            return
        trainer.should_stop = True
        spent = self.ledger.training_flops
        rank_zero_info(f"ComputeAccounting: training ends, for {spent:.3g} of max_flops={self._max_flops:g} are spent.")

    def _nothing(self) -> str:
        unknown = ", ".join(name for name, seen in self.operators.items() if seen.kind == UNKNOWN)
        found = f"only operators whose FLOPs are not known ({unknown})" if unknown else "no product of matrices"
        return f"in the steps of {type(self._trainer.lightning_module).__name__} there is {found}"  # type: ignore[union-attr]

    def _choose_law(self) -> None:
        meter, module = self._counting.meter, self._module
        if self._auto and self._law is None and self._reads_tokens and meter is not None and module is not None:
            self._law, _ = law_of("auto", text=predicts_its_tokens(module, meter.size))

    def _locate(self, trainer: pl.Trainer, full: bool = False) -> Position | None:
        """Set the position, at the end of the budget if there is one, and return the current one."""
        ledger, meter = self.ledger, self._counting.meter
        self.position, self.no_position = None, ""
        if self._law is None or not ledger.training_flops or meter is None or self._module is None:
            return None
        law, size = self._law, meter.size
        params = size_by(law, ledger.average_params, self._module, size)

        def position(flops: float) -> Position:
            return position_of(
                law, params=params, tokens=ledger.tokens * flops / ledger.training_flops,
                flops=flops, clients=self.clients, rho=self._rho, full=full,
            )  # fmt: skip

        try:
            reason = why_frozen(law, trained=size.trainable, total=size.total)
            if reason is None and not law.problems:  # a law with problems explains itself
                reason = why_far(law, params=params, flops=self._budget or ledger.training_flops)
            if reason is None:
                here = position(ledger.training_flops)
                reason = self._why_another_loss(trainer, law, here)
            if reason is None:
                found = here if self._budget is None else position(self._budget)
                self.position = replace(found, agreement=agreement_of(law, trainer, ledger.samples))
                return here
        except (ValueError, ArithmeticError) as error:
            reason = str(error).rstrip(".")
        self.no_position = reason
        return None

    def _measured(self, trainer: pl.Trainer) -> Measured | None:
        """Return the study's result for this run; log the reason if a study has none."""
        spent = self.ledger.training_flops if self._budget is None else self._budget
        try:
            study = study_of(self._asked_study)
            if study is None:
                return None
            found = measured_of(study, trainer, self.ledger.average_params, spent)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:  # edited or deleted during the run
            found = f"it cannot be read ({error!r})"
        if isinstance(found, Measured):
            return found
        rank_zero_info(f"ComputeAccounting: the study of fedscale size says nothing of this run: {found}.")
        return None

    def _why_another_loss(self, trainer: pl.Trainer, law: Law, here: Position) -> str | None:
        known = trainer.callback_metrics
        name = next((each for each in LOSSES if each in known), None)
        if name is not None:
            observed = float(known[name])
        elif self._losses:
            observed = sum(map(float, self._losses)) / len(self._losses)
        else:
            return None
        # For a span of rho, one reading that fits the loss is enough.
        reasons = [
            why_another_loss(law, predicted=each.predicted_loss, observed=observed, validated=name is not None)
            for each in (here, *here.readings)
        ]
        return None if None in reasons else reasons[0]

    def _log(self, trainer: pl.Trainer, loss: float | None) -> None:
        before, self._logged = self._logged, self.ledger.training_flops
        self._choose_law()
        here = self._locate(trainer)
        if self._logged > before:
            self._curves.add(trainer, self._logged, loss, here)
            send(trainer, self._metrics(trainer))

    def _metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        ledger, limit = self.ledger, self._max_flops or self._budget
        values = {
            "compute/flops_total": ledger.training_flops,
            "compute/flops_per_client": ledger.training_flops / self.clients,
            **{f"compute/flops_{purpose}": spent for purpose, spent in ledger.flops.items()},
            "compute/tokens": ledger.tokens,
            "compute/params": ledger.average_params,
            "compute/clients": self.clients,
            "compute/learning_rate": _rate(trainer),
            "compute/budget_used": math.nan if limit is None else ledger.training_flops / limit,
            "compute/critical_batch_ratio": self._counting.batch / self._critical_batch(trainer),
            "compute/joules": math.nan if ledger.joules is None else ledger.joules,
        }
        if (position := self.position) is not None:
            readings = position.readings or (position,)
            band = {
                "compute/params_by_law": position.params,
                "compute/optimal_params_low": min(each.low for each in readings),
                "compute/optimal_params_high": max(each.high for each in readings),
            }
            if all(map(math.isfinite, band.values())):  # TensorBoard draws a band only if its values have equal steps
                values |= band
            values |= {
                "compute/optimal_params": position.optimal_params,
                "compute/size_ratio": position.size_ratio,
                "compute/size_ratio_low": min(each.size_ratio for each in readings),
                "compute/size_ratio_high": max(each.size_ratio for each in readings),
                "compute/predicted_loss": position.predicted_loss,
                "compute/optimal_loss": position.optimal_loss,
                "compute/excess_loss": position.excess_loss,
            }
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def metrics_to_come(self) -> tuple[str, ...]:
        """Return the names of metrics for comparing runs that are logged later, since a position takes some steps."""
        return () if self._law is None else ("compute/size_ratio", "compute/excess_loss")

    def _critical_batch(self, trainer: pl.Trainer) -> float:
        """Return the critical batch in tokens: by `CriticalPhase`, else, for text, by Kaplan's law."""
        per_sample = self.ledger.tokens / self.ledger.samples
        for phase in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(phase, CriticalPhase):
                for noise in (phase.sampling_noise.critical_batch, phase.noise_scale.scale):
                    if noise > 0:
                        return noise * per_sample
        known = self.position is not None and math.isfinite(self.position.predicted_loss)
        if known and self.position is not None and self._law is not None and self._law.domain.task == "text":
            return Kaplan().critical_batch(self.position.predicted_loss)
        return math.nan

    def _check_coverage(self) -> None:
        assert self._counting.meter is not None
        share = self._counting.meter.uncounted
        if math.isnan(share) or share > _UNCOUNTED:
            names = ", ".join(name for name, seen in self.operators.items() if seen.kind == UNKNOWN)
            part = "a part of the time that cannot be measured" if math.isnan(share) else f"{share:.0%} of the time"
            rank_zero_warn(
                f"ComputeAccounting: operators whose FLOPs are not known ({names}) take {part}: the count is too low."
            )


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _rate(trainer: pl.Trainer) -> float:
    """Return the initial learning rate of the first optimizer."""
    groups = [group for optimizer in trainer.optimizers[:1] for group in optimizer.param_groups]
    return float(groups[0].get("initial_lr", groups[0].get("lr", math.nan))) if groups else math.nan


def _federated(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.strategy, FederatedStrategy)
