"""How large a batch, and what goes with it: critical batches, weight decay, averaging, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_fedscale.scaling.base import positive


class CriticalBatch:
    """Batches beyond which more samples hardly shorten training.

    Example:
        >>> CriticalBatch.steps(1000.0, batch=2e6, critical_batch=1e6)  # half as many more than the fewest
        1500.0
        >>> round(CriticalBatch.zhang(1e9))  # sequences, at Chinchilla's ratio
        2396
    """

    @staticmethod
    def steps(fewest: float, batch: float, critical_batch: float) -> float:
        """Steps to a target with a batch, ``S = S_min (1 + B_crit / B)`` (McCandlish et al., arXiv 1812.06162)."""
        return positive("fewest", fewest) * (
            1.0 + positive("critical_batch", critical_batch) / positive("batch", batch)
        )

    @staticmethod
    def zhang(params: float) -> float:
        """Sequences, ``93.20 N^0.47`` with N in millions, for models trained at Chinchilla's ratio (arXiv 2410.21676).

        The batch with a fifth more steps than linear scaling from 256 would take. It follows data, not size: at
        fixed data the same authors find ``621.341 N^0.087``. The unit of N is as digests of the paper give it.
        """
        return float(93.20 * (positive("params", params) / 1e6) ** 0.47)

    @staticmethod
    def time_scale(params: float, tokens: float) -> float:
        """Best span of AdamW's average, ``tau = 1.084 (D / N)^-0.527`` of the run (Power Lines, arXiv 2505.13738)."""
        return float(1.084 * (positive("tokens", tokens) / positive("params", params)) ** -0.527)

    @classmethod
    def weight_decay(cls, params: float, tokens: float, batch: float, learning_rate: float) -> float:
        """AdamW's weight decay for that time scale, ``lambda = B / (eta tau D)`` with B in tokens."""
        return positive("batch", batch) / (learning_rate * cls.time_scale(params, tokens) * tokens)


def ema_rule(decay: float, factor: float) -> float:
    """The decay of an average of weights when the batch, or cohort, grows by a factor: ``decay^factor``.

    So the average spans as many samples as before (Busbridge et al., arXiv 2307.13813).

    Example:
        >>> round(ema_rule(0.99, 4.0), 4)
        0.9606
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay!r}: pass a number in [0, 1).")
    return float(decay ** positive("factor", factor))


@dataclass(frozen=True)
class LRAnnealing:
    """The course of the loss under any schedule: ``L = floor + A S1^-alpha - C S2``, to be fitted (arXiv 2408.11029).

    ``S1`` is the sum of learning rates so far, ``S2`` that of what annealing has taken off them, with momentum.

    Example:
        >>> law = LRAnnealing(floor=2.0, A=0.5, alpha=0.5, C=0.1)
        >>> constant, annealed = law.loss([0.1] * 100), law.loss([0.1] * 50 + [0.01] * 50)
        >>> annealed < law.loss([0.1] * 50 + [0.1] * 4)
        True
    """

    floor: float | None = None
    A: float | None = None
    alpha: float | None = None
    C: float | None = None
    momentum: float = 0.999

    def loss(self, rates: Sequence[float]) -> float:
        """Loss after steps of these learning rates."""
        if None in (self.floor, self.A, self.alpha, self.C):
            raise ValueError("LRAnnealing: its constants belong to one run and are not published: fit them first.")
        assert self.floor is not None
        assert self.A is not None
        assert self.alpha is not None
        assert self.C is not None
        annealed = momentum = 0.0
        for before, now in pairwise(rates):
            momentum = self.momentum * momentum + before - now
            annealed += momentum
        return float(self.floor + self.A * math.fsum(rates) ** -self.alpha - self.C * annealed)


@dataclass(frozen=True)
class LossToLoss:
    """One loss by another: ``L1 = K (L0 - E0)^kappa + E1``, to be fitted (arXiv 2411.12925).

    Example:
        >>> LossToLoss(K=1.0, kappa=2.0, E0=1.5, E1=2.0).loss(2.5)
        3.0
    """

    K: float
    kappa: float
    E0: float
    E1: float

    def loss(self, other: float) -> float:
        """The loss where the other one is ``other``."""
        if other <= self.E0:
            raise ValueError(f"other={other!r}: pass a loss above its floor, E0={self.E0!r}.")
        return float(self.K * (other - self.E0) ** self.kappa + self.E1)


def average_parameters(tokens: Sequence[float], params: Sequence[float]) -> float:
    """The size of a model whose size changes in training: ``sum T N / sum T`` over stretches (arXiv 2501.12486).

    For pruned, partly frozen or partly sent models, put into a law as ``params``.

    Example:
        >>> average_parameters([1e9, 3e9], [4e8, 2e8])
        250000000.0
    """
    if len(tokens) != len(params) or not len(tokens):
        raise ValueError(
            f"tokens, params: pass as many sizes as stretches of tokens, not {len(params)} for {len(tokens)}."
        )
    total = math.fsum(positive("tokens", value) for value in tokens)
    return math.fsum(t * positive("params", n) for t, n in zip(tokens, params, strict=True)) / total


def compressed_parameters(params: float, bits: float, scale: float) -> float:
    """What parameters of few bits are worth: ``N (1 - exp(-bits / scale))`` (Kumar et al., arXiv 2411.04330).

    Args:
        params: number of parameters.
        bits: of each of them.
        scale: fitted, in bits.

    Example:
        >>> round(compressed_parameters(1e9, bits=4, scale=2.0) / 1e9, 3)
        0.865
    """
    return positive("params", params) * -math.expm1(-positive("bits", bits) / positive("scale", scale))
