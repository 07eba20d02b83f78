"""Partition by a real-valued property, with skew from none to complete."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.alike import alike_by_labels
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.grouping import deal_order, even_sizes, group
from lightning_fedscale.partitioners.labels import Labels, find_labels
from lightning_fedscale.partitioners.partition import Partition

_BINS_PER_CLIENT = 4
"""Bins of the property per client, by which further data are matched to clients."""


def continuous_partition(
    values: Labels, num_partitions: int, strictness: float, shuffle: bool = True, seed: int | None = 42
) -> Partition:
    """Sort by a blend of the property and noise, then cut into parts of equal size.

    The blend is ``strictness * z + (1 - strictness) * noise``, where ``z`` is the property standardised to mean 0 and
    deviation 1, and the noise is standard normal.

    Args: the values, then those of :class:`ContinuousPartitioner`.

    Example:
        >>> continuous_partition(np.array([3.0, 1.0, 2.0, 0.0]), 2, strictness=1.0, shuffle=False).client(0)
        array([1, 3])
    """
    checks.enough_samples(len(values), num_partitions)
    if values.dtype.kind not in "iufb":
        raise ValueError(
            f"partition_by: the property has dtype {values.dtype}, and ContinuousPartitioner needs numbers: name a"
            " column of numbers."
        )
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        i = int(np.argmin(np.isfinite(values)))
        raise ValueError(
            f"the property of sample {i} is {values[i]}: remove such samples, or give them a finite value."
        )
    rng = np.random.default_rng(seed)
    scores = (1 - strictness) * rng.standard_normal(len(values))
    if strictness > 0:
        deviation = values.std()
        if deviation <= 1e-12 * np.abs(values).max():
            raise ValueError(
                f"strictness={strictness}: all values of the property are equal, so they give no order: pass another"
                " partition_by, or strictness=0."
            )
        scores += strictness * (values - values.mean()) / deviation
    owner = np.empty(len(values), dtype=np.int64)
    owner[np.argsort(scores, kind="stable")] = np.repeat(
        np.arange(num_partitions), even_sizes(len(values), num_partitions)
    )
    return Partition(*group(owner, num_partitions, deal_order(len(values), shuffle, rng)))


class ContinuousPartitioner(Partitioner):
    """Split by a real-valued property (age, brightness, a regression target) with adjustable strictness.

    All samples are used; sizes differ by at most one; the order within a client is random.

    Args:
        num_partitions: number of clients.
        partition_by: column with the property; None looks where labels usually are.
        strictness: 0 is IID, 1 gives each client one interval of the sorted property; required.
        shuffle: False leaves each client's samples ascending by position.
        seed: equal seeds give equal partitions.

    Raises:
        ValueError: strictness is missing or outside [0, 1], or a value of the property is not finite.

    Example:
        >>> partitioner = ContinuousPartitioner(num_partitions=2, strictness=1.0)
        >>> partitioner.dataset = [0.3, 0.1, 0.9, 0.7]
        >>> sorted(partitioner.load_partition(1).tolist())
        [2, 3]
    """

    def __init__(
        self,
        num_partitions: int,
        partition_by: str | None = None,
        strictness: float | None = None,
        shuffle: bool = True,
        seed: int | None = 42,
    ) -> None:
        super().__init__(num_partitions, partition_by)
        checks.given("strictness", strictness, "ContinuousPartitioner(num_partitions=10, strictness=0.5)")
        self.strictness = checks.in_interval("strictness", strictness, 0.0, 1.0)
        checks.seed_value(seed)
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return continuous_partition(self._labels(), self.num_partitions, self.strictness, self.shuffle, self.seed)

    def divide_alike(self, dataset: Any, seed: int = 0) -> Partition:
        """Divide further data as every partitioner does; values in the same quantile bin count as the same label."""
        values = self._labels().astype(np.float64)
        edges = np.quantile(values, np.linspace(0, 1, _BINS_PER_CLIENT * self.num_partitions + 1)[1:-1])
        others = find_labels(dataset, self.partition_by).astype(np.float64)
        return alike_by_labels(self.partition, np.searchsorted(edges, values), np.searchsorted(edges, others), seed)
