"""The privacy that a run has spent, and whether another round is affordable."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from lightning_fedscale.privacy.base import Privacy
from lightning_fedscale.types import ClientUpdate, IntArray


class PrivacyBudget:
    """Track the privacy budget of a run.

    Args:
        privacy: a calibrated `Privacy`.
        q: probability with which each client takes part in a round.
    """

    def __init__(self, privacy: Privacy, q: float) -> None:
        self.privacy = privacy
        self._q = q
        # Epsilon of each round is requested twice: before the round, and after it.
        self._epsilon = cache(lambda rounds: privacy.epsilon(rounds, q))

    def expected_weight(self, sizes: IntArray) -> float:
        """Return the expected total weight of a round's clients, given each client's number of samples."""
        num_samples, counts = np.unique(sizes, return_counts=True)
        nothing = ClientUpdate(0, torch.empty(0), 0.0, 0, 0, 0, 0.0, 0.0)
        weights = [self.privacy.weigh(nothing._replace(num_samples=int(size))) for size in num_samples.tolist()]
        return self._q * float(np.dot(weights, counts))

    def spent(self, rounds: int) -> float:
        """Return epsilon after this many rounds."""
        return float(self._epsilon(rounds))

    def affords(self, rounds: int) -> bool:
        """Return whether one more round after this many stays within the budget."""
        budget = self.privacy.max_epsilon
        return budget is None or self.spent(rounds + 1) <= budget

    def reason_to_stop(self, rounds: int) -> str:
        """Return the reason why there is no other round after this many."""
        return (
            f"epsilon is {self.spent(rounds) if rounds else 0.0:.4g} after {rounds} round(s), and one more round would"
            f" raise it to {self.spent(rounds + 1):.4g}, above max_epsilon={self.privacy.max_epsilon:g}"
        )

    def check(self, rounds: int) -> None:
        """Check the budget before training resumes after this many rounds.

        Raises:
            ValueError: if one more round is not affordable.
        """
        if not self.affords(rounds):
            raise ValueError(
                f"privacy: {self.reason_to_stop(rounds)}. Raise max_epsilon or noise_multiplier, or sample fewer"
                " clients per round."
            )
