"""Laws with separate terms for model size and data: ``L = E + A / N^alpha + B / D^beta``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_fedscale.scaling.base import Allocation, ConstantsCovariance, Law
from lightning_fedscale.scaling.dual import exp, value_of, where
from lightning_fedscale.scaling.form import EXPONENT, LINEAR, Range, Unknown, positive

PARAMS_PER_TOKEN = 0.051
"""Parameters that each unique token supports, in `RepeatedData`."""
TERMS: Mapping[str, Unknown] = {"E": LINEAR, "A": LINEAR, "B": LINEAR, "alpha": EXPONENT, "beta": EXPONENT}

SPREAD = ConstantsCovariance(
    {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    (
        (0.000206, 0.002044, 0.004007, 0.00035, 0.000524),
        (0.002044, 0.060265, -0.021246, 0.010457, -0.002927),
        (0.004007, -0.021246, 0.180848, -0.003931, 0.023666),
        (0.00035, 0.010457, -0.003931, 0.001818, -0.000542),
        (0.000524, -0.002927, 0.023666, -0.000542, 0.00311),
    ),
)
"""Covariance of the default constants' logarithms: `fit` with 1,000 resamples of arXiv 2404.10102's 240 points."""


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
    counts: ClassVar[str] = "all"  # arXiv 2406.12907, on why Kaplan's sizes and these differ
    unknowns: ClassVar[Mapping[str, Unknown]] = TERMS
    spread: ClassVar[ConstantsCovariance | None] = SPREAD

    E: float = 1.8172
    A: float = 482.01
    B: float = 2085.43
    alpha: float = 0.3478
    beta: float = 0.3658

    @classmethod
    def hoffmann(cls) -> Chinchilla:
        """Return the law with the constants printed in arXiv 2203.15556."""
        return cls(1.69, 406.4, 410.7, 0.34, 0.28)

    @classmethod
    def hoffmann_tex(cls) -> Chinchilla:
        """Return the law with the constants of arXiv 2203.15556's TeX source, which have more digits than printed."""
        return cls(1.6934, 406.4, 410.7, 0.3392, 0.2849)

    @property
    def exponent(self) -> float:
        """The exponent ``a`` of ``N* ~ C^a``."""
        return self.beta / (self.alpha + self.beta)

    def formula(self, c: Any, run: Any) -> Any:
        """Sum the three terms."""
        return c.E + c.A * run.params**-c.alpha + c.B * run.tokens**-c.beta

    def _best_params(self, flops: float) -> float:
        return float(self._scale() * (flops / self.flops_per) ** self.exponent)

    def _scale(self) -> float:
        ratio = self.alpha * self.A / (self.beta * self.B)
        return float(ratio ** (1.0 / (self.alpha + self.beta)))

    def flops_for(self, loss: float) -> float:
        """Return the compute at which the best model has this loss.

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

    ``D`` tokens, of which ``U`` are unique, are worth ``D' = U + U R (1 - exp(-(D / U - 1) / R))``; in federated
    training every local epoch after the first repeats tokens. Parameters beyond ``U_N = 0.051 U`` are worth less in the
    same way.

    Example:
        >>> law = RepeatedData(unique_tokens=1e9)
        >>> law.loss(1e8, 1e9) == law.replace(unique_tokens=1e12).loss(1e8, 1e9)  # nothing is repeated
        False
        >>> round(law.effective_tokens(4e9) / 1e9, 2)  # four epochs are nearly as good as new data
        3.73
    """

    source: ClassVar[str] = "arXiv 2305.16264"
    columns: ClassVar[tuple[str, ...]] = ("params", "tokens", "unique_tokens")
    unknowns: ClassVar[Mapping[str, Unknown]] = {
        **TERMS, "half_life": Unknown(1.0, 100.0), "half_life_params": Unknown(1.0, 100.0),
    }  # fmt: skip
    spread: ClassVar[ConstantsCovariance | None] = None

    E: float = 1.87
    A: float = 521.0
    B: float = 1488.0
    alpha: float = 0.3526596
    beta: float = 0.3526596
    unique_tokens: float = math.inf
    half_life: float = 15.39
    half_life_params: float = 5.31

    def effective_tokens(self, tokens: float) -> float:
        """Return the number of unique tokens that ``tokens`` are worth."""
        return float(_saturated(tokens, self.unique_tokens, self.half_life))

    def effective_params(self, params: float) -> float:
        """Return the number of parameters that ``params`` are worth with this many unique tokens."""
        return float(_saturated(params, PARAMS_PER_TOKEN * self.unique_tokens, self.half_life_params))

    def formula(self, c: Any, run: Any) -> Any:
        """Compute Chinchilla's formula of the effective size and data; a fit takes ``unique_tokens`` from the runs."""
        unique = getattr(run, "unique_tokens", self.unique_tokens)
        return (
            c.E
            + c.A * _saturated(run.params, PARAMS_PER_TOKEN * unique, c.half_life_params) ** -c.alpha
            + c.B * _saturated(run.tokens, unique, c.half_life) ** -c.beta
        )

    def _best_params(self, flops: float) -> float:
        return Law._best_params(self, flops)


def _saturated(amount: Any, unique: Any, half_life: Any) -> Any:
    # Without repetition this is the amount itself.
    unique = where(value_of(amount) > unique, unique, amount)
    return unique + unique * half_life * (1.0 - exp(-(amount / unique - 1.0) / half_life))


@dataclass(frozen=True)
class Rosenfeld(Chinchilla):
    """The same form for other tasks (Rosenfeld et al., arXiv 1909.12673), to be fitted to the task's own runs.

    Published exponents for image classification error, (data, model): ImageNet 0.75 and 0.61, CIFAR-10 0.66 and 0.53,
    CIFAR-100 0.70 and 0.51; the other constants depend on the model family.
    """

    source: ClassVar[str] = "form arXiv 1909.12673"
    units: ClassVar[str] = "parameters, samples, loss"
    holds: ClassVar[Range] = Range("any")
    counts: ClassVar[str] = "active"
    spread: ClassVar[ConstantsCovariance | None] = None

    E: float = None  # type: ignore[assignment]
    A: float = None  # type: ignore[assignment]
    B: float = None  # type: ignore[assignment]
    alpha: float = None  # type: ignore[assignment]
    beta: float = None  # type: ignore[assignment]


def inference_wedge(tokens: float, inference_tokens: float) -> float:
    """Return how many times smaller than compute-optimal a model should be if it will serve: ``1 + D_inf / (3 D)``.

    This is the ratio of the loss's elasticities by size and by data at the optimum of training and inference
    together, ``6 N D + 2 N D_inf`` (Sardana et al., arXiv 2401.00448).

    Example:
        >>> inference_wedge(1e12, 3e12)
        2.0
    """
    positive("tokens", tokens)
    return 1.0 + inference_tokens / (3.0 * tokens)


@dataclass(frozen=True)
class AverageParameters(Chinchilla):
    """`Chinchilla` for a model whose size changes in training: its average size over tokens counts (arXiv 2501.12486).

    It applies to models that are pruned, partly frozen or partly sent. ``params`` is the size at the start.

    Args:
        shares: fraction of the tokens in each phase of training; they sum to 1.
        sizes: size of the model in each phase, as a fraction of its size at the start.

    Example:
        >>> pruned = AverageParameters(shares=(0.25, 0.75), sizes=(1.0, 0.5))
        >>> pruned.average(4e8)
        250000000.0
        >>> pruned.loss(4e8, 1e10) == Chinchilla().loss(2.5e8, 1e10)
        True
    """

    source: ClassVar[str] = "form arXiv 2501.12486, constants arXiv 2404.10102"

    shares: tuple[float, ...] = (1.0,)
    sizes: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shares) != len(self.sizes) or not math.isclose(math.fsum(self.shares), 1.0):
            raise ValueError(f"shares={self.shares}, sizes={self.sizes}: pass a size for each share; shares sum to 1.")

    def average(self, params: float) -> float:
        """Return the average size of a model that starts with ``params`` parameters."""
        return positive("params", params) * math.fsum(a * b for a, b in zip(self.shares, self.sizes, strict=True))

    def _loss(self, params: float, tokens: float) -> float:
        return super()._loss(self.average(params), tokens)

    def _best_params(self, flops: float) -> float:
        # A token costs compute in proportion to the average size, so the optimum is found for that.
        return super()._best_params(flops) / self.average(1.0)

    def optimal(self, flops: float) -> Allocation:
        """Return the best size at the start; a token's cost is proportional to the average size."""
        best = super().optimal(flops)
        tokens = best.tokens / self.average(1.0)
        return best._replace(tokens=tokens, loss=self._loss(best.params, tokens))


@dataclass(frozen=True)
class CompressedParameters(Chinchilla):
    """`Chinchilla` for parameters of few bits, worth ``1 - exp(-bits / scale)`` each (Kumar et al., arXiv 2411.04330).

    Args:
        bits: bits of each parameter.
        scale: number of bits at which a parameter is worth 63 %; to be fitted.

    Example:
        >>> law = CompressedParameters(bits=4.0, scale=2.0)
        >>> round(law.worth, 3)
        0.865
        >>> law.loss(1e9, 1e10) == Chinchilla().loss(law.worth * 1e9, 1e10)
        True
    """

    source: ClassVar[str] = "form arXiv 2411.04330, constants arXiv 2404.10102"
    columns: ClassVar[tuple[str, ...]] = ("params", "tokens", "bits")
    unknowns: ClassVar[Mapping[str, Unknown]] = {**TERMS, "scale": Unknown(0.5, 10.0)}

    bits: float | None = None
    scale: float | None = None

    @property
    def worth(self) -> float:
        """What each parameter is worth, as a fraction of one with full precision."""
        self.check()
        assert self.bits is not None
        assert self.scale is not None
        return -math.expm1(-positive("bits", self.bits) / positive("scale", self.scale))

    def formula(self, c: Any, run: Any) -> Any:
        """Compute Chinchilla's formula of the effective parameters; a fit takes ``bits`` from the runs."""
        bits: Any = getattr(run, "bits", self.bits)
        worth = 1.0 - exp(-bits / c.scale)
        return c.E + c.A * (worth * run.params) ** -c.alpha + c.B * run.tokens**-c.beta

    def _best_params(self, flops: float) -> float:
        # A (worth N)^-alpha is Chinchilla's term with another A.
        return self.replace(A=self.A * self.worth**-self.alpha)._closed(flops)

    def _closed(self, flops: float) -> float:
        return Chinchilla._best_params(self, flops)
