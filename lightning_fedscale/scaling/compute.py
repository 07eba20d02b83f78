"""Further laws: by compute alone, of best sizes, for fine-tuning, mixtures, model shape and mixtures of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.chinchilla import TERMS
from lightning_fedscale.scaling.dual import exp, log
from lightning_fedscale.scaling.form import EXPONENT, LINEAR, SIGNED, Range, Unknown, positive

PF_DAY = 8.64e19
"""FLOPs of a petaflop/s-day, Kaplan's unit of compute."""


@dataclass(frozen=True)
class Kaplan(Law):
    """``L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D`` with non-embedding parameters (arXiv 2001.08361).

    Its published best sizes, ``N* = 1.3e9 (C / PF-day)^0.73``, are for models stopped long before they converge. They
    are superseded, see `Porian`. With other constants, fitted or passed, best sizes follow from the formula. Its
    critical batch, `critical_batch`, is still useful.

    Example:
        >>> f"{Kaplan().optimal(8.64e19).params:.2e}"  # one PF-day
        '1.30e+09'
    """

    source: ClassVar[str] = "arXiv 2001.08361"
    holds: ClassVar[Range] = Range("text", params=(7e2, 1.5e9), flops=(1e15, 1e22))
    counts: ClassVar[str] = "blocks"

    units: ClassVar[str] = "parameters without embeddings, tokens, nats per token"
    unknowns: ClassVar[Mapping[str, Unknown]] = {
        "N_c": Unknown(1e3, 1e15), "D_c": Unknown(1e3, 1e15), "alpha_N": EXPONENT, "alpha_D": EXPONENT,
    }  # fmt: skip

    N_c: float = 6.4e13
    D_c: float = 1.8e13
    alpha_N: float = 0.076
    alpha_D: float = 0.103

    def formula(self, c: Any, run: Any) -> Any:
        """Compute the loss from size and data."""
        return ((c.N_c / run.params) ** (c.alpha_N / c.alpha_D) + c.D_c / run.tokens) ** c.alpha_D

    def _best_params(self, flops: float) -> float:
        if self.constants == Kaplan().constants:
            return float(1.3e9 * (flops / PF_DAY) ** 0.73)
        return super()._best_params(flops)

    def loss_of_params(self, params: float) -> float:
        """Return the loss of a model trained to convergence on unlimited data, ``(8.8e13 / N)^0.076``."""
        return float((8.8e13 / positive("params", params)) ** 0.076)

    def loss_of_tokens(self, tokens: float) -> float:
        """Return the loss of the largest model with early stopping, ``(5.4e13 / D)^0.095``."""
        return float((5.4e13 / positive("tokens", tokens)) ** 0.095)

    def loss_of_compute(self, flops: float) -> float:
        """Return the loss of the best model at this compute, ``(3.1e8 / C)^0.050`` with C in PF-days."""
        return float((3.1e8 * PF_DAY / positive("flops", flops)) ** 0.050)

    def critical_batch(self, loss: float) -> float:
        """Return the tokens of the batch that balances time and compute, ``2e8 / L^(1 / 0.21)``.

        Example:
            >>> round(Kaplan().critical_batch(3.0) / 1e6, 2)
            1.07
        """
        return float(2e8 / positive("loss", loss) ** (1 / 0.21))


@dataclass(frozen=True)
class Porian(Law):
    """``N* = size C^exponent``, tuned at every scale (Porian et al., arXiv 2406.19146; refit of the authors' data).

    Sizes include the head. The law does not predict the loss. For other runs, `isoflop(runs).law` gives its two
    constants.

    Example:
        >>> best = Porian().optimal(1e18)
        >>> f"{best.params:.3g} parameters, {best.tokens / best.params:.0f} tokens each"
        '1.05e+08 parameters, 15 tokens each'
    """

    source: ClassVar[str] = "arXiv 2406.19146, refit of its data files"
    holds: ClassVar[Range] = Range("text", params=(5e6, 9e8), flops=(1e16, 2e19))
    counts: ClassVar[str] = "head"
    no_loss: ClassVar[str] = "it is a law of best sizes"

    size: float = 0.1189
    exponent: float = 0.4969

    def _loss(self, params: float, tokens: float) -> float:
        return math.nan

    def _best_params(self, flops: float) -> float:
        return float(self.size * flops**self.exponent)

    def learning_rate(self, params: float) -> float:
        """Return the best learning rate, ``3.7 N^-0.36``."""
        return float(3.7 * positive("params", params) ** -0.36)

    def batch(self, params: float) -> float:
        """Return the tokens in the best batch, ``0.7576 N^0.703``."""
        return float(0.7576 * positive("params", params) ** 0.703)


@dataclass(frozen=True)
class ComputeOnly(Law):
    """Loss falls as a line in the logarithm of compute, however it is split: ``L = a - b ln C``, to be fitted.

    This is the form of "More Compute Is What You Need" (arXiv 2404.19484); it has no best size.
    """

    source: ClassVar[str] = "form arXiv 2404.19484"
    no_optimum: ClassVar[str] = "every size is as good as another under this law"
    unknowns: ClassVar[Mapping[str, Unknown]] = {"intercept": SIGNED, "slope": SIGNED}

    intercept: float | None = None
    slope: float | None = None

    def formula(self, c: Any, run: Any) -> Any:
        """Compute ``a - b ln C``."""
        return c.intercept - c.slope * log(self.flops_per * run.params * run.tokens)


@dataclass(frozen=True)
class Henighan(Law):
    """``L = floor + scale x^-exponent`` in one quantity x, to be fitted (Henighan et al., arXiv 2010.14701).

    ``by`` names the quantity: "params", "tokens" or "flops". Published exponents for language are 0.070 by parameters
    and 0.048 by compute; the other constants depend on the data.

    Example:
        >>> Henighan(floor=1.0, scale=10.0, exponent=0.5, by="tokens").loss(1e6, 400.0)
        1.5
    """

    source: ClassVar[str] = "form arXiv 2010.14701"
    no_optimum: ClassVar[str] = "it depends on one quantity, so it cannot trade size for data"
    unknowns: ClassVar[Mapping[str, Unknown]] = {"floor": LINEAR, "scale": LINEAR, "exponent": Unknown(0.02, 1.5)}

    floor: float | None = None
    scale: float | None = None
    exponent: float | None = None
    by: str = "flops"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("params", "tokens", "flops"):
            raise ValueError(f"by={self.by!r}: choose 'params', 'tokens' or 'flops'.")

    def formula(self, c: Any, run: Any) -> Any:
        """Compute ``floor + scale x^-exponent``."""
        if self.by == "flops":
            amount = self.flops_per * run.params * run.tokens
        else:
            amount = run.params if self.by == "params" else run.tokens
        return c.floor + c.scale * amount**-c.exponent


@dataclass(frozen=True)
class Farseer(Law):
    """``L = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) D^(-exp(a1 N^alpha + b1))``, nine constants to be fitted.

    The exponent of data depends on size (Farseer, arXiv 2506.10972).
    """

    source: ClassVar[str] = "form arXiv 2506.10972"
    unknowns: ClassVar[Mapping[str, Unknown]] = {
        "a1": Unknown(-0.2, 0.0, positive=False), "b1": Unknown(-2.0, 0.0, positive=False), "alpha": Unknown(0.05, 0.3),
        "a2": Unknown(0.0, 1.0, positive=False), "b2": Unknown(0.0, 8.0, positive=False), "beta": Unknown(0.02, 0.3),
        "a3": Unknown(-0.5, 0.0, positive=False), "b3": Unknown(0.0, 3.0, positive=False), "gamma": Unknown(0.05, 0.3),
    }  # fmt: skip

    a1: float | None = None
    b1: float | None = None
    alpha: float | None = None
    a2: float | None = None
    b2: float | None = None
    beta: float | None = None
    a3: float | None = None
    b3: float | None = None
    gamma: float | None = None

    def formula(self, c: Any, run: Any) -> Any:
        """Sum a floor by size and a power of data, whose scale and exponent depend on size."""
        decline = exp(c.a1 * run.params**c.alpha + c.b1)
        return exp(c.a3 * run.params**c.gamma + c.b3) + exp(
            c.a2 * run.params**c.beta + c.b2 - decline * log(run.tokens)
        )


@dataclass(frozen=True)
class Rectified(Law):
    """Fine-tuning: ``L = B / (D_l + D^beta) + E``, where ``D_l`` is the worth of pre-training, to be fitted.

    This is the form of the rectified scaling law (arXiv 2402.02314); it does not depend on size.
    """

    source: ClassVar[str] = "form arXiv 2402.02314"
    no_optimum: ClassVar[str] = "it does not depend on the model size"
    columns: ClassVar[tuple[str, ...]] = ("tokens",)
    unknowns: ClassVar[Mapping[str, Unknown]] = {
        "B": LINEAR, "learnt": Unknown(1.0, 1e8), "beta": Unknown(0.1, 1.5), "E": LINEAR
    }  # fmt: skip

    B: float | None = None
    learnt: float | None = None
    beta: float | None = None
    E: float | None = None

    def formula(self, c: Any, run: Any) -> Any:
        """Compute ``B / (D_l + D^beta) + E``."""
        return c.B / (c.learnt + run.tokens**c.beta) + c.E


@dataclass(frozen=True)
class InferenceAware(Law):
    """Chinchilla's form times ``1 + epsilon R^gamma`` for a model of width over depth ``R``, to be fitted.

    This is the form of Bian et al. (arXiv 2501.18107). A fit takes ``width_over_depth`` from the runs.
    """

    source: ClassVar[str] = "form arXiv 2501.18107"
    columns: ClassVar[tuple[str, ...]] = ("params", "tokens", "width_over_depth")
    unknowns: ClassVar[Mapping[str, Unknown]] = {**TERMS, "epsilon": Unknown(1e-4, 1.0), "gamma": Unknown(0.1, 2.0)}

    E: float | None = None
    A: float | None = None
    B: float | None = None
    alpha: float | None = None
    beta: float | None = None
    epsilon: float | None = None
    gamma: float | None = None
    width_over_depth: float | None = None

    def formula(self, c: Any, run: Any) -> Any:
        """Multiply Chinchilla's formula by ``1 + epsilon R^gamma``."""
        ratio = getattr(run, "width_over_depth", self.width_over_depth)
        return (c.E + c.A * run.params**-c.alpha + c.B * run.tokens**-c.beta) * (1.0 + c.epsilon * ratio**c.gamma)


@dataclass(frozen=True)
class DataMixture(Law):
    """Chinchilla's form and a term of the mixture: ``L = E + 1 / sum_i C_i h_i^gamma_i + A / N^alpha + B / D^beta``.

    This is the additive form of Shukor et al. (arXiv 2507.09404), to be fitted; in federated training ``h`` may be the
    clients' sampling weights. A fit takes them from the runs, as columns ``share.0``, ``share.1``, ...

    Args:
        gains: ``C_i`` of each domain.
        exponents: ``gamma_i`` of each domain.
        shares: ``h_i`` of each domain, its fraction of the data; they sum to 1.
    """

    source: ClassVar[str] = "form arXiv 2507.09404"
    columns: ClassVar[tuple[str, ...]] = ("params", "tokens", "share.0", "share.1")

    E: float | None = None
    A: float | None = None
    B: float | None = None
    alpha: float | None = None
    beta: float | None = None
    gains: tuple[float, ...] | None = None
    exponents: tuple[float, ...] | None = None
    shares: tuple[float, ...] | None = None

    def formula(self, c: Any, run: Any) -> Any:
        """Add the term of the mixture to Chinchilla's formula."""
        shares: Any = getattr(run, "share", self.shares)
        mixed = sum(gain * share**power for gain, power, share in zip(c.gains, c.exponents, shares, strict=True))
        return c.E + 1.0 / mixed + c.A * run.params**-c.alpha + c.B * run.tokens**-c.beta

    def sought(self, run: Mapping[str, Any]) -> Mapping[str, Unknown]:
        """Return the unknowns, with a gain and an exponent for each domain in the runs."""
        number = len(run["share"])
        return {
            **TERMS,
            **{f"gains.{i}": Unknown(0.1, 30.0) for i in range(number)},
            **{f"exponents.{i}": Unknown(0.1, 2.0) for i in range(number)},
        }


@dataclass(frozen=True)
class RoutedLM(Law):
    """Mixtures of experts: loss by dense size ``N`` and number of experts ``E`` (Clark et al., arXiv 2202.01169).

    ``log10 L = a log10 N + b log10 S + c log10 N log10 S + d``, where ``S`` is the saturated number of experts,
    ``1 / S = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max``. It holds for 130 B tokens and ignores
    ``tokens``.

    Example:
        >>> dense, routed = RoutedLM(experts=1).loss(1e8, 1.3e11), RoutedLM(experts=64).loss(1e8, 1.3e11)
        >>> dense > routed
        True
    """

    source: ClassVar[str] = "arXiv 2202.01169, S-BASE"
    no_optimum: ClassVar[str] = "it was fitted on 130 B tokens only, so it cannot trade size for data"
    holds: ClassVar[Range] = Range("text", params=(1.5e7, 1.3e9))

    columns: ClassVar[tuple[str, ...]] = ("params", "experts")
    unknowns: ClassVar[Mapping[str, Unknown]] = {
        "a": Unknown(-0.2, 0.0, positive=False), "b": Unknown(-0.3, 0.0, positive=False),
        "c": Unknown(0.0, 0.03, positive=False), "d": Unknown(0.5, 2.0, positive=False),
        "E_start": Unknown(1.0, 10.0), "E_max": Unknown(50.0, 1000.0),
    }  # fmt: skip

    a: float = -0.082
    b: float = -0.108
    c: float = 0.009
    d: float = 1.104
    E_start: float = 1.847
    E_max: float = 314.478
    experts: float = 1.0

    @classmethod
    def rl_r(cls, experts: float) -> RoutedLM:
        """Return the law of routing by reinforcement learning."""
        return cls(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982, experts)

    @classmethod
    def hash(cls, experts: float) -> RoutedLM:
        """Return the law of routing by a hash."""
        return cls(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741, experts)

    def formula(self, c: Any, run: Any) -> Any:
        """Compute the loss from the logarithms of size and of the saturated number of experts, and their product."""
        start = 1.0 / (1.0 / c.E_start - 1.0 / c.E_max)
        saturated = 1.0 / (1.0 / (getattr(run, "experts", self.experts) - 1.0 + start) + 1.0 / c.E_max)
        n, e = np.log10(run.params), log(saturated) * (1.0 / math.log(10.0))
        return exp((c.a * n + c.b * e + c.c * n * e + c.d) * math.log(10.0))
