"""Optimal size by number of clients: any law at the average client's compute, and bounds that say so by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_fedscale.scaling.base import Allocation, Law, effective_flops, positive


@dataclass(frozen=True)
class Federated:
    """A law seen by a number of clients: ``C_eff = C clients**-rho``.

    Example:
        >>> from lightning_fedscale.scaling import Chinchilla
        >>> law = federated(Chinchilla(), clients=10)
        >>> f"{law.optimal(1e20).params:.3e}"
        '2.622e+08'
    """

    law: Law
    clients: int
    rho: float = 1.0

    def loss(self, params: float, tokens: float) -> float:
        """Predicted loss if each client trains on so many tokens.

        With ``rho=1`` that of the law at one client's data, with ``rho=0`` at all clients' together.
        """
        return self.law.loss(params, positive("tokens", tokens) * self.clients ** (1.0 - self.rho))

    def optimal(self, flops: float) -> Allocation:
        """The best model for so much compute of all clients together."""
        return self.law.optimal_federated(flops, self.clients, self.rho)


def federated(law: Law, clients: int, rho: float = 1.0) -> Federated:
    """Let a law be seen by a number of clients.

    Args:
        law: any law.
        clients: number of clients.
        rho: 1 as arXiv 2511.12188, about 0.24 as DiLoCo's replicas, 0 as data parallelism, or fitted.
    """
    effective_flops(1.0, clients, rho)
    return Federated(law, clients, rho)


@dataclass(frozen=True)
class FederatedPACBayes(Law):
    """Size and compute of a client from a PAC-Bayes bound on the generalisation gap.

    ``F(N) = E + a N^-alpha + gap`` with the square-root bound ``gap = N sqrt(kappa tau psi / (4 C))`` or the fast rate
    ``gap = psi kappa tau N^2 / (2 C)``, where ``C`` is a client's compute, ``kappa`` FLOPs per parameter and sample,
    ``tau`` the passes over its data, and ``psi`` the information per parameter. **Derived for this library** after the
    abstract of arXiv 2511.12188, whose own theorem and exponent are not public here: best sizes
    ``N* = (2 alpha a)^(1/(1+alpha)) (C / (kappa tau psi))^(1/(2(1+alpha)))`` and
    ``N* = (alpha a C / (psi kappa tau))^(1/(2+alpha))``, so that only the average compute per client counts.

    Args:
        alpha: exponent of the approximation term.
        a: its scale.
        E: irreducible loss.
        kappa: FLOPs per parameter and sample; 6 for dense transformers and tokens.
        tau: passes over a client's data.
        psi: information per parameter.
        fast: the fast rate instead of the square root.

    Example:
        >>> law = FederatedPACBayes(psi=8.0)
        >>> [f"{law.optimal_federated(1e18, clients).params:.4e}" for clients in (1, 10, 100)]
        ['8.1485e+07', '3.4510e+07', '1.4615e+07']
    """

    source: ClassVar[str] = "derived after the abstract of arXiv 2511.12188"

    alpha: float = 0.34
    a: float = 406.4
    E: float = 1.69
    kappa: float = 6.0
    tau: float = 1.0
    psi: float = 8.0
    fast: bool = False

    @property
    def exponent(self) -> float:
        """``p`` of ``N* ~ C^p``, and so of ``N* ~ clients^-p`` at fixed total compute."""
        return 1.0 / (2.0 + self.alpha) if self.fast else 1.0 / (2.0 * (1.0 + self.alpha))

    def bound(self, params: float, flops: float) -> float:
        """``F(N)`` for a client's compute."""
        share = self.kappa * self.tau * self.psi / flops
        gap = params**2 * share / 2.0 if self.fast else params * math.sqrt(share / 4.0)
        return float(self.E + self.a * params**-self.alpha + gap)

    def _loss(self, params: float, tokens: float) -> float:
        return self.bound(params, self.kappa * params * tokens)

    def _best_params(self, flops: float) -> float:
        share = flops / (self.kappa * self.tau * self.psi)
        if self.fast:
            return float((self.alpha * self.a * share) ** self.exponent)
        return float((2.0 * self.alpha * self.a) ** (1.0 / (1.0 + self.alpha)) * share**self.exponent)


def information(psi: float, clients: int, noise_share: float) -> float:
    """``psi`` for a number of clients: averaging removes noise, and less noise is more information.

    ``psi_K = psi_1 + ln K - s (1 - 1 / K)`` with ``s`` the share of the posterior's variance in the prior's.

    Example:
        >>> information(8.0, 1, 0.01), round(information(8.0, 10, 0.01), 3)
        (8.0, 10.294)
    """
    return psi + math.log(clients) - noise_share * (1.0 - 1.0 / clients)
