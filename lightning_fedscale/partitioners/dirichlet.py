"""Label skew by a Dirichlet distribution over clients, in one draw that always succeeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.grouping import cut, deal_order, group
from lightning_fedscale.partitioners.labels import Labels
from lightning_fedscale.partitioners.partition import IntArray, Partition

FloatArray = npt.NDArray[np.float64]


def dirichlet_partition(
    labels: Labels,
    num_partitions: int,
    alpha: float | Sequence[float] | FloatArray,
    min_partition_size: int = 10,
    self_balancing: bool = False,
    shuffle: bool = True,
    seed: int | None = 42,
) -> Partition:
    """Divide each class among the clients by shares from a Dirichlet distribution.

    For every class ``k``: ``p_k ~ Dirichlet(alpha, ..., alpha)`` over the clients, and client ``i`` gets the samples of
    that class between ``n_k * (p_k1 + ... + p_k,i-1)`` and ``n_k * (p_k1 + ... + p_ki)`` (Yurochkin et al. 2019,
    https://arxiv.org/abs/1905.12022). Both are rounded down after adding the same random number in [0, 1), so that each
    client gets exactly its share on average. Clients with fewer than ``min_partition_size`` samples are then filled
    from the largest clients, so one draw is always enough.

    Shares are drawn as logarithms, so no alpha is too small: in the limit each class goes to one client.

    Args: the labels, then those of :class:`DirichletPartitioner`.

    Example:
        >>> labels = np.repeat([0, 1], 50)
        >>> partition = dirichlet_partition(labels, num_partitions=4, alpha=1e-9, min_partition_size=5)
        >>> int(partition.sizes.min())
        5
    """
    checks.enough_samples(len(labels), num_partitions, min_partition_size)
    alpha = np.broadcast_to(np.asarray(alpha, dtype=np.float64), num_partitions)
    rng = np.random.default_rng(seed)
    order = deal_order(len(labels), shuffle, rng)
    classes, codes = encode_classes(labels)
    members, starts = group(codes, len(classes), order)
    owner = np.empty(len(labels), dtype=np.int64)
    sizes = np.zeros(num_partitions, dtype=np.int64)
    clients = np.arange(num_partitions)
    for samples in np.split(members, starts[1:-1]):
        log_shares = log_gamma(alpha, rng)
        if self_balancing:
            # Not all clients can exceed the average, so some share always stays above zero.
            log_shares[sizes > len(labels) / num_partitions] = -np.inf
        counts = cut(np.exp(log_shares - log_shares.max()), len(samples), rng)
        owner[samples] = np.repeat(clients, counts)
        sizes += counts
    if sizes.min() < min_partition_size:
        _fill_poor(owner, sizes, min_partition_size, order)
    return Partition(*group(owner, num_partitions, order))


def log_gamma(alpha: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Draw logarithms of Gamma(alpha) variables, even if the variables themselves underflow to zero.

    ``log G(a) = log G(a + 1) + log(U) / a`` with ``U`` uniform (Marsaglia and Tsang 2000). Normalised exponentials of
    such draws are Dirichlet distributed.

    Example:
        >>> bool(np.isfinite(log_gamma(np.full(3, 1e-300), np.random.default_rng(0))).all())
        True
    """
    # Below 1e-300 the quotient would overflow; draws are one-hot long before.
    return np.log(rng.standard_gamma(alpha + 1)) - rng.standard_exponential(alpha.shape) / np.maximum(alpha, 1e-300)


def _fill_poor(owner: IntArray, sizes: IntArray, minimum: int, order: IntArray) -> None:
    """Move samples from the largest clients to those below the minimum, in place.

    The largest clients are cut down to the highest common level that suffices. With a random order they give a random
    part of their samples.
    """
    need = np.maximum(minimum - sizes, 0)
    keep = sizes - _gifts(sizes, int(need.sum()))
    samples, offsets = group(owner, len(sizes), order)
    rank = np.arange(len(samples)) - np.repeat(offsets[:-1], sizes)
    given = samples[rank >= np.repeat(keep, sizes)]
    owner[given] = np.repeat(np.arange(len(sizes)), need)


def _gifts(sizes: IntArray, total: int) -> IntArray:
    """Return how many samples each client gives: ``total`` together, with the least possible largest remaining size."""
    descending = np.sort(sizes)[::-1]
    # If the r largest clients are cut to the size of the next one, they give surplus[r - 1] samples together.
    ranks = np.arange(1, len(sizes) + 1)
    following = np.append(descending[1:], 0)
    surplus = np.cumsum(descending) - ranks * following
    r = int(np.argmax(surplus >= total)) + 1
    level = (int(descending[:r].sum()) - total) // r
    gifts = np.maximum(sizes - level, 0)
    # The level is rounded down, so that up to r - 1 samples too many are counted: the first givers keep one more.
    givers = np.flatnonzero(gifts)[: int(gifts.sum()) - total]
    gifts[givers] -= 1
    return gifts


class DirichletPartitioner(Partitioner):
    """Divide each class among the clients by a Dirichlet distribution: the usual model of label skew.

    ``alpha`` sets the skew: 100 is nearly IID, 0.5 is a common choice, 0.01 leaves most clients one class. Any alpha
    works with any number of clients: if the draw leaves a client below ``min_partition_size``, it gets samples from the
    largest clients. All samples are used; the order within a client is random.

    Args:
        num_partitions: number of clients.
        partition_by: column with the labels; None looks in the usual places.
        alpha: concentration, one for all clients or one per client; required.
        min_partition_size: least number of samples of every client.
        self_balancing: a client with more samples than the average gets none of the remaining classes.
        shuffle: False deals the samples of a class in the order of the dataset, and leaves each client's ascending.
        seed: equal seeds give equal partitions.

    Raises:
        ValueError: alpha is missing or not positive, or there are too few samples for ``min_partition_size``.

    Example:
        >>> partitioner = DirichletPartitioner(num_partitions=5, alpha=0.3, min_partition_size=2)
        >>> partitioner.dataset = [0, 1, 2, 3] * 25
        >>> partitioner.partition.num_samples
        100
    """

    def __init__(
        self,
        num_partitions: int,
        partition_by: str | None = None,
        alpha: float | Sequence[float] | FloatArray | None = None,
        min_partition_size: int = 10,
        self_balancing: bool = False,
        shuffle: bool = True,
        seed: int | None = 42,
    ) -> None:
        super().__init__(num_partitions, partition_by)
        checks.given("alpha", alpha, "DirichletPartitioner(num_partitions=10, alpha=0.5)")
        self.alpha = checks.concentration(alpha)
        if np.ndim(self.alpha) and np.size(self.alpha) != num_partitions:
            raise ValueError(
                f"alpha has {np.size(self.alpha)} entries for num_partitions={num_partitions}: pass one per client, or"
                " a single number."
            )
        self.min_partition_size = checks.integer("min_partition_size", min_partition_size, minimum=0)
        checks.seed_value(seed)
        self.self_balancing = self_balancing
        self.shuffle = shuffle
        self.seed = seed

    def _split(self) -> Partition:
        return dirichlet_partition(
            self._labels(),
            self.num_partitions,
            self.alpha,
            self.min_partition_size,
            self.self_balancing,
            self.shuffle,
            self.seed,
        )
