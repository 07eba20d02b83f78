"""Differential privacy of clients: what is clipped, how much noise is added, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.privacy import accounting
from lightning_fedscale.types import ClientUpdate, Cohort

_PART = 1 << 18  # elements at a time, so that noise takes no vector of its own


class AdaptiveClipping(NamedTuple):
    r"""A clip norm that follows a quantile of the clients' norms (Andrew et al., arXiv 1905.03871).

    :math:`S \leftarrow S \exp(-\eta (\tilde b - \gamma))`, where :math:`\tilde b` is the noisy share of clients within
    :math:`S`.

    Attributes:
        quantile: the share of clients that should be within the clip norm.
        rate: how fast it moves; 0.2 takes it to e times its value in no fewer than ten rounds for the median.
        count_noise: standard deviation of the noise on the number of clients within it; None is a twentieth of the
            expected number of clients in a round.

    Example:
        >>> AdaptiveClipping(quantile=0.8).rate
        0.2
    """

    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float | None = None


@dataclass(frozen=True)
class Privacy:
    """DP-FedAvg as pure functions; made by `dp_fed_avg`, where everything is explained.

    A round calls, in this order: ``weigh`` and ``clip`` for every client, ``finish`` once on the sum over all ranks.
    Before training, ``calibrated`` makes it ready for the cohort's sampling probability.

    Attributes:
        clip_norm: the clip norm S to begin with.
        delta: probability with which the guarantee may fail.
        noise_multiplier: standard deviation of the noise on the sum, over S; None until ``calibrated`` finds it.
        target_epsilon: the guarantee after ``rounds`` rounds that ``calibrated`` aims at.
        rounds: see there.
        adaptive: how S follows the clients; None keeps it.
        weight_cap: samples from which on a client has weight 1; None gives all clients weight 1.
        noise: whether the server adds the noise or the clients add shares of it.
        accountant: how epsilon is computed.
        max_epsilon: the budget; None for none.
    """

    clip_norm: float
    delta: float
    noise_multiplier: float | None
    target_epsilon: float | None
    rounds: int | None
    adaptive: AdaptiveClipping | None
    weight_cap: float | None
    noise: Literal["server", "client"]
    accountant: accounting.Accountant
    max_epsilon: float | None

    def calibrated(self, q: float, clients: float) -> Privacy:
        """The same with a noise multiplier, checked for cohorts like these; call it before the first round.

        Args:
            q: probability with which each client takes part in a round.
            clients: how many take part, in expectation.

        Raises:
            ImportError: without the package ``dp-accounting``.
            ValueError: if adaptive clipping leaves too little noise for the number of clients; names the remedy.
        """
        multiplier = self.noise_multiplier
        if multiplier is None:
            assert self.target_epsilon is not None
            assert self.rounds is not None
            multiplier = accounting.noise_multiplier(self.accountant, self.target_epsilon, self.rounds, q, self.delta)
        ready = replace(self, noise_multiplier=multiplier)
        ready._delta_multiplier(clients)
        return ready

    def weigh(self, update: ClientUpdate) -> float:
        """What a client counts, at most 1."""
        return 1.0 if self.weight_cap is None else min(update.held / self.weight_cap, 1.0)

    def init(self) -> dict[str, Any]:
        """The state before the first round."""
        return {"clip_norm": float(self.clip_norm), "rounds": 0}

    def clip(self, delta: Tensor, state: dict[str, Any]) -> bool:
        """Shorten a client's trainable delta to at most S, in place; whether it was within S already."""
        norm, longest = float(torch.linalg.vector_norm(delta)), float(state["clip_norm"])
        if norm > longest:
            delta.mul_(longest / norm)
        return norm <= longest

    def finish(
        self,
        total: Tensor,
        within: float,
        state: dict[str, Any],
        cohort: Cohort,
        expected: float,
        generator: np.random.Generator,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The private mean of the clipped deltas, and the next state.

        Args:
            total: sum of weight times clipped delta over the cohort, float64; used in place.
            within: how many of the cohort were within S.
            state: this round's state.
            cohort: who takes part; may be empty, the noise is added all the same.
            expected: sum of all registered clients' weights times the probability to take part: the denominator, which
                must not depend on who takes part.
            generator: for the noise; the same on all ranks.
        """
        scale, clients = state["clip_norm"], len(cohort.clients)
        std = self._delta_multiplier(expected) * scale
        if self.noise == "server" or clients == 0:  # the server stands in where there is nobody
            _add_noise(total, std, generator)
        else:
            for _ in range(clients):
                _add_noise(total, std / math.sqrt(clients), generator)
        if self.adaptive is not None:
            # Centred, so that one client changes the count by a half and no more.
            count = within - clients / 2 + self._count_noise(expected) * generator.standard_normal()
            scale *= math.exp(-self.adaptive.rate * (count / expected + 0.5 - self.adaptive.quantile))
        return total.div_(expected), {"clip_norm": scale, "rounds": state["rounds"] + 1}

    def epsilon(self, rounds: int, q: float) -> float:
        """The guarantee after so many rounds in which each client took part with probability ``q``."""
        assert self.noise_multiplier is not None, "call calibrated first"
        return accounting.epsilon(self.accountant, self.noise_multiplier, rounds, q, self.delta)

    def affordable(self, rounds_done: int, q: float, max_epsilon: float | None = None) -> bool:
        """Whether one more round stays within the budget, by default its own ``max_epsilon``."""
        budget = self.max_epsilon if max_epsilon is None else max_epsilon
        return budget is None or self.epsilon(rounds_done + 1, q) <= budget

    def _count_noise(self, clients: float) -> float:
        assert self.adaptive is not None
        return clients / 20 if self.adaptive.count_noise is None else self.adaptive.count_noise

    def _delta_multiplier(self, clients: float) -> float:
        """What remains for the deltas of the noise multiplier of a round, a part of which the count takes."""
        assert self.noise_multiplier is not None, "call calibrated first"
        z = self.noise_multiplier
        if self.adaptive is None or z == 0:
            return z
        count = 2 * self._count_noise(clients)
        if count <= z:
            raise ValueError(
                f"adaptive: a noise of {count / 2:g} on the number of clients within the clip norm (a twentieth of the"
                f" clients in a round unless count_noise is given) cannot give a noise multiplier of {z:g}: take at"
                f" least {math.ceil(10 * z) + 1} clients per round, or AdaptiveClipping(count_noise=...) above"
                f" {z / 2:g}."
            )
        return float((z**-2 - count**-2) ** -0.5)


def _add_noise(total: Tensor, std: float, generator: np.random.Generator) -> None:
    for part in total.split(_PART):  # type: ignore[no-untyped-call]
        part.add_(torch.from_numpy(generator.normal(0.0, std, len(part))).to(part))
