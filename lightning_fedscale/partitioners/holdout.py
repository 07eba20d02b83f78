"""Hold out part of every client's data, or some whole clients, for validation."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.grouping import group
from lightning_fedscale.partitioners.partition import IntArray, Partition, offsets_of


def split(
    partition: Partition, fraction: float, by: Literal["sample", "client"] = "sample", seed: int | None = 42
) -> tuple[Partition, Partition]:
    """Split a partition into one for training and one for validation.

    Both results keep the numbering of the clients: ``num_clients`` stays the same, and a client without samples on one
    side has size 0 there. Samples keep their order.

    ``by="sample"`` measures how well the model serves the clients that trained it: of a client's ``n`` samples,
    ``min(n - 1, floor(n * fraction + 0.5))`` go to validation. Every client keeps at least one sample for training, so
    a client with a single sample has no validation samples. The choice depends on the seed and on the client's own
    samples, never on the other clients.

    ``by="client"`` measures how well the model serves unseen clients: ``floor(clients * fraction + 0.5)`` of the
    clients that have samples go to validation whole, at least one (unless ``fraction`` is 0) and never all of them.
    (LEAF's "split by user".)

    Args:
        partition: the partition to split.
        fraction: share for validation, ``0 <= fraction < 1``.
        by: unit that is drawn, ``"sample"`` or ``"client"``.
        seed: equal seeds give equal splits.

    Returns:
        ``(train, validation)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or ``by="client"`` with a single client.

    Example:
        >>> train, validation = split(Partition.from_lists([[0, 1, 2, 3], [4]]), fraction=0.5)
        >>> train.sizes.tolist(), validation.sizes.tolist()
        ([2, 1], [2, 0])
    """
    checks.whole_partition(partition)
    checks.in_interval("fraction", fraction, 0.0, 1.0, closed_end=False)
    checks.one_of("by", by, ("sample", "client"))
    checks.seed_value(seed)
    held_out = _by_sample(partition, fraction, seed) if by == "sample" else _by_client(partition, fraction, seed)
    return _select(partition, ~held_out), _select(partition, held_out)


def _by_sample(partition: Partition, fraction: float, seed: int | None) -> npt.NDArray[np.bool_]:
    sizes = partition.sizes
    num_held_out = np.minimum(np.floor(sizes * fraction + 0.5).astype(np.int64), np.maximum(sizes - 1, 0))
    client = np.repeat(np.arange(partition.num_clients), sizes)
    # Sort by a hash of (seed, sample), then stably by client: the first few of each client are held out.
    order = np.argsort(_hash(partition.indices, seed), kind="stable")
    by_client, _ = group(client, partition.num_clients, order)
    rank = np.arange(partition.num_samples) - np.repeat(partition.offsets[:-1], sizes)
    held_out = np.zeros(partition.num_samples, dtype=np.bool_)
    held_out[by_client[rank < num_held_out[client]]] = True
    return held_out


def _by_client(partition: Partition, fraction: float, seed: int | None) -> npt.NDArray[np.bool_]:
    candidates = np.flatnonzero(partition.sizes)
    if len(candidates) < 2:
        raise ValueError(
            f"by='client': this needs two clients with samples, and there are {len(candidates)}: pass by='sample'."
        )
    num_held_out = min(int(np.floor(len(candidates) * fraction + 0.5)), len(candidates) - 1)
    if fraction > 0:
        num_held_out = max(num_held_out, 1)
    chosen = np.zeros(partition.num_clients, dtype=np.bool_)
    chosen[np.random.default_rng(seed).choice(candidates, num_held_out, replace=False)] = True
    return np.repeat(chosen, partition.sizes)


def _select(partition: Partition, mask: npt.NDArray[np.bool_]) -> Partition:
    kept = offsets_of(mask)
    return Partition(partition.indices[mask], kept[partition.offsets])


def _hash(samples: IntArray, seed: int | None) -> npt.NDArray[np.uint64]:
    """Hash each sample position by SplitMix64: one random number per sample, without a generator per client."""
    x = samples.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.random.SeedSequence(seed).generate_state(1, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
