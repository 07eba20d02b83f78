"""`ComputeAccounting`: what a run costs, and how far its model is from the best size for that."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_fedscale import collectives
from lightning_fedscale.callbacks.compute_counting import Counting
from lightning_fedscale.callbacks.compute_report import ComputeCurves, report
from lightning_fedscale.callbacks.critical_phase import CriticalPhase
from lightning_fedscale.devices.operators import UNKNOWN, Operator
from lightning_fedscale.loggers import send
from lightning_fedscale.metering import Meter
from lightning_fedscale.refusals import check_package
from lightning_fedscale.scaling import (
    Kaplan,
    Law,
    Position,
    effective_flops,
    law_of,
    position_of,
    sweep_command,
)
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import RoundRecord

_GROWTH = 1.02
"""Compute must have grown so much for the next log: where points are closer, they only cost time."""

_SIZES = ("size", "width", "hidden_size", "hidden_dim", "d_model", "n_embd", "dim", "channels", "depth", "num_layers")
"""What modules usually call the argument that makes them larger."""

_LOOKS = 4
"""After so many steps in which nothing was found to count, nothing will be."""

_UNCOUNTED = 0.01
"""Share of time in operators of unknown cost from which on the count is doubted."""


class ComputeAccounting(Callback):
    """Counts what training costs, and says where the run stands against the best model size for that.

    FLOPs are counted while the module's own steps run: the first ones of every form of batch, then a sample of them,
    and the others cost what these say; where they differ, with an interval (`Ledger.flops_interval`). They are added
    up by client under `FederatedStrategy`, with any executor, by step under any other strategy. It logs, as
    ``compute/...``, as often as the Trainer does, but no sooner than two percent more is spent. Ranks add up to one
    ledger, which checkpoints keep, so that nothing is counted twice after an interruption. What Lightning's own tuner
    and ``executor="auto"`` try out is not counted.

    A scaling law makes a position of it: the best size for this compute and so many clients, the loss that the law
    predicts there and here, and one sentence of advice at the end. A law holds for the data it was fitted on.
    ``law="auto"`` takes Chinchilla's for batches of tokens and none otherwise; then counts are reported, and that a law
    of the task's own is to be fitted (`lightning_fedscale.scaling.fit`).

    Args:
        law: "auto", the name of a law, a file of `Fit.save`, a law, or None for counts only.
        rho: what division among clients costs, ``C_eff = C clients**-rho``: 1 counts the average client's compute
            (arXiv 2511.12188), 0 all of it, about 0.24 as DiLoCo. None takes that of the law file, else 1.
        budget: FLOPs that the run is meant to take in all; the position is then that at its end, from now on at the
            present ratio of tokens to FLOPs.
        tokens_fn: a function of a batch: how many tokens are in it, as a number. It is asked of batches whose step is
            counted. None counts the entries of the first tensor if these are integers in two dimensions, else samples.
        max_flops: stop training at the end of the step, or round, in which so many training FLOPs are spent. With
            several processes and no clients, every step then ends in a small collective.

    Attributes:
        position: a `Position`, once something was spent and if there is a law. It is also, with the ledger's sums, in
            ``position.json`` in the run's folder.

    Raises:
        TypeError, ValueError: for arguments that cannot be; from ``fit``, before the first step, for a ``tokens_fn``
            that does not tell a number above 0; after it, for ``max_flops`` where nothing in the step can be counted.

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
        rho: float | None = None,
        budget: float | None = None,
        tokens_fn: Callable[[Any], float] | None = None,
        max_flops: float | None = None,
    ) -> None:
        self._law, fitted_rho = law_of(law, text=False)
        self._auto = law == "auto"
        self._rho = (1.0 if fitted_rho is None else fitted_rho) if rho is None else rho
        effective_flops(1.0, 1, self._rho)
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
        self._warned = False
        self.position: Position | None = None

    @property
    def law(self) -> Law | None:
        """The law in use; None if there is none for this task."""
        return self._law

    @property
    def ledger(self) -> Ledger:
        """What was spent; with several processes and no clients, up to the last time that was logged."""
        return self._counting.ledger

    @property
    def remaining(self) -> float:
        """FLOPs that are left of ``max_flops``; infinite without."""
        return math.inf if self._max_flops is None else max(0.0, self._max_flops - self.ledger.training_flops)

    @property
    def operators(self) -> dict[str, Operator]:
        """Every operator of the steps that were counted: whether its FLOPs count, are free, or are not known."""
        return {} if self._counting.meter is None else self._counting.meter.operators

    # ---- hooks: begin and end

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a ledger, unless a run goes on."""
        if stage == "predict":
            return
        self._trainer = trainer
        if stage == "fit" and trainer.global_step == 0:
            self._counting, self._curves, self.position = Counting(Ledger()), ComputeCurves(), None
            self._logged = 0.0
            if self._auto:
                self._law, _ = law_of("auto", text=False)
        self._counting.meter = Meter(trainer, pl_module, self._tokens_fn)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have clients metered, if there are any."""
        check_package(self, trainer)
        meter = self._counting.meter
        assert meter is not None
        self._counting.begin_fit(trainer)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            meter.evaluations.counting = True
            trainer.callbacks.append(meter.evaluations)  # type: ignore[attr-defined]
        self._stop_if_spent(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the run stands."""
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
        report(trainer, self.ledger, meter.size, _clients(trainer), meter.operators, self.position, self._law)
        self._curves.close()
        if self._law is None and self._auto:
            rank_zero_info(f"ComputeAccounting: no law for this task yet: fit one. {self._sweep(trainer, pl_module)}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As `teardown`, which the Trainer leaves out then."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the Trainer's callbacks as they were."""
        self._counting.drop_step()
        meter, callbacks = self._counting.meter, trainer.callbacks  # type: ignore[attr-defined]
        if meter is not None and meter.evaluations in callbacks:
            callbacks.remove(meter.evaluations)

    def _sweep(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        data: Any = getattr(trainer, "datamodule", None)
        argument = next((name for name in _SIZES if name in inspect.signature(type(module)).parameters), None)
        line = sweep_command(_path(module), _path(data), self.ledger.training_flops, argument or "NAME")
        named = "" if argument else ", where NAME is the module's argument that makes it larger"
        return f"This trains the smallest sweep that can identify a law, and fits it{named}:\n    {line}"

    # ---- hooks: training

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Parameters may have come, gone, or been pruned."""
        assert self._counting.meter is not None
        self._counting.meter.refresh()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins."""
        self._counting.begin_step(trainer, batch, batch_idx)

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        """A round is complete."""
        self._counting.count_round(trainer, record)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, look where the run stands, log it."""
        self._counting.end_step()
        logs, alone = trainer._logger_connector.should_update_logs, collectives.world_size() == 1
        if logs:
            self._counting.measure_energy()
        if alone or (not _federated(trainer) and (logs or self._max_flops is not None)):
            self._counting.add_up()  # rounds have told the other ranks already
        if self._max_flops is not None and self.ledger.steps >= _LOOKS and not self.ledger.training_flops:
            raise ValueError(
                f"max_flops={self._max_flops:g}: {self._nothing()}, so that training would never end: pass max_steps,"
                " max_epochs or max_time to the Trainer instead."
            )
        self._stop_if_spent(trainer)
        if logs and self.ledger.training_flops > _GROWTH * self._logged:
            self._log(trainer, _loss_of(outputs))

    # ---- hooks: on the side

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluation is counted apart."""
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
        """It is over."""
        self._counting.end_evaluation()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks add up; where there are clients, in the next round's collective."""
        if not trainer.sanity_checking and not (_federated(trainer) and trainer.state.fn == TrainerFn.FITTING):
            self._counting.add_up()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluation is counted apart."""
        self._counting.begin_evaluation(batch, "test_step")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """It is over."""
        self._counting.end_evaluation()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks add up."""
        self._counting.add_up()

    def on_probe(self, trainer: pl.Trainer, batch: Any = None, flops: float = 0.0) -> None:
        """Another callback has run a training step on the side, with this batch or of so many FLOPs."""
        self._counting.count_probe(batch, flops)

    def on_client_evaluation(self, trainer: pl.Trainer, batch: Any) -> AbstractContextManager[Any]:
        """Another callback evaluates a client's model on this batch of its own, while what this returns is active."""
        return self._counting.evaluation(batch)

    # ---- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: all that was found out, and nothing that belongs to a Trainer."""
        return {**vars(self), "_trainer": None}

    def state_dict(self) -> dict[str, Any]:
        """The ledger, for the checkpoint; to be called on all ranks, as checkpoints are."""
        if self._trainer is not None:
            self._counting.settle(self._trainer)
            self._counting.measure_energy()
            self._counting.add_up()
        state = {"ledger": self.ledger.state_dict(), "unit": self._curves.unit, "logged": self._logged}
        meter = self._counting.meter
        return state if meter is None else {**state, "costs": meter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.ledger.load_state_dict(state_dict["ledger"])
        self._curves.unit, self._logged = state_dict["unit"], state_dict["logged"]
        if self._counting.meter is not None and "costs" in state_dict:
            self._counting.meter.load_state_dict(state_dict["costs"])

    # ---- where the run stands

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
        meter = self._counting.meter
        if self._auto and self._law is None and meter is not None and meter.counts_text:
            self._law, _ = law_of("auto", text=True)

    def _locate(self, trainer: pl.Trainer, full: bool = False) -> Position | None:
        """Set the position, at the end of the budget if there is one; returns that of now."""
        ledger = self.ledger
        if self._law is None or not ledger.training_flops:
            return None

        def position(flops: float) -> Position:
            assert self._law is not None
            return position_of(
                self._law, params=ledger.average_params, tokens=ledger.tokens * flops / ledger.training_flops,
                flops=flops, clients=_clients(trainer), rho=self._rho, full=full,
            )  # fmt: skip

        try:
            here = position(ledger.training_flops)
            self.position = here if self._budget is None else position(self._budget)
        except ValueError as error:
            self.position = None
            if not self._warned:
                rank_zero_warn(f"ComputeAccounting: no position under {self._law.name}: {error}")
            self._warned = True
            return None
        return here

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
            "compute/flops_per_client": ledger.training_flops / _clients(trainer),
            **{f"compute/flops_{purpose}": spent for purpose, spent in ledger.flops.items()},
            "compute/tokens": ledger.tokens,
            "compute/params": ledger.average_params,
            "compute/budget_used": math.nan if limit is None else ledger.training_flops / limit,
            "compute/critical_batch_ratio": self._counting.batch / self._critical_batch(trainer),
            "compute/joules": math.nan if ledger.joules is None else ledger.joules,
        }
        if (position := self.position) is not None:
            values |= {
                "compute/optimal_params": position.optimal_params,
                "compute/optimal_params_low": position.low,
                "compute/optimal_params_high": position.high,
                "compute/size_ratio": position.size_ratio,
                "compute/predicted_loss": position.predicted_loss,
                "compute/optimal_loss": position.optimal_loss,
                "compute/excess_loss": position.excess_loss,
            }
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _critical_batch(self, trainer: pl.Trainer) -> float:
        """In tokens: as `CriticalPhase` measures it, else as Kaplan's law of text has it at the predicted loss."""
        per_sample = self.ledger.tokens / self.ledger.samples
        for phase in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(phase, CriticalPhase):
                for noise in (phase.sampling_noise.critical_batch, phase.noise_scale.scale):
                    if noise > 0:
                        return noise * per_sample
        if self.position is not None and self._law is not None and self._law.domain.task == "text":
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


def _loss_of(outputs: Any) -> float | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _path(what: object) -> str | None:
    """Where an object's class is imported from; None where that cannot be."""
    of = type(what)
    is_elsewhere = what is not None and of.__module__ != "__main__" and "<" not in of.__qualname__
    return f"{of.__module__}.{of.__qualname__}" if is_elsewhere else None


def _federated(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.strategy, FederatedStrategy)


def _clients(trainer: pl.Trainer) -> int:
    strategy = trainer.strategy
    number = strategy.num_clients if isinstance(strategy, FederatedStrategy) else None
    return 1 if number is None else number
