"""A model of the time that a run takes, fitted to finished runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.optimize import nnls

from lightning_fedscale.study.settings import Setting


class Cost:
    """Predicts seconds, and FLOPs per sample, of settings that have not run.

    The time of a run is a fixed part, a part per batch and a part per FLOP, fitted by non-negative least squares of
    relative errors. FLOPs per sample follow a power law between the sizes that have run, and beyond them.

    Args:
        flops: compute of a run at the full budget, of all clients together.
        clients: number of clients that train in a round.

    Example:
        >>> cost = Cost(1e9, clients=4)
        >>> settings = [Setting(size, "fed_avg", 10, 5, 1.0) for size in (10, 20, 40)]
        >>> for each in settings:
        ...     samples = 1e8 / (1000 * each.size)
        ...     cost.learn(each, samples=samples, flops=1e8, seconds=0.5 + samples / 10 * 1e-3)
        >>> round(cost.seconds(settings[1], share=1.0), 2), round(cost.rounds(settings[1], share=1.0))
        (5.5, 250)
    """

    def __init__(self, flops: float, clients: int) -> None:
        self._flops, self._clients = flops, clients
        self._rows: list[tuple[float, float, float]] = []
        self._seconds: list[float] = []
        self._per_sample: dict[int, list[float]] = {}

    def learn(self, setting: Setting, *, samples: float, flops: float, seconds: float) -> None:
        """Add a finished run; samples and FLOPs are those of all clients together."""
        if samples <= 0 or flops <= 0:
            return
        self._rows.append((1.0, samples / setting.batch_size, flops))
        self._seconds.append(max(seconds, 1e-6))
        self._per_sample.setdefault(setting.size, []).append(flops / samples)

    def learn_all(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add the rows of a ledger."""
        for row in rows:
            setting = Setting(*(row[name] for name in Setting._fields))
            self.learn(setting, samples=row["samples"], flops=row["flops"], seconds=row["seconds"])

    def per_sample(self, size: int) -> float:
        """Predict the FLOPs per sample."""
        known = sorted(self._per_sample)
        if not known:
            return math.nan
        means = {each: float(np.median(self._per_sample[each])) for each in known}
        if size in means or len(known) == 1:
            return means.get(size, means[known[0]])
        right = min(max(1, sum(each < size for each in known)), len(known) - 1)
        low, high = known[right - 1], known[right]
        slope = math.log(means[high] / means[low]) / math.log(high / low)
        return means[low] * float((size / low) ** slope)

    def rounds(self, setting: Setting, share: float) -> float:
        """Predict the number of rounds with a fraction of the budget."""
        return (
            share
            * self._flops
            / (self.per_sample(setting.size) * setting.batch_size * setting.local_steps * self._clients)
        )

    def seconds(self, setting: Setting, share: float) -> float:
        """Predict the time of a run."""
        if not self._rows:
            return math.nan
        batches = share * self._flops / self.per_sample(setting.size) / setting.batch_size
        return float(np.dot(self._fitted(), (1.0, batches, share * self._flops)))

    def _fitted(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        weight = 1.0 / np.array(self._seconds)
        matrix = np.array(self._rows) * weight[:, None]
        size = np.linalg.norm(matrix, axis=0)
        found: np.ndarray[Any, np.dtype[np.float64]] = nnls(matrix / size, np.ones(len(weight)))[0] / size
        return found
