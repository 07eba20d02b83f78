"""Further data, such as a validation set, goes to the clients that hold its like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedscale.partitioners import (
    ContinuousPartitioner,
    DirichletPartitioner,
    FinishedPartitioner,
    GroupedNaturalIdPartitioner,
    IidPartitioner,
    LinearPartitioner,
    NaturalIdPartitioner,
    Partition,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
    alike_by_labels,
    alike_by_size,
)


def labels_of(samples: int, seed: int = 0, classes: int = 5) -> Any:
    return np.random.default_rng(seed).integers(0, classes, samples)


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, 300), st.floats(0.05, 10))
def test_every_client_gets_of_every_class_its_share_rounded(seed: int, clients: int, others: int, alpha: float) -> None:
    labels, further = labels_of(200, seed), labels_of(others, seed + 1)
    partitioner = DirichletPartitioner(clients, alpha=alpha, min_partition_size=1)
    partitioner.dataset = labels
    divided = alike_by_labels(partitioner.partition, labels, further, seed)
    for label in range(5):
        held = np.array([(labels[partitioner.partition.client(k)] == label).sum() for k in range(clients)])
        got = np.array([(further[divided.client(k)] == label).sum() for k in range(clients)])
        there = (further == label).sum()
        if held.sum():
            assert got.sum() == there
            assert (np.abs(got - there * held / held.sum()) < 1 + 1e-9).all()
            assert (got[held == 0] == 0).all()
        else:
            assert got.sum() == 0
    assert len(np.unique(divided.indices)) == len(divided.indices)


def test_rounding_is_right_on_average() -> None:
    partition = Partition.from_lists([[0], [1, 2], [3, 4, 5]])
    sizes = np.mean([alike_by_size(partition, 4, seed).sizes for seed in range(4000)], axis=0)
    np.testing.assert_allclose(sizes, [4 / 6, 8 / 6, 12 / 6], atol=0.05)


@pytest.mark.parametrize(
    "partitioner",
    [
        PathologicalPartitioner(num_partitions=4, num_classes_per_partition=2),
        ShardPartitioner(num_partitions=4, num_shards_per_partition=2),
        DirichletPartitioner(4, alpha=0.1),
    ],
)
def test_clients_find_the_classes_that_they_hold(partitioner: Partitioner) -> None:
    labels, further = np.random.default_rng(0).permutation(400) % 5, np.arange(4000) % 5
    partitioner.dataset = labels
    divided = partitioner.divide_alike(further)
    assert divided.num_clients == 4
    for client in range(4):
        mine = np.bincount(labels[partitioner.load_partition(client)], minlength=5)
        got = np.bincount(further[divided.client(client)], minlength=5)
        np.testing.assert_allclose(got / got.sum(), mine / mine.sum(), atol=0.01)


@pytest.mark.parametrize("partitioner", [IidPartitioner(4), LinearPartitioner(4)])
def test_where_labels_do_not_decide_sizes_do(partitioner: Partitioner) -> None:
    partitioner.dataset = labels_of(400)
    divided = partitioner.divide_alike([("no", "label", {})] * 40)
    np.testing.assert_allclose(divided.sizes, partitioner.partition.sizes / 10, atol=1)


@pytest.mark.parametrize(
    "training",
    [
        [{"input_ids": [1, 2]}] * 8,  # no labels
        [([1, 2], 0.5 * i) for i in range(8)],  # no classes
        [([1, 2], [3, 4])] * 8,  # not one for each sample
    ],
)
def test_a_partition_of_data_without_classes_goes_by_sizes(training: list[Any]) -> None:
    partitioner = FinishedPartitioner(Partition.from_lists([[0, 1], range(2, 8)]))
    partitioner.dataset = training
    assert partitioner.divide_alike(training * 2).sizes.tolist() == [4, 12]
    by_name = FinishedPartitioner(partitioner.partition, partition_by="label")
    by_name.dataset = training
    with pytest.raises(ValueError, match="partition_by='label'"):
        by_name.divide_alike(training)


def test_a_partition_of_classes_goes_by_these() -> None:
    partitioner = FinishedPartitioner(Partition.from_lists([[0, 1], [2, 3]]))
    partitioner.dataset = [0, 0, 1, 1]
    assert [sorted(partitioner.divide_alike([1, 0, 1]).client(k).tolist()) for k in range(2)] == [[1], [0, 2]]
    with pytest.raises(ValueError, match=r"partition_by=None: .* in sample 0"):
        partitioner.divide_alike([(1,), (0,)])


def test_natural_ids_keep_their_clients() -> None:
    one = NaturalIdPartitioner()
    one.dataset = ["eve", "bob", "ann", "eve"]
    divided = one.divide_alike(["zoe", "eve", "eve", "ann"])
    assert [divided.client(k).tolist() for k in range(3)] == [[3], [], [1, 2]]
    several = GroupedNaturalIdPartitioner(group_size=2)
    several.dataset = ["eve", "bob", "ann", "eve"]
    divided = several.divide_alike(["zoe", "eve", "bob", "ann"])
    assert [divided.client(k).tolist() for k in range(2)] == [[1, 2], [3]]


def test_a_property_goes_by_its_value() -> None:
    rng = np.random.default_rng(0)
    partitioner = ContinuousPartitioner(num_partitions=4, strictness=1.0)
    partitioner.dataset = rng.normal(size=400)
    further = rng.normal(size=400)
    divided = partitioner.divide_alike(further)
    for client in range(3):
        assert further[divided.client(client)].max() <= further[divided.client(client + 1)].min() + 0.2


def test_without_a_dataset_there_is_nothing_to_be_like() -> None:
    with pytest.raises(AttributeError, match="has no dataset"):
        IidPartitioner(2).divide_alike([1, 2])
