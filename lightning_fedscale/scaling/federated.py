"""Optimal size by number of clients: any law at the average client's compute, and a bound that says so by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_fedscale.scaling.base import Allocation, Law, effective_flops
from lightning_fedscale.scaling.form import EXPONENT, LINEAR, Unknown


@dataclass(frozen=True)
class Federated:
    """A law seen by clients: ``C_eff = C clients**-rho``.

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
        """Predicted loss if each client trains on so many tokens, see `Law.loss_federated`."""
        return self.law.loss_federated(params, tokens, self.clients if clients is None else clients, self.rho)

    def optimal(self, flops: float) -> Allocation:
        """The best model for so much compute of all clients together."""
        return self.optimal_federated(flops)

    def optimal_federated(
        self, flops: float | Sequence[float], clients: int | None = None, mean: str = "mean"
    ) -> Allocation:
        """The best model for so much compute of so many clients, see `Law.optimal_federated`."""
        if clients is None and not isinstance(flops, Sequence):
            clients = self.clients
        return self.law.optimal_federated(flops, clients, self.rho, mean)


def federated(law: Any, rho: float = 1.0, clients: int = 1) -> Federated:
    """Let a law be seen by clients.

    Args:
        law: any law, its name, or a file of `Fit.save`.
        rho: 1 as arXiv 2511.12188, 0 as data parallelism, or fitted. 0.24 is DiLoCo's law read along its own frontier:
            there ``D = 20 N``, so that loss falls as ``C**-0.049``, and ``M**0.0116`` for M replicas is worth
            ``C M**-0.24``. It is no property of all federated training, nor of DiLoCo at a fixed size, where the same
            tables read 0.08 to 0.17, more with more replicas: choose a size for replicas by `DiLoCo` itself.
        clients: number of clients, where none is passed later.

    Raises:
        Unfitted: for a law without constants.
        TypeError: for something else than a law.
        ValueError: for an unknown name, or numbers that cannot be.
    """
    from lightning_fedscale.scaling.project import needed_law  # it knows all laws, one of which is below

    effective_flops(1.0, clients, rho)
    return Federated(needed_law(law), rho, clients)


@dataclass(frozen=True)
class FederatedPACBayes(Law):
    """Size and compute of a client from a PAC-Bayes bound on the generalisation gap.

    ``F(N) = E + a N^-alpha + gap`` with the square-root bound ``gap = N sqrt(kappa tau psi / (4 C))`` or the fast rate
    ``gap = psi kappa tau N^2 / (2 C)``, where ``C`` is a client's compute, ``kappa`` (here ``flops_per``) FLOPs per
    parameter and sample, ``tau`` the passes over its data, and ``psi`` the information per parameter. **Derived for
    this library** after the abstract of arXiv 2511.12188, whose own theorem and exponent are not public here: best
    sizes ``N* = (2 alpha a)^(1/(1+alpha)) (C / (kappa tau psi))^(1/(2(1+alpha)))`` and
    ``N* = (alpha a C / (psi kappa tau))^(1/(2+alpha))``, so that only the average compute per client counts.

    Args:
        alpha: exponent of the approximation term.
        a: its scale.
        E: irreducible loss.
        tau: passes over a client's data.
        psi: information per parameter.
        fast: the fast rate instead of the square root.

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
        """``p`` of ``N* ~ C^p``, and so of ``N* ~ clients^-p`` at fixed total compute."""
        return 1.0 / (2.0 + self.alpha) if self.fast else 1.0 / (2.0 * (1.0 + self.alpha))

    def bound(self, params: float, flops: float) -> float:
        """``F(N)`` for a client's compute."""
        return self._loss(params, flops / (self.flops_per * params))

    def formula(self, c: Any, run: Any) -> Any:
        """``F(N)``, with ``kappa N / C`` the inverse of a client's tokens."""
        share = self.tau * run.params / run.tokens * c.psi
        gap = share / 2.0 if self.fast else (share / 4.0) ** 0.5
        return c.E + c.a * run.params**-c.alpha + gap

    def _best_params(self, flops: float) -> float:
        share = flops / (self.flops_per * self.tau * self.psi)
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
