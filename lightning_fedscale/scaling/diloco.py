"""The laws of DiLoCo, where many replicas rarely communicate (Charles et al., arXiv 2503.09799)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_fedscale.scaling.base import Allocation, ConstantsCovariance, Law
from lightning_fedscale.scaling.form import LINEAR, Range, Unknown, positive

SEQUENCE = 2048
"""Tokens in a sequence. The published batch law is in sequences, although the paper's text says tokens."""


SPREAD = ConstantsCovariance(
    {"A": 40.668, "alpha": -0.163846, "beta": 0.018305, "floor": 1.135354},
    (
        (1.861834e-02, -1.365260e-03, 2.316923e-04, 1.278104e-02),
        (-1.365260e-03, 1.006091e-04, -1.712729e-05, -9.583570e-04),
        (2.316923e-04, -1.712729e-05, 6.942296e-06, 1.557229e-04),
        (1.278104e-02, -9.583570e-04, 1.557229e-04, 9.801237e-03),
    ),
)
"""Covariance of ln A, alpha, beta and ln floor: `fit` with 1,000 resamples of the 34 losses of tables 4 and 5."""


@dataclass(frozen=True)
class DiLoCo(Law):
    """Loss of ``M`` replicas that share 20 tokens per parameter: ``L = A N^alpha M^beta + floor``.

    The default constants are a refit of all published points, with a floor (largest error 0.9 %). The published law,
    `published`, has no floor and underestimates its own runs of 4 B and 10 B parameters by up to 4.6 %. Replicas train
    for 30 steps between exchanges on IID data, with AdamW on the replicas and Nesterov momentum on the server.

    Example:
        >>> law = DiLoCo(replicas=4)
        >>> round(law.loss(2.4e9, 20 * 2.4e9), 3)  # 2.332 was measured
        2.347
        >>> round(law.inner_learning_rate(1e9), 6), law.outer_learning_rate, round(law.batch(1e9) / 2**20, 2)
        (0.00038, 0.6, 0.37)
    """

    source: ClassVar[str] = "arXiv 2503.09799, refit of its tables with a floor"
    holds: ClassVar[Range] = Range("text", params=(3.5e7, 1e10), clients=(1, 8))
    # Its sizes 35 M, 90 M and 180 M are 12 layers width^2 plus one embedding table of 32,768 tokens.
    counts: ClassVar[str] = "all"
    knows_clients: ClassVar[bool] = True
    no_loss: ClassVar[str] = "it was fitted at 20 tokens of all replicas together per parameter"
    columns: ClassVar[tuple[str, ...]] = ("params", "clients")
    unknowns: ClassVar[Mapping[str, Unknown]] = {
        "A": LINEAR, "alpha": Unknown(-0.5, -0.05, positive=False), "beta": Unknown(0.0, 0.1, positive=False),
        "floor": LINEAR,
    }  # fmt: skip
    spread: ClassVar[ConstantsCovariance | None] = SPREAD

    A: float = 40.668
    alpha: float = -0.163846
    beta: float = 0.018305
    floor: float = 1.135354
    replicas: int = 1

    @classmethod
    def published(cls, replicas: int = 1) -> DiLoCo:
        """Return table 10's power law, ``19.226 N^-0.0985 M^0.0116``."""
        return cls(19.226, -0.0985, 0.0116, 0.0, replicas)

    def loss(self, params: float, tokens: float) -> float:
        """Predict the loss of a model of ``params`` parameters after ``20 params`` tokens of all replicas together.

        Raises:
            ValueError: for any other number of tokens, since the law holds for this ratio only.
        """
        found = super().loss(params, tokens)
        if math.isnan(found):
            raise ValueError(
                f"tokens={tokens:.4g}: DiLoCo's law holds only at 20 tokens per parameter. Pass {20 * params:.4g}"
                " tokens for this size, or name another law."
            )
        return found

    def _loss(self, params: float, tokens: float) -> float:
        self.warn_outside(clients=self.replicas)
        return float(self.predict(params=params)) if 0.99 < tokens / (20.0 * params) < 1.01 else math.nan

    def _loss_federated(self, params: float, tokens: float, clients: int, rho: float) -> float:
        return self.replace(replicas=clients)._loss(params, tokens * clients)

    def formula(self, c: Any, run: Any) -> Any:
        """Compute ``A N^alpha M^beta + floor``; a fit takes the replicas from the runs' clients."""
        return c.A * run.params**c.alpha * (1.0 * getattr(run, "clients", self.replicas)) ** c.beta + c.floor

    def _best_params(self, flops: float) -> float:
        return math.sqrt(flops / (20.0 * self.flops_per))

    def optimal_federated(
        self, flops: float | Sequence[float], clients: int | None = None, rho: float = 1.0, mean: str = "mean"
    ) -> Allocation:
        """Return the best model for ``clients`` replicas at 20 tokens per parameter; ``rho`` has no effect."""
        alike = super().optimal_federated(flops, clients, 0.0, mean)
        best = self.replace(replicas=alike.clients).optimal(alike.flops)
        return alike._replace(params=best.params, tokens=best.tokens / alike.clients, loss=best.loss)

    def loss_federated(self, params: float, tokens: float, clients: int = 1, rho: float = 1.0) -> float:
        """Predict the loss with ``clients`` replicas; ``rho`` has no effect."""
        return self.replace(replicas=clients).loss(params, tokens * clients)

    def inner_learning_rate(self, params: float) -> float:
        """Return AdamW's learning rate on the replicas, ``22256 N^-0.8827 M^0.2929`` (table 10)."""
        return float(22256.0 * positive("params", params) ** -0.8827 * self.replicas**0.2929)

    @property
    def outer_learning_rate(self) -> float:
        """Learning rate of the server's Nesterov momentum 0.9, of the nearest of the tuned 1, 2, 4 and 8 replicas."""
        return {1: 0.4, 2: 0.6, 4: 0.6, 8: 0.8}[min(8, 2 ** round(math.log2(self.replicas)))]

    def batch(self, params: float) -> float:
        """Return the batch of all replicas in tokens, ``0.00709 N^0.4695 M^0.3399`` sequences (table 10)."""
        return float(SEQUENCE * 0.00709 * positive("params", params) ** 0.4695 * self.replicas**0.3399)
