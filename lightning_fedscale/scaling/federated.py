"""Optimal size by number of clients: any law at ``C clients**-rho``, and a PAC-Bayes bound of a client's compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_fedscale.scaling.base import Allocation, Law, effective_flops
from lightning_fedscale.scaling.form import EXPONENT, LINEAR, Unknown


@dataclass(frozen=True)
class Federated:
    """A law applied to several clients: ``C_eff = C clients**-rho``.

    Example:
        >>> from lightning_fedscale.scaling import Chinchilla
        >>> law = federated(Chinchilla(), rho=0.24)
        >>> f"{law.optimal_federated(1e20, 10).params:.3e}"
        '6.429e+08'
        >>> from lightning_fedscale.scaling import DiLoCo
        >>> print(f"{2 * 0.0116 / -DiLoCo.published().alpha:.2f}")  # where that rho is from
        0.24
    """

    law: Law
    rho: float = 1.0
    clients: int = 1

    def loss(self, params: float, tokens: float, clients: int | None = None) -> float:
        """Predict the loss if each client trains on ``tokens`` tokens, see `Law.loss_federated`."""
        return self.law.loss_federated(params, tokens, self.clients if clients is None else clients, self.rho)

    def optimal(self, flops: float) -> Allocation:
        """Return the best model for this compute of all clients together."""
        return self.optimal_federated(flops)

    def optimal_federated(
        self, flops: float | Sequence[float], clients: int | None = None, mean: str = "mean"
    ) -> Allocation:
        """Return the best model for this compute of ``clients`` clients together, see `Law.optimal_federated`."""
        if clients is None and not isinstance(flops, Sequence):
            clients = self.clients
        return self.law.optimal_federated(flops, clients, self.rho, mean)


def federated(law: Any, rho: float = 1.0, clients: int = 1) -> Federated:
    """Apply a law to several clients.

    Args:
        law: any law, its name, or a file of `Fit.save`.
        rho: 1 as in arXiv 2511.12188, 0 for data parallelism, or a fitted value. 0.24 follows from DiLoCo's law at its
            own ratio ``D = 20 N``: there the loss falls as ``C**-0.049``, so that ``M**0.0116`` for M replicas equals
            ``C M**-0.24``. It does not hold for all federated training, nor for DiLoCo at a fixed size, where the same
            tables give 0.08 to 0.17, growing with the replicas: use `DiLoCo` itself to choose a size for replicas.
        clients: number of clients, if none is passed later.

    Raises:
        Unfitted: for a law without constants.
        TypeError: for anything that is not a law.
        ValueError: for an unknown name or invalid numbers.
    """
    from lightning_fedscale.scaling.project import needed_law  # circular: it imports all laws, also the one below

    effective_flops(1.0, clients, rho)
    return Federated(needed_law(law), rho, clients)


@dataclass(frozen=True)
class FederatedPACBayes(Law):
    """Best size for a client's compute, from a PAC-Bayes bound on the generalisation gap.

    ``F(N) = E + a N^-alpha + gap`` with the square-root bound ``gap = N sqrt(kappa tau psi / (4 C))`` or the fast rate
    ``gap = psi kappa tau N^2 / (2 C)``, where ``C`` is a client's compute, ``kappa`` (here ``flops_per``) the FLOPs per
    parameter and sample, ``tau`` the passes over its data, and ``psi`` the information per parameter. It was **derived
    for this library** from the abstract of arXiv 2511.12188, whose own theorem and exponent were not available. The
    best sizes are ``N* = (2 alpha a)^(1/(1+alpha)) (C / (kappa tau psi))^(1/(2(1+alpha)))`` and
    ``N* = (alpha a C / (psi kappa tau))^(1/(2+alpha))``, so they depend on the average compute per client only.

    Args:
        alpha: exponent of the approximation term.
        a: scale of the approximation term.
        E: irreducible loss.
        tau: passes over a client's data.
        psi: information per parameter.
        fast: use the fast rate instead of the square root.

    Example:
        >>> law = FederatedPACBayes(psi=8.0)
        >>> [f"{law.optimal_federated(1e18, clients).params:.4e}" for clients in (1, 10, 100)]
        ['8.1485e+07', '3.4510e+07', '1.4615e+07']
    """

    units: ClassVar[str] = "parameters, tokens, bound on the loss"
    unknowns: ClassVar[Mapping[str, Unknown]] = {
        "alpha": EXPONENT, "a": LINEAR, "E": LINEAR, "psi": Unknown(1e-6, 1e2),
    }  # fmt: skip
    source: ClassVar[str] = "derived after the abstract of arXiv 2511.12188"

    alpha: float = 0.34
    a: float = 406.4
    E: float = 1.69
    tau: float = 1.0
    psi: float = 8.0
    fast: bool = False

    @property
    def exponent(self) -> float:
        """The exponent ``p`` of ``N* ~ C^p``, and thus of ``N* ~ clients^-p`` at fixed total compute."""
        return 1.0 / (2.0 + self.alpha) if self.fast else 1.0 / (2.0 * (1.0 + self.alpha))

    def bound(self, params: float, flops: float) -> float:
        """Return ``F(N)`` for a client's compute."""
        return self._loss(params, flops / (self.flops_per * params))

    def formula(self, c: Any, run: Any) -> Any:
        """Compute ``F(N)``, where ``kappa N / C`` is the inverse of a client's tokens."""
        share = self.tau * run.params / run.tokens * c.psi
        gap = share / 2.0 if self.fast else (share / 4.0) ** 0.5
        return c.E + c.a * run.params**-c.alpha + gap

    def _best_params(self, flops: float) -> float:
        share = flops / (self.flops_per * self.tau * self.psi)
        if self.fast:
            return float((self.alpha * self.a * share) ** self.exponent)
        return float((2.0 * self.alpha * self.a) ** (1.0 / (1.0 + self.alpha)) * share**self.exponent)


def information(psi: float, clients: int, noise_share: float) -> float:
    """Return ``psi`` for a number of clients: averaging removes noise, and less noise means more information.

    ``psi_K = psi_1 + ln K - s (1 - 1 / K)``, where ``s`` is the ratio of the posterior's variance to the prior's.

    Example:
        >>> information(8.0, 1, 0.01), round(information(8.0, 10, 0.01), 3)
        (8.0, 10.294)
    """
    return psi + math.log(clients) - noise_share * (1.0 - 1.0 / clients)
