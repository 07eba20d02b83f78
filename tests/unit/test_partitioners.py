"""Every partitioner: what always holds, cases to check by hand, and what is said about wrong arguments."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from lightning_fedscale import partitioners as room
from lightning_fedscale.partitioners import (
    ContinuousPartitioner,
    DirichletPartitioner,
    DistributionPartitioner,
    ExponentialPartitioner,
    GroupedNaturalIdPartitioner,
    IdToSizeFncPartitioner,
    IidPartitioner,
    InnerDirichletPartitioner,
    LinearPartitioner,
    NaturalIdPartitioner,
    Partition,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
    SizePartitioner,
    SquarePartitioner,
    by_name,
    check_partition,
)
from tests.ids import stable

property_test = settings(max_examples=40, deadline=None)


def run(partitioner: Partitioner, dataset: Any) -> Partition:
    partitioner.dataset = dataset
    return partitioner.partition


def global_generator() -> list[int]:
    return np.random.get_state(legacy=False)["state"]["key"].tolist()


def histograms(partition: Partition, labels: Any) -> list[dict[Any, int]]:
    labels = np.asarray(labels)
    pairs = [np.unique(labels[partition.client(i)], return_counts=True) for i in range(len(partition))]
    return [dict(zip(values.tolist(), counts.tolist(), strict=True)) for values, counts in pairs]


label_lists = st.lists(st.integers(0, 4), min_size=6, max_size=80)

# Each of these uses all samples, of any labels, with up to six clients.
COVERING: dict[str, Callable[[int, int], Partitioner]] = {
    "iid": lambda k, seed: IidPartitioner(k, seed=seed),
    "iid in order": lambda k, seed: IidPartitioner(k, shuffle=False, seed=seed),
    "dirichlet": lambda k, seed: DirichletPartitioner(k, alpha=0.3, min_partition_size=1, seed=seed),
    "dirichlet tiny": lambda k, seed: DirichletPartitioner(k, alpha=1e-9, min_partition_size=1, seed=seed),
    "dirichlet balancing": lambda k, seed: DirichletPartitioner(
        k, alpha=0.1, min_partition_size=1, self_balancing=True, shuffle=False, seed=seed
    ),
    "shard by size": lambda k, seed: ShardPartitioner(k, shard_size=1, seed=seed),
    "shard by number": lambda k, seed: ShardPartitioner(
        k, num_shards_per_partition=1, keep_incomplete_shard=True, seed=seed
    ),
    "continuous": lambda k, seed: ContinuousPartitioner(k, strictness=0.0, seed=seed),
    "constant size": lambda k, seed: IdToSizeFncPartitioner(k, np.ones_like, seed=seed),
    "natural": lambda k, seed: NaturalIdPartitioner(),
    "grouped": lambda k, seed: GroupedNaturalIdPartitioner(group_size=k),
    "grouped bigger": lambda k, seed: GroupedNaturalIdPartitioner(group_size=1, mode="allow-bigger"),
}


@pytest.mark.parametrize("name", COVERING)
@property_test
@given(labels=label_lists, num_partitions=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_covering_disjoint_deterministic(name: str, labels: list[int], num_partitions: int, seed: int) -> None:
    partitioner = COVERING[name](num_partitions, seed)
    partition = run(partitioner, labels)
    assert partition.covers(len(labels))
    assert partition.sizes.min() >= 1
    assert partitioner.num_partitions == partition.num_clients
    if "natural" not in name and "grouped" not in name:
        assert partition.num_clients == num_partitions
    assert run(COVERING[name](num_partitions, seed), np.array(labels)) == partition
    for i in range(len(partition)):
        assert partitioner.load_partition(i).tolist() == partition.client(i).tolist()
        assert partitioner.load_partition(i).dtype == np.int64
        if not getattr(partitioner, "shuffle", False):
            assert (np.diff(partition.client(i)) > 0).all()


def seeded() -> list[Partitioner]:
    return [
        IidPartitioner(5),
        DirichletPartitioner(5, alpha=0.5),
        InnerDirichletPartitioner([40] * 5, alpha=0.5),
        PathologicalPartitioner(5, num_classes_per_partition=2, class_assignment_mode="deterministic"),
        ShardPartitioner(5, num_shards_per_partition=2),
        DistributionPartitioner(np.ones((5, 2)), 5, 2, preassigned_num_samples_per_label=1),
        ContinuousPartitioner(5, strictness=0.5),
        SizePartitioner([40] * 5),
        LinearPartitioner(5),
        SquarePartitioner(5),
        ExponentialPartitioner(5),
        IdToSizeFncPartitioner(5, np.sqrt),
    ]


@pytest.mark.parametrize("partitioner", seeded(), ids=stable)
def test_seed_shuffle_and_the_global_generator(partitioner: Any) -> None:
    labels = np.repeat(np.arange(5), 40)
    before = global_generator()
    first = run(partitioner, labels)
    assert global_generator() == before
    assert first.covers(200)
    assert any((np.diff(first.client(i)) < 0).any() for i in range(5)), "the order within a client must be random"
    partitioner.seed = 43
    assert run(partitioner, labels) != first
    partitioner.seed = 42
    assert run(partitioner, labels) == first
    partitioner.shuffle = False
    ordered = run(partitioner, labels)
    assert all((np.diff(ordered.client(i)) > 0).all() for i in range(5))


@pytest.mark.parametrize("partitioner", seeded(), ids=stable)
def test_arrays_and_datasets_give_the_same(partitioner: Partitioner) -> None:
    labels = torch.arange(5).repeat(40)
    dataset = Subset(TensorDataset(torch.zeros(400), torch.cat([labels, labels])), range(200))
    assert run(partitioner, dataset) == run(partitioner, labels.numpy())


def test_another_dataset_starts_afresh() -> None:
    partitioner = NaturalIdPartitioner()
    partitioner.dataset = ["b", "a", "b"]
    assert partitioner.num_partitions == 2
    partitioner.dataset = ["c"]
    assert (partitioner.num_partitions, partitioner.partition_id_to_natural_id) == (1, {0: "c"})


def test_the_partition_is_computed_once_and_late() -> None:
    calls = []

    class Counting(IidPartitioner):
        def _split(self) -> Partition:
            calls.append(1)
            return super()._split()

    partitioner = Counting(2)
    partitioner.dataset = [0, 1, 2]
    assert (partitioner.num_partitions, calls) == (2, [])
    assert partitioner.partition is partitioner.partition
    partitioner.load_partition(1)
    assert calls == [1]


def test_without_a_dataset() -> None:
    with pytest.raises(AttributeError, match="IidPartitioner has no dataset"):
        IidPartitioner(2).load_partition(0)


def test_iid_sizes_and_mix() -> None:
    labels = np.repeat([0, 1], 5000)
    partition = run(IidPartitioner(3), labels)
    assert partition.sizes.tolist() == [3334, 3333, 3333]
    for i in range(3):  # A contiguous cut would give a share of 0 or 1 somewhere.
        assert abs(labels[partition.client(i)].mean() - 0.5) < 0.05


# Dirichlet


@property_test
@given(
    labels=label_lists,
    num_partitions=st.integers(1, 6),
    log_alpha=st.floats(-320, 20),
    minimum=st.integers(0, 3),
    balancing=st.booleans(),
)
def test_dirichlet_always_ends(
    labels: list[int], num_partitions: int, log_alpha: float, minimum: int, balancing: bool
) -> None:
    alpha = max(10.0**log_alpha, 5e-324)
    partitioner = DirichletPartitioner(num_partitions, None, alpha, minimum, balancing)
    if num_partitions * minimum > len(labels):
        with pytest.raises(ValueError, match=f"min_partition_size={minimum} with num_partitions={num_partitions}"):
            run(partitioner, labels)
        return
    partition = run(partitioner, labels)
    assert partition.covers(len(labels))
    assert partition.sizes.min() >= minimum


def test_dirichlet_repair_of_a_thousand_poor_clients() -> None:
    """FedLab #232, #230 hang here; flwr-datasets gives up after ten draws."""
    labels = np.repeat(np.arange(10), 500)
    partition = run(DirichletPartitioner(1000, alpha=0.01, min_partition_size=1), labels)
    assert partition.covers(5000)
    assert partition.sizes.min() == 1
    exact = run(DirichletPartitioner(1000, alpha=0.01, min_partition_size=5), labels)
    assert set(exact.sizes.tolist()) == {5}


def test_dirichlet_repair_takes_from_the_largest_only() -> None:
    labels = np.repeat(np.arange(8), 100)
    free = run(DirichletPartitioner(20, alpha=0.1, min_partition_size=0), labels).sizes
    repaired = run(DirichletPartitioner(20, alpha=0.1, min_partition_size=10), labels).sizes
    assert free.min() < 10
    assert (repaired[free < 10] == 10).all()
    gave = repaired < free
    kept = (free >= 10) & ~gave
    assert gave.any()
    assert kept.any()
    # All that gave are cut to one level, and nobody who gave nothing is above it.
    assert np.ptp(repaired[gave]) <= 1
    assert free[kept].max() <= repaired[gave].min() + 1


def test_dirichlet_limits() -> None:
    labels = np.repeat(np.arange(10), 1000)
    nearly_iid = room.js_distance(run(DirichletPartitioner(10, alpha=1e6), labels), labels)
    skewed = room.js_distance(run(DirichletPartitioner(10, alpha=0.1), labels), labels)
    assert nearly_iid < 0.02 < 0.3 < skewed
    one_hot = run(DirichletPartitioner(10, alpha=1e-300, min_partition_size=0), labels)
    assert set(one_hot.sizes.tolist()) <= {1000 * k for k in range(11)}


def test_dirichlet_shares_have_the_right_moments() -> None:
    """Mean 1/K and variance (1/K)(1 - 1/K)/(K alpha + 1) of a client's share of a class."""
    num_clients, alpha = 4, 0.5
    labels = np.repeat(np.arange(500), 1000)
    counts = room.label_counts(run(DirichletPartitioner(num_clients, alpha=alpha), labels), labels) / 1000
    mean, variance = 1 / num_clients, (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
    assert counts.mean(axis=1) == pytest.approx([mean] * num_clients, abs=0.05)
    assert counts.var(axis=1) == pytest.approx([variance] * num_clients, rel=0.25)


def test_dirichlet_favours_no_client() -> None:
    """Rounding down at every cut gave the last client one sample of each class: 100 instead of 20."""
    labels = np.arange(20_000) % 100
    sizes = np.stack([run(DirichletPartitioner(1000, None, 0.5, 0, seed=s), labels).sizes for s in range(20)])
    # The mean of 20 draws has a deviation of about 1.4 here.
    assert abs(sizes[:, -1].mean() - 20) < 6
    assert abs(sizes[:, 0].mean() - 20) < 6


def test_dirichlet_alpha_per_client() -> None:
    labels = np.repeat(np.arange(10), 200)
    sizes = run(DirichletPartitioner(3, alpha=[1.0, 100.0, 1000.0], min_partition_size=0), labels).sizes
    assert sizes[0] < sizes[1] < sizes[2]


def test_dirichlet_self_balancing_limits_sizes() -> None:
    labels = np.repeat(np.arange(50), 40)
    free = run(DirichletPartitioner(10, alpha=0.1, min_partition_size=0), labels).sizes
    balanced = run(DirichletPartitioner(10, alpha=0.1, min_partition_size=0, self_balancing=True), labels).sizes
    # Nobody takes part once above the average, so nobody exceeds it by more than one class.
    assert balanced.max() <= 200 + 40 < free.max()


# InnerDirichlet


@property_test
@given(labels=label_lists, fractions=st.lists(st.integers(0, 5), min_size=1, max_size=6), log_alpha=st.floats(-300, 10))
def test_inner_dirichlet_sizes_are_exact(labels: list[int], fractions: list[int], log_alpha: float) -> None:
    """flower #4377: NaN as soon as the classes that a client prefers are used up."""
    sizes = [f * len(labels) // max(sum(fractions), 1) for f in fractions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        partition = run(InnerDirichletPartitioner(sizes, alpha=10.0**log_alpha), labels)
    assert partition.sizes.tolist() == sizes
    check_partition(partition, len(labels))


def test_inner_dirichlet_skew_and_alpha_per_class() -> None:
    labels = np.repeat(np.arange(10), 1000)
    with pytest.warns(UserWarning, match="partition_sizes add up to 2000, .*8000 of 10000 samples"):
        skewed = run(InnerDirichletPartitioner([100] * 20, alpha=1e-6), labels)
    assert [len(h) for h in histograms(skewed, labels)] == [1] * 20
    even = run(InnerDirichletPartitioner([1000] * 10, alpha=1e6), labels)
    assert room.js_distance(even, labels) < 0.1
    with pytest.warns(UserWarning, match="belong to no client"):
        first = run(InnerDirichletPartitioner([10] * 5, alpha=[1e6] + [1e-3] * 9), labels)
    assert histograms(first, labels) == [{0: 10}] * 5
    with pytest.raises(ValueError, match="alpha has 2 entries for 10 classes"):
        run(InnerDirichletPartitioner([1000] * 10, alpha=[0.5, 0.5]), labels)


# Pathological


@property_test
@given(
    num_partitions=st.integers(1, 12),
    num_classes=st.integers(1, 5),
    mode=st.sampled_from(["random", "deterministic", "first-deterministic"]),
    seed=st.integers(0, 99),
)
def test_pathological_has_exactly_so_many_classes(num_partitions: int, num_classes: int, mode: Any, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(list("abcde"), [12, 13, 20, 31, 12]))
    partitioner = PathologicalPartitioner(num_partitions, None, num_classes, mode, seed=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        partition = run(partitioner, labels)
    held = histograms(partition, labels)
    assert [len(h) for h in held] == [num_classes] * num_partitions
    used = set().union(*held)
    check_partition(partition, len(labels))
    assert partition.num_samples == np.isin(labels, list(used)).sum()
    missing = sorted(set("abcde") - used)
    assert [str(missing) in str(w.message) for w in caught] == [True] * bool(missing)
    for label in used:  # Each class is cut evenly.
        parts = [h[label] for h in held if label in h]
        assert max(parts) - min(parts) <= 1
    for i, h in enumerate(held):
        if mode == "first-deterministic":
            assert "abcde"[i % 5] in h
        if mode == "deterministic":
            assert set(h) == {"abcde"[(i + j) % 5] for j in range(num_classes)}


def test_pathological_chooses_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(5), 100)
    for mode in ("random", "first-deterministic"):
        monkeypatch.undo()
        whole = run(PathologicalPartitioner(17, None, 3, mode), labels)
        monkeypatch.setattr("lightning_fedscale.partitioners.pathological._BLOCK", 20)
        assert run(PathologicalPartitioner(17, None, 3, mode), labels) == whole


def test_pathological_errors() -> None:
    with pytest.raises(ValueError, match=r"num_classes_per_partition=3: .* 2"):
        run(PathologicalPartitioner(2, None, 3), [0, 1, 0])
    with pytest.raises(ValueError, match="3 clients share class 1, which has 1 samples: lower one"):
        run(PathologicalPartitioner(3, None, 2), [0, 0, 0, 1])


# Shard


@property_test
@given(labels=label_lists, num_partitions=st.integers(1, 5), shards=st.integers(1, 3), keep=st.booleans())
def test_shards_by_number(labels: list[int], num_partitions: int, shards: int, keep: bool) -> None:
    partitioner = ShardPartitioner(num_partitions, None, shards, keep_incomplete_shard=keep)
    if num_partitions * shards > len(labels):
        with pytest.raises(ValueError, match=f"num_shards_per_partition={shards} with num_partitions={num_partitions}"):
            run(partitioner, labels)
        return
    partition = run(partitioner, labels)
    check_partition(partition, len(labels))
    size = len(labels) // (num_partitions * shards)
    if keep:
        assert partition.covers(len(labels))
        assert np.ptp(partition.sizes) <= shards
    else:
        assert partition.sizes.tolist() == [shards * size] * num_partitions


@property_test
@given(labels=label_lists, num_partitions=st.integers(1, 5), size=st.integers(1, 10), keep=st.booleans())
def test_shards_by_size(labels: list[int], num_partitions: int, size: int, keep: bool) -> None:
    partitioner = ShardPartitioner(num_partitions, shard_size=size, keep_incomplete_shard=keep)
    num_shards = -(-len(labels) // size) if keep else len(labels) // size
    if num_shards < num_partitions:
        with pytest.raises(ValueError, match=f"shard_size={size}: {len(labels)} samples give {num_shards} shards"):
            run(partitioner, labels)
        return
    partition = run(partitioner, labels)
    check_partition(partition, len(labels))
    assert partition.num_samples == (len(labels) if keep else num_shards * size)
    if not keep:
        expected = [num_shards // num_partitions + (i < num_shards % num_partitions) for i in range(num_partitions)]
        assert partition.sizes.tolist() == [size * n for n in expected]


def test_shards_are_consecutive_in_the_sorted_dataset() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 10))
    partition = run(ShardPartitioner(10, num_shards_per_partition=2, shard_size=10), labels)
    # Shards of the size of a class hold one class each.
    assert [sorted(h.values()) for h in histograms(partition, labels)] == [[10, 10]] * 10
    with pytest.raises(ValueError, match=r"400 samples, .* 200"):
        run(ShardPartitioner(20, num_shards_per_partition=2, shard_size=10), labels)


# Distribution


def test_distribution_by_hand() -> None:
    labels = np.array(["a"] * 20 + ["b"] * 30)
    table = np.array([[1.0, 3.0], [0.0, 1.0]])
    partition = run(DistributionPartitioner(table, 2, 2, None, 2), labels)
    # Of 20 "a", 2 + 2 are fixed and 16 go 1:3; of 30 "b", 2 + 2 are fixed and 26 go 0:1.
    assert histograms(partition, labels) == [{"a": 6, "b": 2}, {"a": 14, "b": 28}]
    counts = DistributionPartitioner(np.array([[5, 6], [7, 8]]), 4, 1, None, 0, rescale=False)
    assert histograms(run(counts, labels), labels) == [{"a": 5}, {"b": 7}, {"a": 6}, {"b": 8}]


@property_test
@given(
    multiple=st.integers(1, 4), per_partition=st.integers(1, 3), preassigned=st.integers(0, 2), seed=st.integers(0, 9)
)
def test_distribution_uses_everything(multiple: int, per_partition: int, preassigned: int, seed: int) -> None:
    labels = np.repeat([0, 1, 2], [40, 50, 60])
    table = np.random.default_rng(seed).lognormal(0, 2, size=(3, per_partition * multiple))
    partition = run(DistributionPartitioner(table, 3 * multiple, per_partition, None, preassigned), labels)
    assert partition.covers(150)
    for i, held in enumerate(histograms(partition, labels)):
        assert set(held) <= {(i + j) % 3 for j in range(per_partition)}
        if preassigned:
            assert len(held) == per_partition
            assert min(held.values()) >= preassigned


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.ones((2, 1)), 3, 1, None, 0), "num_partitions=3: .*multiple .* 2"),
        ((np.ones((2, 1)), 2, 3, None, 0), "num_unique_labels_per_partition=3: .* 2"),
        ((np.ones((2, 3)), 2, 1, None, 0), r"distribution_array has shape \(2, 3\): pass \(2, 1\)"),
        ((np.ones((2, 2)), 4, 1, None, 4), "preassigned_num_samples_per_label=4: 2 clients share a class of 5 samples"),
        ((np.full((2, 1), 9), 2, 1, None, 0, False), "class 0 takes 9 samples, .* 5"),
    ],
)
def test_distribution_errors(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(DistributionPartitioner(*args), np.repeat([0, 1], 5))


# Continuous


def test_continuous_strictness() -> None:
    values = np.random.default_rng(0).permutation(np.linspace(-3, 8, 1000))
    strict = run(ContinuousPartitioner(4, strictness=1.0), values)
    lows, highs = zip(
        *[(values[strict.client(i)].min(), values[strict.client(i)].max()) for i in range(4)], strict=True
    )
    assert all(high < low for high, low in zip(highs[:-1], lows[1:], strict=True))
    spreads = []
    for strictness in (0.0, 0.5, 1.0):
        partition = run(ContinuousPartitioner(4, strictness=strictness), values)
        assert partition.sizes.tolist() == [250] * 4
        spreads.append(np.std([values[partition.client(i)].mean() for i in range(4)]))
    assert spreads[0] < 0.5 < spreads[1] < spreads[2]


@pytest.mark.parametrize("strictness", [0.2, 0.5, 0.8])
def test_continuous_blend(strictness: float) -> None:
    """Property and blend have the correlation s / sqrt(s^2 + (1 - s)^2), whatever the scale of the property."""
    z = np.random.default_rng(0).standard_normal(20_000)
    partition = run(ContinuousPartitioner(4, strictness=strictness), 1000 * z - 5)
    correlation = strictness / np.hypot(strictness, 1 - strictness)
    # The mean of the top quarter of a normal variable is 1.271.
    assert z[partition.client(3)].mean() == pytest.approx(1.271 * correlation, abs=0.04)


def test_continuous_errors() -> None:
    with pytest.raises(ValueError, match=r"property of sample 1 is nan"):
        run(ContinuousPartitioner(2, strictness=0.5), [0.0, np.nan, 1.0])
    with pytest.raises(ValueError, match=r"strictness=0.5: all values of the property are equal"):
        run(ContinuousPartitioner(2, strictness=0.5), [0.1] * 7)
    assert run(ContinuousPartitioner(2, strictness=0.0), [0.1] * 7).covers(7)
    with pytest.raises(ValueError, match="ContinuousPartitioner needs numbers"):
        run(ContinuousPartitioner(2, strictness=0.5), ["a", "b"])


# Sizes


def test_size_and_what_is_left_over() -> None:
    with pytest.warns(UserWarning, match="partition_sizes add up to 6, .*4 of 10 samples"):
        partition = run(SizePartitioner([1, 2, 3]), range(10))
    assert partition.sizes.tolist() == [1, 2, 3]
    check_partition(partition, 10)
    with pytest.raises(ValueError, match="partition_sizes add up to 6, and there are 5 samples"):
        run(SizePartitioner([1, 2, 3]), range(5))


@property_test
@given(unit=st.integers(1, 50), num_partitions=st.integers(1, 60))
def test_sizes_by_id_are_exact_for_whole_numbers(unit: int, num_partitions: int) -> None:
    """49 * (1 / 49) < 1: in the other order a client of 49 with one sample each would have none."""
    num_samples = unit * num_partitions * (num_partitions + 1) // 2
    sizes = run(LinearPartitioner(num_partitions), range(num_samples)).sizes
    assert sizes.tolist() == [unit * i for i in range(1, num_partitions + 1)]


@pytest.mark.parametrize("partitioner", [ExponentialPartitioner(1000), SquarePartitioner(30), LinearPartitioner(100)])
def test_sizes_by_id_that_leave_a_client_without_samples(partitioner: Partitioner) -> None:
    with pytest.raises(ValueError, match=f"num_partitions={partitioner.num_partitions}: this size function"):
        run(partitioner, range(2000))


# Natural ids


def test_natural_ids_are_sorted() -> None:
    partitioner = NaturalIdPartitioner(partition_by="user")
    samples = [{"user": u, "x": 0} for u in ["eve", "bob", "eve", "ann"]]
    assert [c.tolist() for c in (run(partitioner, samples).client(i) for i in range(3))] == [[3], [1], [0, 2]]
    assert partitioner.num_partitions == 3
    assert partitioner.partition_id_to_natural_id == {0: "ann", 1: "bob", 2: "eve"}


@pytest.mark.parametrize("ids", [[("b", 1), ("a", 9), ("b", 1)], [30, 10, 30], np.array([2.5, 0.5, 2.5])])
def test_natural_ids_of_other_types(ids: Any) -> None:
    partitioner = NaturalIdPartitioner()
    partition = run(partitioner, ids)
    assert [partition.client(i).tolist() for i in range(2)] == [[1], [0, 2]]
    assert partitioner.partition_id_to_natural_id == {0: ids[1], 1: ids[0]}


def test_natural_id_errors() -> None:
    with pytest.raises(ValueError, match=r"partition_by='user': .*\['x'\]"):
        run(NaturalIdPartitioner("user"), [{"x": 1}])
    with pytest.raises(ValueError, match="of sample 1 is missing"):
        run(NaturalIdPartitioner(), np.array(["a", None], dtype=object))
    with pytest.raises(AttributeError, match="has no dataset"):
        _ = NaturalIdPartitioner().num_partitions


@pytest.mark.parametrize(
    ("mode", "sort", "expected"),
    [
        ("allow-smaller", False, [{"e", "b"}, {"a", "d"}, {"c"}]),
        ("allow-smaller", True, [{"a", "b"}, {"c", "d"}, {"e"}]),
        ("allow-bigger", False, [{"e", "b", "a"}, {"d", "c"}]),
        ("drop-reminder", False, [{"e", "b"}, {"a", "d"}]),
        ("drop-reminder", True, [{"a", "b"}, {"c", "d"}]),
    ],
)
def test_groups_of_natural_ids(mode: Any, sort: bool, expected: list[set[str]]) -> None:
    ids = np.array(list("ebeadccb"))
    partitioner = GroupedNaturalIdPartitioner(group_size=2, mode=mode, sort_unique_ids=sort)
    partition = run(partitioner, ids)
    assert [set(ids[partition.client(i)].tolist()) for i in range(len(partition))] == expected
    assert [set(names) for names in partitioner.partition_id_to_natural_ids.values()] == expected
    assert partition.num_samples == sum(ids.tolist().count(i) for i in set().union(*expected))
    assert partitioner.natural_id_to_partition_id == {name: i for i, names in enumerate(expected) for name in names}


def test_groups_of_natural_ids_errors() -> None:
    ids = list("abcde")
    with pytest.raises(ValueError, match="group_size=2 with mode='strict': 5 ids"):
        run(GroupedNaturalIdPartitioner(None, 2, "strict"), ids)
    assert run(GroupedNaturalIdPartitioner(None, 5, "strict"), ids).num_clients == 1
    assert run(GroupedNaturalIdPartitioner(None, 9), ids).num_clients == 1
    with pytest.raises(ValueError, match="group_size=9: there are only 5 ids"):
        run(GroupedNaturalIdPartitioner(None, 9, "drop-reminder"), ids)


# Arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IidPartitioner(0), ValueError, "num_partitions=0: pass an integer of at least 1"),
        (lambda: LinearPartitioner(-2), ValueError, "num_partitions=-2"),
        (lambda: IidPartitioner(2.5), TypeError, "num_partitions=2.5: pass an integer"),  # type: ignore[arg-type]
        (lambda: IidPartitioner(True), TypeError, "num_partitions=True"),
        (lambda: IidPartitioner(2, seed=-1), ValueError, "seed=-1"),
        (lambda: IidPartitioner(2, seed="x"), TypeError, "seed='x'"),  # type: ignore[arg-type]
        (lambda: DirichletPartitioner(2), ValueError, r"alpha=None: .*DirichletPartitioner\(.*alpha=0.5\)"),
        (lambda: DirichletPartitioner(2, 0.5), TypeError, "partition_by=0.5: .*by keyword"),  # type: ignore[arg-type]
        (lambda: DirichletPartitioner(2, alpha=0), ValueError, "alpha=0: pass a finite number"),
        (lambda: DirichletPartitioner(2, alpha=-1.0), ValueError, "alpha=-1.0"),
        (lambda: DirichletPartitioner(2, alpha=float("nan")), ValueError, "alpha=nan"),
        (lambda: DirichletPartitioner(2, alpha=float("inf")), ValueError, "alpha=inf"),
        (lambda: DirichletPartitioner(2, alpha="small"), TypeError, "alpha='small'"),  # type: ignore[arg-type]
        (lambda: DirichletPartitioner(2, alpha=[1.0] * 3), ValueError, "alpha has 3 entries for num_partitions=2"),
        (lambda: DirichletPartitioner(2, alpha=1, min_partition_size=-1), ValueError, "min_partition_size=-1"),
        (lambda: InnerDirichletPartitioner([1, -1], alpha=1), ValueError, r"partition_sizes\[1\]=-1"),
        (lambda: InnerDirichletPartitioner([1]), ValueError, "alpha=None"),
        (lambda: SizePartitioner([1, 0]), ValueError, r"partition_sizes\[1\]=0: .* at least 1"),
        (lambda: SizePartitioner([]), ValueError, "size of at least one client"),
        (lambda: SizePartitioner([1.5]), TypeError, "partition_sizes="),  # type: ignore[list-item]
        (lambda: SizePartitioner(3), TypeError, "partition_sizes=3"),  # type: ignore[arg-type]
        (lambda: IdToSizeFncPartitioner(2, "linear"), TypeError, "partition_id_to_size_fn='linear'"),  # type: ignore[arg-type]
        (lambda: PathologicalPartitioner(2), ValueError, "num_classes_per_partition=None"),
        (lambda: PathologicalPartitioner(2, None, 0), ValueError, "num_classes_per_partition=0"),
        (lambda: PathologicalPartitioner(2, None, 1, "first"), ValueError, "class_assignment_mode='first': pass one"),  # type: ignore[arg-type]
        (lambda: ShardPartitioner(2), ValueError, "num_shards_per_partition=None and shard_size=None"),
        (lambda: ShardPartitioner(2, shard_size=0), ValueError, "shard_size=0"),
        (lambda: ShardPartitioner(2, num_shards_per_partition=1.0), TypeError, "num_shards_per_partition=1.0"),  # type: ignore[arg-type]
        (lambda: DistributionPartitioner(np.ones(3), 3, 1, None, 0), TypeError, r"distribution_array .* shape \(3,\)"),
        (
            lambda: DistributionPartitioner(-np.ones((1, 3)), 3, 1, None, 0),
            ValueError,
            "distribution_array: .* at least 0",
        ),
        (
            lambda: DistributionPartitioner(np.ones((1, 3)), 3, 1),
            ValueError,
            "preassigned_num_samples_per_label=None",
        ),
        (lambda: ContinuousPartitioner(2, strictness=1.1), ValueError, r"strictness=1.1: pass a number in \[0, 1\]"),
        (lambda: ContinuousPartitioner(2), ValueError, "strictness=None"),
        (lambda: GroupedNaturalIdPartitioner("user"), ValueError, "group_size=None"),
        (lambda: GroupedNaturalIdPartitioner("user", 0), ValueError, "group_size=0"),
        (lambda: GroupedNaturalIdPartitioner("user", 1, "drop"), ValueError, "mode='drop'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_are_checked_at_construction(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "partitioner",
    [
        IidPartitioner(7),
        DirichletPartitioner(7, alpha=1.0, min_partition_size=0),
        PathologicalPartitioner(7, None, 1),
        ShardPartitioner(7, None, 1),
        ContinuousPartitioner(7, strictness=0.0),
        LinearPartitioner(7),
    ],
    ids=stable,
)
def test_more_clients_than_samples(partitioner: Partitioner) -> None:
    with pytest.raises(ValueError, match=r"num_partitions=7: .* samples, 6"):
        run(partitioner, [0] * 6)


@pytest.mark.parametrize(
    "partitioner",
    [
        DirichletPartitioner(2, alpha=1.0),
        PathologicalPartitioner(2, None, 1),
        InnerDirichletPartitioner([40], alpha=1.0),
    ],
    ids=stable,
)
def test_float_labels_are_no_classes(partitioner: Partitioner) -> None:
    with pytest.raises(ValueError, match=r"dtype float64, and this needs classes.*ContinuousPartitioner"):
        run(partitioner, [0.5] * 40)


# Names


@pytest.mark.parametrize(
    ("name", "kwargs", "cls"),
    [
        ("iid", {}, IidPartitioner),
        ("dirichlet", {}, DirichletPartitioner),
        ("inner_dirichlet", {"partition_sizes": [1] * 4, "alpha": 0.1}, InnerDirichletPartitioner),
        ("pathological", {"num_classes_per_partition": 2}, PathologicalPartitioner),
        ("shard", {"num_shards_per_partition": 2}, ShardPartitioner),
        (
            "distribution",
            {
                "distribution_array": np.ones((2, 2)),
                "num_unique_labels_per_partition": 1,
                "preassigned_num_samples_per_label": 0,
            },
            DistributionPartitioner,
        ),
        ("continuous", {"strictness": 0.5}, ContinuousPartitioner),
        ("size", {"partition_sizes": [1] * 4}, SizePartitioner),
        ("id_to_size_fnc", {"partition_id_to_size_fn": np.sqrt}, IdToSizeFncPartitioner),
        ("linear", {}, LinearPartitioner),
        ("square", {"seed": 3}, SquarePartitioner),
        ("exponential", {}, ExponentialPartitioner),
        ("natural_id", {"partition_by": "user"}, NaturalIdPartitioner),
        ("grouped_natural_id", {"group_size": 2}, GroupedNaturalIdPartitioner),
    ],
)
def test_by_name(name: str, kwargs: dict[str, Any], cls: type[Partitioner]) -> None:
    for spelling in (name, name.upper(), cls.__name__, cls.__name__.lower()):
        partitioner = by_name(spelling, 4, **kwargs)
        assert type(partitioner) is cls
    if "natural" not in name:
        assert partitioner.num_partitions == 4
    for key, value in kwargs.items():
        assert np.array_equal(getattr(partitioner, key), value)


def test_by_name_dirichlet_defaults() -> None:
    assert repr(by_name("dirichlet", 3)) == "DirichletPartitioner(num_partitions=3, alpha=0.5, min_partition_size=1)"
    assert repr(by_name("dirichlet", 3, alpha=2.0, min_partition_size=10)) == (
        "DirichletPartitioner(num_partitions=3, alpha=2.0)"
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "dirichet",
            {},
            "partitioner='dirichet' .*Did you mean 'dirichlet'.*'iid', 'dirichlet', 'inner_dirichlet'",
        ),
        ("natural-id", {}, "Did you mean 'natural_id'"),
        ("zzz", {}, "partitioner='zzz' is not known. Known: 'iid'"),
        (
            "size",
            {},
            r"partitioner='size' needs partition_sizes: pass an object, SizePartitioner\(partition_sizes=...\)",
        ),
        ("distribution", {}, r"needs distribution_array, num_unique.*DistributionPartitioner\(num_partitions=..., "),
        ("pathological", {}, r"PathologicalPartitioner\(num_partitions=10, num_classes_per_partition=2\)"),
        ("inner_dirichlet", {"partition_sizes": [1]}, r"InnerDirichletPartitioner\(partition_sizes=.*alpha=0.5\)"),
        ("shard", {}, r"ShardPartitioner\(num_partitions=10, num_shards_per_partition=2\)"),
        ("continuous", {}, r"ContinuousPartitioner\(num_partitions=10, strictness=0.5\)"),
        ("grouped_natural_id", {}, r"GroupedNaturalIdPartitioner\(partition_by=.*group_size=10\)"),
        ("iid", {"alpha": 1.0}, "IidPartitioner has no argument 'alpha'. .*num_partitions, shuffle"),
        ("size", {"partition_sizes": [1, 2]}, "partition_sizes has 2 entries for num_partitions=4"),
    ],
)
def test_by_name_errors(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_name(name, 4, **kwargs)


# Scale


@pytest.mark.parametrize(
    "partitioner",
    [
        IidPartitioner(100_000),
        DirichletPartitioner(100_000, alpha=0.5, min_partition_size=1),
        DirichletPartitioner(100_000, alpha=1e-3, min_partition_size=1),
        SizePartitioner(np.full(100_000, 10)),
        ShardPartitioner(100_000, num_shards_per_partition=2),
        PathologicalPartitioner(100_000, num_classes_per_partition=2),
    ],
    ids=stable,
)
def test_a_hundred_thousand_clients(partitioner: Partitioner) -> None:
    labels = np.arange(1_000_000) % 10
    tracemalloc.start()
    try:
        partition = run(partitioner, labels)
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert partition.num_clients == 100_000
    assert partition.covers(1_000_000)
    # 8 bytes a sample and 8 a client stay, and no object per client is made on the way.
    assert current < 8.8e6 + 1e6
    assert peak < 100e6


def test_a_hundred_thousand_natural_ids() -> None:
    ids = np.random.default_rng(0).permutation(np.arange(1_000_000) % 100_000)
    partition = run(NaturalIdPartitioner(), ids)
    assert partition.sizes.tolist() == [10] * 100_000
    assert (ids[partition.client(4321)] == 4321).all()
    train, validation = room.split(partition, 0.2)
    assert set(train.sizes.tolist()) == {8}
    assert set(validation.sizes.tolist()) == {2}


def test_public_names() -> None:
    assert sorted(room.__all__) == room.__all__
    assert all(hasattr(room, name) for name in room.__all__)
