"""Differential privacy of clients: clipping, noise, and the guarantee."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.privacy import accounting
from lightning_fedscale.types import ClientUpdate, Cohort

_PART = 1 << 18  # elements at a time, so that the noise needs no full vector


class AdaptiveClipping(NamedTuple):
    r"""A clip norm that follows a quantile of the clients' norms (Andrew et al., arXiv 1905.03871).

    :math:`S \leftarrow S \exp(-\eta (\tilde b - \gamma))`, where :math:`\tilde b` is the noisy share of clients within
    :math:`S`.

    Attributes:
        quantile: the share of clients that should be within the clip norm.
        rate: how fast the clip norm moves; at 0.2 and the median it grows by a factor of e in ten rounds or more.
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
    """DP-FedAvg as pure functions; `dp_fed_avg` creates and explains it.

    A round calls ``weigh`` and ``clip`` for every client, then ``finish`` once on the sum over all ranks. Before
    training, ``calibrated`` prepares it for the cohort's sampling probability.

    Attributes:
        clip_norm: the initial clip norm S.
        delta: probability with which the guarantee may fail.
        noise_multiplier: standard deviation of the noise on the sum, over S; None until ``calibrated`` finds it.
        target_epsilon: the target of ``calibrated``: epsilon after ``rounds`` rounds.
        rounds: number of rounds for ``target_epsilon``.
        adaptive: how S follows the clients' norms; None keeps it constant.
        weight_cap: number of samples from which on a client has weight 1; None gives all clients weight 1.
        noise: whether the server adds the noise or the clients add shares of it.
        accountant: the method that computes epsilon.
        max_epsilon: the privacy budget; None means no limit.
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
        """Return a copy with a noise multiplier, checked for such cohorts; call this before the first round.

        Args:
            q: probability with which each client takes part in a round.
            clients: expected number of clients in a round.

        Raises:
            ImportError: if the package ``dp-accounting`` is missing.
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
        """Return a client's weight, at most 1."""
        return 1.0 if self.weight_cap is None else min(update.num_samples / self.weight_cap, 1.0)

    def init(self) -> dict[str, Any]:
        """Return the state before the first round."""
        return {"clip_norm": float(self.clip_norm), "rounds": 0}

    def clip(self, delta: Tensor, state: dict[str, Any]) -> bool:
        """Clip a client's trainable delta to norm S, in place; return whether it already was within S."""
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
        """Return the private mean of the clipped deltas, and the next state.

        Args:
            total: sum of weight times clipped delta over the cohort, float64; used in place.
            within: number of clients of the cohort that were within S.
            state: this round's state.
            cohort: the round's clients; noise is added even if there are none.
            expected: the denominator: sum of all clients' weights times the probability to take part. It must not
                depend on the cohort.
            generator: generator of the noise; the same on all ranks.
        """
        scale, clients = state["clip_norm"], len(cohort.clients)
        std = self._delta_multiplier(expected) * scale
        if self.noise == "server" or clients == 0:  # without clients the server adds the noise
            _add_noise(total, std, generator)
        else:
            for _ in range(clients):
                _add_noise(total, std / math.sqrt(clients), generator)
        if self.adaptive is not None:
            # The count is centred, so that one client changes it by at most a half.
            count = within - clients / 2 + self._count_noise(expected) * generator.standard_normal()
            scale *= math.exp(-self.adaptive.rate * (count / expected + 0.5 - self.adaptive.quantile))
        return total.div_(expected), {"clip_norm": scale, "rounds": state["rounds"] + 1}

    def epsilon(self, rounds: int, q: float) -> float:
        """Return epsilon after this many rounds in which each client took part with probability ``q``."""
        assert self.noise_multiplier is not None, "call calibrated first"
        return accounting.epsilon(self.accountant, self.noise_multiplier, rounds, q, self.delta)

    def affordable(self, rounds_done: int, q: float, max_epsilon: float | None = None) -> bool:
        """Return whether one more round stays within the budget, by default ``self.max_epsilon``."""
        budget = self.max_epsilon if max_epsilon is None else max_epsilon
        return budget is None or self.epsilon(rounds_done + 1, q) <= budget

    def _count_noise(self, clients: float) -> float:
        assert self.adaptive is not None
        return clients / 20 if self.adaptive.count_noise is None else self.adaptive.count_noise

    def _delta_multiplier(self, clients: float) -> float:
        """Return the deltas' noise multiplier, which adaptive clipping's noisy count makes larger than the round's."""
        assert self.noise_multiplier is not None, "call calibrated first"
        z = self.noise_multiplier
        if self.adaptive is None or z == 0:
            return z
        count = 2 * self._count_noise(clients)
        if count <= z:
            raise ValueError(
                f"adaptive: with count_noise={count / 2:g} (by default a twentieth of the clients in a round), no"
                f" amount of noise on the updates can give noise_multiplier={z:g}: use at least"
                f" {math.ceil(10 * z) + 1} clients per round, or pass AdaptiveClipping(count_noise=...) above"
                f" {z / 2:g}."
            )
        return float((z**-2 - count**-2) ** -0.5)


def _add_noise(total: Tensor, std: float, generator: np.random.Generator) -> None:
    for part in total.split(_PART):  # type: ignore[no-untyped-call]
        part.add_(torch.from_numpy(generator.normal(0.0, std, len(part))).to(part))
