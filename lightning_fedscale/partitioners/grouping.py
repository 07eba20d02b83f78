"""Array functions that all partitioners share.

Every partitioner is a function from samples to clients, ``owner[sample] = client`` (-1: no client). Grouping the
samples by owner is the same for all of them. The order in which samples are dealt is also their order within a client:
random if ``shuffle=True``, ascending otherwise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners.partition import IntArray, offsets_of


def deal_order(num_samples: int, shuffle: bool, rng: np.random.Generator) -> IntArray:
    """Return the order in which samples are dealt: a random one, or ``0, 1, 2, ...``."""
    return rng.permutation(num_samples) if shuffle else np.arange(num_samples)


def group(owner: IntArray, num_groups: int, order: IntArray | None = None) -> tuple[IntArray, IntArray]:
    """Group samples by owner.

    Args:
        owner: the group of each sample, ``0 .. num_groups - 1``, or -1 for a sample that is left out.
        num_groups: number of groups; some may be empty.
        order: the order in which samples appear within their group; None keeps them ascending.

    Returns:
        ``(indices, offsets)`` as in :class:`~lightning_fedscale.partitioners.Partition`.

    Example:
        >>> group(np.array([1, 0, -1, 1]), num_groups=2)
        (array([1, 0, 3]), array([0, 1, 3]))
    """
    keys = owner if order is None else owner[order]
    keys = np.where(keys < 0, num_groups, keys)
    sizes = np.bincount(keys, minlength=num_groups + 1)[:num_groups]
    # NumPy sorts 16-bit integers by radix, in linear time; a stable sort keeps `order` within each group.
    narrow = np.uint16 if num_groups < 2**16 else np.int32 if num_groups < 2**31 else np.int64
    positions = np.argsort(keys.astype(narrow), kind="stable")[: sizes.sum()]
    return (positions if order is None else order[positions]), offsets_of(sizes)


def even_sizes(num_samples: int, num_groups: int) -> IntArray:
    """Cut ``num_samples`` into groups whose sizes differ by at most one, the larger first.

    Example:
        >>> even_sizes(8, 3)
        array([3, 3, 2])
    """
    small, extra = divmod(num_samples, num_groups)
    return small + (np.arange(num_groups) < extra).astype(np.int64)


def cut(shares: npt.NDArray[np.float64], num_samples: int, rng: np.random.Generator) -> IntArray:
    """Cut ``num_samples`` into numbers in proportion to shares, rounded so that each is right on average.

    Args:
        shares: numbers >= 0, not all of them 0; they need not add up to 1.
        num_samples: sum of the numbers.
        rng: decides who gets the remainder of the rounding.

    Example:
        >>> cut(np.array([1.0, 0.0, 3.0]), 8, np.random.default_rng(0)).tolist()
        [2, 0, 6]
    """
    ends = np.cumsum(shares)
    # Without the random offset the last client would get the remainder of every class: one sample too many of each,
    # which is most of its data if there are many clients.
    cuts = np.minimum(ends * (num_samples / ends[-1]) + rng.random(), num_samples).astype(np.int64)
    cuts[-1] = num_samples
    counts: IntArray = np.diff(cuts, prepend=0)
    return counts
