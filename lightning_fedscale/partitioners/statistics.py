"""Statistics of a partition: how heterogeneous the clients are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.partition import IntArray, Partition

_MAX_CELLS = 1 << 27


class Heterogeneity(NamedTuple):
    """Summary of a partition: label skew, size skew, and basic counts."""

    mean_js_distance: float
    """Mean over the clients of the Jensen-Shannon distance to the overall label mix, 0 (iid) to 1."""
    size_gini: float
    """Gini coefficient of the sizes, 0 (equal) to nearly 1 (one client has everything)."""
    mean_num_labels: float
    """Mean number of different labels of a client."""
    min_size: int
    """Samples of the smallest client."""
    max_size: int
    """Samples of the largest client."""
    num_empty: int
    """Clients without samples; the means leave them out."""


def label_counts(partition: Partition, labels: npt.ArrayLike, max_clients: int | None = None) -> IntArray:
    """Count the samples of each label that each client has.

    Args:
        partition: the partition.
        labels: label of every sample of the dataset.
        max_clients: count only this many clients, the first ones.

    Returns:
        ``clients x classes``, the classes in sorted order of the labels.

    Raises:
        ValueError: the labels do not fit the partition, or the table would exceed a gigabyte.

    Example:
        >>> label_counts(Partition.from_lists([[0, 1], [2]]), ["cat", "dog", "dog"])
        array([[1, 1],
               [0, 1]])
    """
    classes, codes = _encode(partition, labels)
    num_clients = partition.num_clients if max_clients is None else min(max_clients, partition.num_clients)
    if num_clients * len(classes) > _MAX_CELLS:
        raise ValueError(
            f"max_clients={max_clients}: a table of {num_clients} clients x {len(classes)} classes exceeds a gigabyte:"
            f" pass at most {_MAX_CELLS // len(classes)}."
        )
    end = partition.offsets[num_clients]
    client = np.repeat(np.arange(num_clients), partition.sizes[:num_clients])
    cells = client * len(classes) + codes[partition.indices[:end]]
    return np.bincount(cells, minlength=num_clients * len(classes)).reshape(num_clients, len(classes))


def js_distances(partition: Partition, labels: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the Jensen-Shannon distance of each client's label mix to the mix of all partitioned samples.

    It is ``sqrt(KL(p || m) / 2 + KL(q || m) / 2)`` with ``m = (p + q) / 2`` and logarithms to base 2: the square root
    of the divergence, as in :func:`scipy.spatial.distance.jensenshannon` with ``base=2``, between 0 and 1 (Endres and
    Schindelin 2003). It is NaN for a client without samples. Memory grows with the samples, not with clients times
    classes.

    Example:
        >>> js_distances(Partition.from_lists([[0, 1], [2, 3]]), [0, 1, 0, 1])
        array([0., 0.])
    """
    return _js_distances(partition, *_cells(partition, labels))


def js_distance(partition: Partition, labels: npt.ArrayLike) -> float:
    """Return the mean of :func:`js_distances` over the clients that have samples: one number for label skew.

    Every client counts the same, whatever its size.

    Example:
        >>> round(js_distance(Partition.from_lists([[0], [1]]), [0, 1]), 4)
        0.5579
    """
    return float(np.nanmean(js_distances(partition, labels)))


def gini(sizes: npt.ArrayLike) -> float:
    """Return the Gini coefficient of the sizes, ``sum_ij |x_i - x_j| / (2 n^2 mean(x))``: one number for size skew.

    It is 0 if all are equal (even all zero) and ``1 - 1 / n`` if one of ``n`` has everything.

    Raises:
        ValueError: there are no sizes, or one is negative.

    Example:
        >>> gini([1, 1, 1]), gini([0, 0, 0, 8])
        (0.0, 0.75)
    """
    ordered = np.sort(np.asarray(sizes, dtype=np.float64).ravel())
    if not len(ordered) or ordered[0] < 0:
        raise ValueError(f"sizes={sizes!r}: pass at least one size, each of at least 0.")
    total = ordered.sum()
    if total == 0:
        return 0.0
    n = len(ordered)
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * total))


def heterogeneity(partition: Partition, labels: npt.ArrayLike) -> Heterogeneity:
    """Summarise how heterogeneous the clients are.

    Example:
        >>> result = heterogeneity(Partition.from_lists([[0], [1, 2, 3]]), [0, 1, 1, 1])
        >>> result.size_gini, result.mean_num_labels, result.max_size
        (0.25, 1.0, 3)
    """
    cell_client, cell_class, cell_count = _cells(partition, labels)
    sizes = partition.sizes
    num_filled = int(np.count_nonzero(sizes))
    return Heterogeneity(
        mean_js_distance=float(np.nanmean(_js_distances(partition, cell_client, cell_class, cell_count))),
        size_gini=gini(sizes),
        mean_num_labels=len(cell_client) / num_filled,
        min_size=int(sizes.min()),
        max_size=int(sizes.max()),
        num_empty=len(sizes) - num_filled,
    )


def _encode(partition: Partition, labels: npt.ArrayLike) -> tuple[npt.NDArray[Any], IntArray]:
    checks.whole_partition(partition)
    labels = np.asarray(labels)
    needed = int(partition.indices.max()) + 1 if partition.num_samples else 1
    if labels.ndim != 1 or len(labels) < needed:
        raise ValueError(
            f"labels have shape {labels.shape}, and the partition has sample {needed - 1}: pass the label of every"
            " sample of the dataset, such as find_labels(dataset)."
        )
    return encode_classes(labels)


def _cells(partition: Partition, labels: npt.ArrayLike) -> tuple[IntArray, IntArray, IntArray]:
    """Return the non-zero cells of the table of label counts: ``(client, class, count)``."""
    checks.whole_partition(partition)
    if not partition.num_samples:
        raise ValueError(
            "partition: no client has a sample, so there are no label mixes to compare: pass another partition."
        )
    classes, codes = _encode(partition, labels)
    client = np.repeat(np.arange(partition.num_clients), partition.sizes)
    cells, counts = np.unique(client * len(classes) + codes[partition.indices], return_counts=True)
    return cells // len(classes), cells % len(classes), counts.astype(np.int64)


def _js_distances(
    partition: Partition, cell_client: IntArray, cell_class: IntArray, cell_count: IntArray
) -> npt.NDArray[np.float64]:
    totals = np.bincount(cell_class, weights=cell_count)
    q = (totals / totals.sum())[cell_class]
    p = cell_count / partition.sizes[cell_client]
    m = (p + q) / 2
    # A class that the client lacks has p = 0, m = q / 2 and adds q * log2(2) = q; all of them add 1 - sum(other q).
    terms = p * np.log2(p / m) + q * np.log2(q / m) - q
    divergence = (1 + np.bincount(cell_client, weights=terms, minlength=partition.num_clients)) / 2
    return np.where(partition.sizes > 0, np.sqrt(np.clip(divergence, 0, 1)), np.nan)
