"""Rules for the batch size and for what depends on it: critical batches, weight decay, averaging, schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

from lightning_fedscale.scaling.form import LINEAR, SIGNED, Form, Unknown, positive


class CriticalBatch:
    """Batch sizes beyond which more samples per batch hardly shorten training.

    `Kaplan.critical_batch` gives the critical batch at a loss, in tokens.

    Example:
        >>> CriticalBatch.steps(1000.0, batch=2e6, critical_batch=1e6)  # half as many more than the fewest
        1500.0
        >>> round(CriticalBatch.zhang(1e9))  # sequences, at Chinchilla's ratio
        2396
    """

    @staticmethod
    def steps(fewest: float, batch: float, critical_batch: float) -> float:
        """Return the steps to a target loss, ``S = S_min (1 + B_crit / B)`` (McCandlish et al., arXiv 1812.06162)."""
        return positive("fewest", fewest) * (
            1.0 + positive("critical_batch", critical_batch) / positive("batch", batch)
        )

    @staticmethod
    def samples(fewest: float, batch: float, critical_batch: float) -> float:
        """Return the samples to a target loss, ``E = E_min (1 + B / B_crit)``; ``B_crit = E_min / S_min``."""
        return positive("fewest", fewest) * (
            1.0 + positive("batch", batch) / positive("critical_batch", critical_batch)
        )

    @staticmethod
    def learning_rate(largest: float, batch: float, critical_batch: float) -> float:
        """Return SGD's best learning rate with a batch size, ``eta_max / (1 + B_crit / B)`` (arXiv 1812.06162)."""
        return positive("largest", largest) / (
            1.0 + positive("critical_batch", critical_batch) / positive("batch", batch)
        )

    @staticmethod
    def zhang(params: float) -> float:
        """Return ``93.20 N^0.47`` sequences, N in millions, for models trained at Chinchilla's ratio.

        At this batch size, training takes a fifth more steps than linear scaling from 256 (arXiv 2410.21676). It
        depends on the data, not on the size: at fixed data the same authors find ``621.341 N^0.087``. The unit of N is
        from digests of the paper, and has not been checked in the paper.
        """
        return float(93.20 * (positive("params", params) / 1e6) ** 0.47)

    @staticmethod
    def power_lines(tokens: float, scale: float) -> float:
        """Return the critical batch ``scale D^0.462`` of a run on D tokens, in the scale's unit (arXiv 2505.13738).

        It does not depend on the model size. Compute the scale from a critical batch that you measured,
        ``B / D^0.462``: the paper's scale has not been checked here.
        """
        return float(positive("scale", scale) * positive("tokens", tokens) ** 0.462)

    @staticmethod
    def optimal(tokens: float, scale: float) -> float:
        """Return the batch with the lowest loss, ``scale D^0.383``; for the scale see `power_lines` (arXiv 2505.13738).

        Example:
            >>> best = 256 / 1e9**0.383  # a batch of 256 was best on 1e9 tokens
            >>> round(CriticalBatch.optimal(8e9, best))
            568
        """
        return float(positive("scale", scale) * positive("tokens", tokens) ** 0.383)

    @staticmethod
    def time_scale(params: float, tokens: float) -> float:
        """Return AdamW's best averaging span, ``tau = 1.084 (D / N)^-0.527`` of the run (arXiv 2505.13738)."""
        return float(1.084 * (positive("tokens", tokens) / positive("params", params)) ** -0.527)

    @classmethod
    def weight_decay(cls, params: float, tokens: float, batch: float, learning_rate: float) -> float:
        """Return AdamW's weight decay for `time_scale`, ``lambda = B / (eta tau D)`` with B in tokens."""
        return positive("batch", batch) / (
            positive("learning_rate", learning_rate) * cls.time_scale(params, tokens) * tokens
        )


@dataclass(frozen=True)
class EMARule:
    """An average of weights that spans the same number of samples at any batch or cohort size (arXiv 2307.13813).

    With ``factor`` times the batch size, the decay becomes ``decay^factor``, and the learning rate of SGD is multiplied
    by ``factor``.

    Args:
        decay: decay of the average per step, at the batch size that it was tuned for.

    Example:
        >>> rule = EMARule(0.99)
        >>> round(rule.decay_at(4.0), 4), rule.learning_rate_at(0.1, 4.0)
        (0.9606, 0.4)
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay!r}: pass a number in [0, 1).")

    def decay_at(self, factor: float) -> float:
        """Return the decay for ``factor`` times the batch size."""
        return float(self.decay ** positive("factor", factor))

    def learning_rate_at(self, learning_rate: float, factor: float) -> float:
        """Return SGD's learning rate for ``factor`` times the batch size."""
        return positive("learning_rate", learning_rate) * positive("factor", factor)


@dataclass(frozen=True)
class LRAnnealing(Form):
    """The course of the loss under any schedule: ``L = floor + A S1^-alpha - C S2``, to be fitted (arXiv 2408.11029).

    ``S1`` is the sum of the learning rates so far; ``S2`` sums their decreases by annealing, with momentum. A fit takes
    both from the runs; `areas` computes them from a schedule.

    Example:
        >>> law = LRAnnealing(floor=2.0, A=0.5, alpha=0.5, C=0.1)
        >>> constant, annealed = law.loss([0.1] * 100), law.loss([0.1] * 50 + [0.01] * 50)
        >>> annealed < law.loss([0.1] * 50 + [0.1] * 4)
        True
    """

    source: ClassVar[str] = "form arXiv 2408.11029"
    units: ClassVar[str] = "learning rates by step, nats per token"
    columns: ClassVar[tuple[str, ...]] = ("S1", "S2")
    unknowns: ClassVar[Mapping[str, Unknown]] = {
        "floor": LINEAR, "A": LINEAR, "alpha": Unknown(0.1, 1.5), "C": SIGNED
    }  # fmt: skip

    floor: float | None = None
    A: float | None = None
    alpha: float | None = None
    C: float | None = None
    momentum: float = 0.999

    def areas(self, rates: Sequence[float]) -> list[tuple[float, float]]:
        """Return ``(S1, S2)`` after each step."""
        spans, annealed, momentum = list(accumulate(rates)), [0.0], 0.0
        for before, now in pairwise(rates):
            momentum = self.momentum * momentum + before - now
            annealed.append(annealed[-1] + momentum)
        return list(zip(spans, annealed, strict=True))

    def formula(self, c: Any, run: Any) -> Any:
        """Compute ``floor + A S1^-alpha - C S2``."""
        return c.floor + c.A * run.S1**-c.alpha - c.C * run.S2

    def loss(self, rates: Sequence[float]) -> float:
        """Predict the loss after steps with these learning rates."""
        if not len(rates):
            raise ValueError("rates=[]: pass the learning rate of every step so far.")
        span, annealed = self.areas(rates)[-1]
        return float(self.predict(S1=span, S2=annealed))


@dataclass(frozen=True)
class LossToLoss(Form):
    """One loss by another: ``L1 = K (L0 - E0)^kappa + E1``, to be fitted (arXiv 2411.12925).

    A fit takes the other loss from the runs' column ``other``.

    Example:
        >>> LossToLoss(K=1.0, kappa=2.0, E0=1.5, E1=2.0).loss(2.5)
        3.0
    """

    source: ClassVar[str] = "form arXiv 2411.12925"
    units: ClassVar[str] = "loss, loss"
    columns: ClassVar[tuple[str, ...]] = ("other",)

    K: float | None = None
    kappa: float | None = None
    E0: float | None = None
    E1: float | None = None

    def formula(self, c: Any, run: Any) -> Any:
        """Compute ``K (L0 - E0)^kappa + E1``."""
        return c.K * (run.other - c.E0) ** c.kappa + c.E1

    def sought(self, run: Mapping[str, Any]) -> Mapping[str, Unknown]:
        """Return the unknowns, with ``E0`` limited to below the smallest value of the other loss."""
        least = float(min(run["other"]))
        return {
            "K": LINEAR, "kappa": Unknown(0.2, 4.0), "E0": Unknown(0.0, 0.99 * least, below=least), "E1": LINEAR
        }  # fmt: skip

    def loss(self, other: float) -> float:
        """Predict the loss at the value ``other`` of the other loss."""
        self.check()
        assert self.E0 is not None
        if other <= self.E0:
            raise ValueError(f"other={other!r}: pass a loss above its floor, E0={self.E0!r}.")
        return float(self.predict(other=other))
