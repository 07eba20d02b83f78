"""What adds up from round to round: privacy that was spent, simulated time, and what is known of clients' losses."""

from __future__ import annotations

import math

from lightning_fedscale.privacy import PrivacyBudget
from lightning_fedscale.samplers import Sampler, reads_losses
from lightning_fedscale.types import RoundRecord


class RunTotals:
    """Grows by one round at a time, the same on every rank.

    Args:
        sampler: may ask for losses; otherwise they are not kept.

    Attributes:
        budget: of privacy; None without, or before the data was seen.
        simulated: seconds on the clients' simulated hardware.
        losses: the last known one of each client.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._keeps_losses = reads_losses(sampler)
        self.budget: PrivacyBudget | None = None
        self.simulated = 0.0
        self.losses: dict[int, float] = {}

    def epsilon(self, rounds: int) -> float | None:
        """What so many rounds cost; None without privacy."""
        return None if self.budget is None else self.budget.spent(rounds)

    def exhausted(self, rounds: int) -> str | None:
        """Why there is no round after so many; None if there may be."""
        if self.budget is None or self.budget.affords(rounds):
            return None
        return f"privacy: {self.budget.told(rounds)}, so training ends here."

    def add(self, record: RoundRecord) -> None:
        """A round is complete."""
        if self._keeps_losses:
            known = zip(record.clients.tolist(), record.losses.tolist(), strict=True)
            self.losses.update({client: loss for client, loss in known if math.isfinite(loss)})
        self.simulated += 0.0 if record.simulated is None else record.simulated.seconds
