"""Label skew by a Dirichlet distribution over classes, for clients of given sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.dirichlet import FloatArray, log_gamma
from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.grouping import deal_order, group
from lightning_fedscale.partitioners.labels import Labels
from lightning_fedscale.partitioners.partition import IntArray, Partition
from lightning_fedscale.partitioners.sizes import check_sum


def inner_dirichlet_partition(
    labels: Labels,
    partition_sizes: npt.ArrayLike,
    alpha: float | Sequence[float] | FloatArray,
    shuffle: bool = True,
    seed: int | None = 42,
) -> Partition:
    """Let each client draw its own label mix, and then samples by that mix until it is full.

    Client ``i`` draws ``q_i ~ Dirichlet(alpha)`` over the classes, then a class for each of its samples by ``q_i``.
    If more samples of a class are drawn than exist, they are dealt at random; the remaining clients draw again, by
    their mix over the remaining classes (Acar et al. 2021, https://arxiv.org/abs/2111.04263). Each pass exhausts a
    class or is the last, so there are at most as many passes as classes.

    Mixes are kept as logarithms, so that renormalising over the remaining classes is defined for every alpha.

    Args: the labels, then those of :class:`InnerDirichletPartitioner`.

    Example:
        >>> labels = np.repeat([0, 1], 5)
        >>> inner_dirichlet_partition(labels, [6, 4], alpha=1e-9).sizes
        array([6, 4])
    """
    sizes = checks.sizes("partition_sizes", partition_sizes, minimum=0)
    check_sum(int(sizes.sum()), len(labels))
    rng = np.random.default_rng(seed)
    order = deal_order(len(labels), shuffle, rng)
    classes, codes = encode_classes(labels)
    if np.ndim(alpha) and np.size(alpha) != len(classes):
        raise ValueError(
            f"alpha has {np.size(alpha)} entries for {len(classes)} classes: pass one per class, or a single number."
        )
    alpha = np.broadcast_to(np.asarray(alpha, dtype=np.float64), (len(sizes), len(classes)))
    members, starts = group(codes, len(classes), order)
    counts = _draw_counts(log_gamma(alpha, rng), sizes, np.diff(starts), rng)
    owner = np.full(len(labels), -1, dtype=np.int64)
    for k, samples in enumerate(np.split(members, starts[1:-1])):
        holders = np.repeat(np.arange(len(sizes)), counts[:, k])
        owner[samples[: len(holders)]] = holders
    return Partition(*group(owner, len(sizes), order))


def _draw_counts(log_mix: FloatArray, sizes: IntArray, stock: IntArray, rng: np.random.Generator) -> IntArray:
    """Draw how many samples of each class each client gets, ``clients x classes``."""
    counts = np.zeros(log_mix.shape, dtype=np.int64)
    missing = sizes.copy()
    while missing.any():
        hungry = np.flatnonzero(missing)
        log_open = np.where(stock > 0, log_mix[hungry], -np.inf)
        mix = np.exp(log_open - log_open.max(axis=1, keepdims=True))
        wanted = rng.multinomial(missing[hungry], mix / mix.sum(axis=1, keepdims=True))
        for k in np.flatnonzero(wanted.sum(axis=0) > stock):
            wanted[:, k] = rng.multivariate_hypergeometric(wanted[:, k], stock[k], method="marginals")
        counts[hungry] += wanted
        missing[hungry] -= wanted.sum(axis=1)
        stock = stock - wanted.sum(axis=0)
    return counts


class InnerDirichletPartitioner(Partitioner):
    """Give each client of a given size its own label mix from a Dirichlet distribution.

    Use it instead of :class:`~lightning_fedscale.partitioners.DirichletPartitioner` to control the sizes: that one
    skews sizes and labels together. Clients that draw again take the samples that are left, so for small ``alpha`` and
    sizes that use up the dataset their mixes are less skewed than requested. If the sizes add up to less than the
    dataset, the remaining samples belong to no client, and a warning gives their number. The order within a client is
    random.

    Args:
        partition_sizes: size of each client; 0 is allowed.
        partition_by: column with the labels; None looks in the usual places.
        alpha: concentration, one for all classes or one per class in sorted order; required.
        shuffle: False deals the samples of a class in the order of the dataset, and leaves each client's ascending.
        seed: equal seeds give equal partitions.

    Raises:
        ValueError: alpha is missing or not positive, or the sizes exceed the dataset.

    Example:
        >>> partitioner = InnerDirichletPartitioner([60, 40], alpha=0.3)
        >>> partitioner.dataset = [0, 1, 2, 3] * 25
        >>> partitioner.partition.sizes.tolist()
        [60, 40]
    """

    def __init__(
        self,
        partition_sizes: Sequence[int] | IntArray,
        partition_by: str | None = None,
        alpha: float | Sequence[float] | FloatArray | None = None,
        shuffle: bool = True,
        seed: int | None = 42,
    ) -> None:
        self.partition_sizes = checks.sizes("partition_sizes", partition_sizes, minimum=0)
        super().__init__(len(self.partition_sizes), partition_by)
        checks.given("alpha", alpha, "InnerDirichletPartitioner(partition_sizes=[100] * 10, alpha=0.5)")
        self.alpha = checks.concentration(alpha)
        checks.seed_value(seed)
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return inner_dirichlet_partition(self._labels(), self.partition_sizes, self.alpha, self.shuffle, self.seed)
