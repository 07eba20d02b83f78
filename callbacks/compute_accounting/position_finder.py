"""The position of a run: which law applies, and where the run stands under it."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor

from lightning_fedscale.callbacks.compute_accounting.flop_meter import Meter
from lightning_fedscale.callbacks.compute_accounting.run_facts import agreement_of
from lightning_fedscale.callbacks.compute_accounting.task import has_targets_for_tokens, predicts_its_tokens, size_by
from lightning_fedscale.scaling import Law, Position, law_of, position_of
from lightning_fedscale.scaling.applies import why_another_loss, why_far, why_frozen
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.scaling.rho import Rho, rho_of
from lightning_fedscale.scaling.runs import LOSSES

_LATEST = 20
"""Number of the latest steps, or rounds, whose mean loss is compared with the law's."""


class Located(NamedTuple):
    """Where a run stands.

    Attributes:
        here: its position for the compute spent so far.
        position: that at the end of the budget, if there is one; else the same.
        reason: why there is none, in words; empty if there is one, or no law.
    """

    here: Position | None = None
    position: Position | None = None
    reason: str = ""


class PositionFinder:
    """Chooses a law for a run, and finds the run's position under it; the arguments are those of `ComputeAccounting`.

    Attributes:
        law: the law; None if there is none for this task.
        chosen_by_task: whether the law is chosen by the task.
        budget: FLOPs that the run will take in total.
        losses: those of the latest steps or rounds.
    """

    def __init__(
        self,
        law: str | Law | None,
        rho: float | tuple[float, float] | Rho | str | None,
        clients: int | None,
        budget: float | None,
    ) -> None:
        self.law, _ = law_of(law, text=False)
        rho_of(rho)
        self._rho = rho
        self._clients = clients
        self.chosen_by_task = isinstance(law, str) and law == "auto"
        self.budget = budget
        self.losses: deque[Tensor] = deque(maxlen=_LATEST)
        self._reads_tokens: bool | None = None  # None before the first batch

    def begin(self) -> None:
        """Forget an earlier run."""
        self._reads_tokens = None
        self.losses.clear()
        if self.chosen_by_task:
            self.law, _ = law_of("auto", text=False)

    def observe_batch(self, batch: Any) -> None:
        """Read off the first batch whether it has targets for its tokens."""
        if self._reads_tokens is None:
            self._reads_tokens = has_targets_for_tokens(batch)

    def clients(self, ledger: Ledger) -> int:
        """Return the number of clients of the position."""
        return self._clients or ledger.average_cohort

    def locate(self, trainer: pl.Trainer, ledger: Ledger, meter: Meter, *, full: bool = False) -> Located:
        """Return the position of the run.

        Args:
            trainer: the Trainer.
            ledger: what was spent.
            meter: knows the module and its size.
            full: whether to compute the position's uncertainty, which takes long.
        """
        module, size = meter.module, meter.parameters.size
        if self.chosen_by_task and self.law is None and self._reads_tokens:
            self.law, _ = law_of("auto", text=predicts_its_tokens(module, size))
        if (law := self.law) is None or not ledger.training_flops:
            return Located()
        params = size_by(law, ledger.average_params, module, size)

        def position(flops: float) -> Position:
            return position_of(
                law, params=params, tokens=ledger.tokens * flops / ledger.training_flops,
                flops=flops, clients=self.clients(ledger), rho=self._rho, full=full,
            )  # fmt: skip

        try:
            reason = why_frozen(law, trained=size.trainable, total=size.total)
            if reason is None and not law.problems:  # a law with problems explains itself
                reason = why_far(law, params=params, flops=self.budget or ledger.training_flops)
            if reason is None:
                here = position(ledger.training_flops)
                reason = self._why_another_loss(trainer, law, here)
            if reason is None:
                found = here if self.budget is None else position(self.budget)
                return Located(here, replace(found, agreement=agreement_of(law, trainer, ledger.samples)))
        except (ValueError, ArithmeticError) as error:
            reason = str(error).rstrip(".")
        return Located(reason=reason)

    def _why_another_loss(self, trainer: pl.Trainer, law: Law, here: Position) -> str | None:
        known = trainer.callback_metrics
        name = next((each for each in LOSSES if each in known), None)
        if name is not None:
            observed = float(known[name])
        elif self.losses:
            observed = sum(map(float, self.losses)) / len(self.losses)
        else:
            return None
        # For a span of rho, one reading that fits the loss is enough.
        reasons = [
            why_another_loss(law, predicted=each.predicted_loss, observed=observed, validated=name is not None)
            for each in (here, *here.readings)
        ]
        return None if None in reasons else reasons[0]
