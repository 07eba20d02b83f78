"""The limit of a run's compute."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedscale.callbacks.compute_accounting.coverage import OperatorCoverage
from lightning_fedscale.scaling.ledger import Ledger

_PATIENCE = 4
"""Steps after which, if none had operations to count, none is expected to."""


class ComputeLimit:
    """Ends training when so many FLOPs are spent.

    Args:
        max_flops: training FLOPs; None for no limit.

    Attributes:
        max_flops: the same.
    """

    def __init__(self, max_flops: float | None) -> None:
        self.max_flops = max_flops

    def remaining(self, ledger: Ledger) -> float:
        """Return the FLOPs that are left; infinite without a limit."""
        return math.inf if self.max_flops is None else max(0.0, self.max_flops - ledger.training_flops)

    def check(self, module: pl.LightningModule, ledger: Ledger, coverage: OperatorCoverage) -> None:
        """Refuse a limit that is never reached, since nothing in the steps can be counted; call it after a step.

        Raises:
            ValueError: with the reason, which the counted steps of this run show.
        """
        if self.max_flops is not None and ledger.steps >= _PATIENCE and not ledger.training_flops:
            reason = coverage.why_nothing(module)
            raise ValueError(
                f"max_flops={self.max_flops:g} is never reached, since {reason}: pass max_steps, max_epochs or"
                " max_time to the Trainer instead."
            )

    def stop_if_spent(self, trainer: pl.Trainer, ledger: Ledger) -> None:
        """Let the Trainer stop after this step if none are left."""
        if self.remaining(ledger) == 0.0 and not trainer.should_stop:
            trainer.should_stop = True
            rank_zero_info(
                f"ComputeAccounting: training stops, since {ledger.training_flops:.3g} of max_flops={self.max_flops:g}"
                " are spent."
            )
