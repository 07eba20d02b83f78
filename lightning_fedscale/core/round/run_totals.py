"""What adds up over rounds: the privacy spent, the simulated time, and the clients' last known losses."""

from __future__ import annotations

import math

from lightning_fedscale.privacy import PrivacyBudget
from lightning_fedscale.samplers import Sampler, reads_losses
from lightning_fedscale.types import RoundRecord


class RunTotals:
    """Totals over rounds, the same on every rank.

    Args:
        sampler: losses are kept only if it reads them.

    Attributes:
        budget: the privacy budget; None without privacy, or before the data is known.
        simulated: seconds on the clients' simulated hardware.
        losses: the last known loss of each client.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._keeps_losses = reads_losses(sampler)
        self.budget: PrivacyBudget | None = None
        self.simulated = 0.0
        self.losses: dict[int, float] = {}

    def epsilon(self, rounds: int) -> float | None:
        """Return the epsilon that so many rounds spend; None without privacy."""
        return None if self.budget is None else self.budget.spent(rounds)

    def exhausted(self, rounds: int) -> str | None:
        """Return why no round may follow after so many; None if one may."""
        if self.budget is None or self.budget.affords(rounds):
            return None
        return f"privacy: {self.budget.reason_to_stop(rounds)}, so training ends here."

    def add(self, record: RoundRecord) -> None:
        """Add a complete round."""
        if self._keeps_losses:
            known = zip(record.clients.tolist(), record.losses.tolist(), strict=True)
            self.losses.update({client: loss for client, loss in known if math.isfinite(loss)})
        self.simulated += 0.0 if record.simulated is None else record.simulated.seconds
