"""Laws in which model size and data add up: ``L = E + A / N^alpha + B / D^beta``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_fedscale.scaling.base import Law, Range, positive


@dataclass(frozen=True)
class Chinchilla(Law):
    """``L(N, D) = E + A / N^alpha + B / D^beta`` with N parameters and D tokens (Hoffmann et al., arXiv 2203.15556).

    At ``C = 6 N D`` the best size is ``N* = G (C / 6)^(beta / (alpha + beta))`` with
    ``G = (alpha A / (beta B))^(1 / (alpha + beta))``. The default constants are the replication by Besiroglu et al.
    (arXiv 2404.10102), since those printed in the paper do not fit its own data.

    Example:
        >>> law = Chinchilla()
        >>> best = law.optimal(1e20)
        >>> f"{best.params:.4g} parameters, {best.tokens / best.params:.1f} tokens each, loss {best.loss:.4f}"
        '8.535e+08 parameters, 22.9 tokens each, loss 2.5534'
    """

    source: ClassVar[str] = "form arXiv 2203.15556, constants arXiv 2404.10102"
    holds: ClassVar[Range] = Range("text", params=(4e7, 2e10), flops=(1e18, 1e24))

    E: float = 1.8172
    A: float = 482.01
    B: float = 2085.43
    alpha: float = 0.3478
    beta: float = 0.3658

    @classmethod
    def hoffmann(cls) -> Chinchilla:
        """With the constants printed in arXiv 2203.15556."""
        return cls(1.69, 406.4, 410.7, 0.34, 0.28)

    @classmethod
    def hoffmann_tex(cls) -> Chinchilla:
        """With the digits that the TeX source of arXiv 2203.15556 has beyond the printed ones."""
        return cls(1.6934, 406.4, 410.7, 0.3392, 0.2849)

    @property
    def exponent(self) -> float:
        """``a`` of ``N* ~ C^a``."""
        return self.beta / (self.alpha + self.beta)

    def _loss(self, params: float, tokens: float) -> float:
        return float(self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta)

    def _best_params(self, flops: float) -> float:
        return float(self._scale() * (flops / self.flops_per) ** self.exponent)

    def _scale(self) -> float:
        ratio = self.alpha * self.A / (self.beta * self.B)
        return float(ratio ** (1.0 / (self.alpha + self.beta)))

    def flops_for(self, loss: float) -> float:
        """The compute at which the best model has this loss.

        Raises:
            ValueError: for a loss at or below the irreducible one.
        """
        if loss <= self.E:
            raise ValueError(f"loss={loss!r}: no compute brings it to the irreducible loss, {self.E:.4g}, or below.")
        best = self.optimal(1e20)
        decline = self.alpha * self.beta / (self.alpha + self.beta)
        return float(1e20 * ((loss - self.E) / (best.loss - self.E)) ** (-1.0 / decline))


@dataclass(frozen=True)
class RepeatedData(Chinchilla):
    """`Chinchilla` with tokens that repeat: Muennighoff et al. (arXiv 2305.16264).

    Of ``D`` tokens on ``U`` unique ones, ``D' = U + U R (1 - exp(-(D / U - 1) / R))`` count; in federated training
    every further local epoch repeats. Parameters beyond what ``U`` unique tokens call for, ``U_N = 0.051 U``, count
    less in the same way.

    Example:
        >>> law = RepeatedData(unique_tokens=1e9)
        >>> law.loss(1e8, 1e9) == law.replace(unique_tokens=1e12).loss(1e8, 1e9)  # nothing is repeated
        False
        >>> round(law.effective_tokens(4e9) / 1e9, 2)  # four epochs are nearly as good as new data
        3.73
    """

    source: ClassVar[str] = "arXiv 2305.16264"

    E: float = 1.87
    A: float = 521.0
    B: float = 1488.0
    alpha: float = 0.3526596
    beta: float = 0.3526596
    unique_tokens: float = math.inf
    half_life: float = 15.39
    half_life_params: float = 5.31

    def effective_tokens(self, tokens: float) -> float:
        """What so many tokens are worth."""
        return _saturated(tokens, self.unique_tokens, self.half_life)

    def effective_params(self, params: float) -> float:
        """What so many parameters are worth."""
        return _saturated(params, 0.051 * self.unique_tokens, self.half_life_params)

    def _loss(self, params: float, tokens: float) -> float:
        return super()._loss(self.effective_params(params), self.effective_tokens(tokens))

    def _best_params(self, flops: float) -> float:
        return Law._best_params(self, flops)


def _saturated(amount: float, unique: float, half_life: float) -> float:
    if amount <= unique:
        return amount
    return unique + unique * half_life * -math.expm1(-(amount / unique - 1.0) / half_life)


@dataclass(frozen=True)
class Rosenfeld(Chinchilla):
    """The same form for other tasks (Rosenfeld et al., arXiv 1909.12673), to be fitted to the task's own runs.

    Published exponents for image classification error, (data, model): ImageNet 0.75 and 0.61, CIFAR-10 0.66 and 0.53,
    CIFAR-100 0.70 and 0.51; the other constants depend on the model family.
    """

    source: ClassVar[str] = "form arXiv 1909.12673"
    holds: ClassVar[Range] = Range("any")

    E: float = None  # type: ignore[assignment]
    A: float = None  # type: ignore[assignment]
    B: float = None  # type: ignore[assignment]
    alpha: float = None  # type: ignore[assignment]
    beta: float = None  # type: ignore[assignment]


def inference_wedge(tokens: float, inference_tokens: float) -> float:
    """How much smaller than compute-optimal a model should be if it will also serve: ``1 + D_inf / (3 D)``.

    The ratio of the elasticities of loss to size and to data at the optimum of training and inference together,
    ``6 N D + 2 N D_inf`` (Sardana et al., arXiv 2401.00448).

    Example:
        >>> inference_wedge(1e12, 3e12)
        2.0
    """
    positive("tokens", tokens)
    return 1.0 + inference_tokens / (3.0 * tokens)
