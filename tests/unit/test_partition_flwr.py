"""Agreement with flwr-datasets, where the definitions coincide: names, arguments, defaults, sizes, groups, tables."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest

from lightning_fedscale import partitioners as ours

flwr = pytest.importorskip("flwr_datasets.partitioner")
hf = pytest.importorskip("datasets")

NAMES = sorted(
    name for name in flwr.__all__ if name.endswith("Partitioner") and name != "Partitioner" and "Vertical" not in name
)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [37, 61, 40, 52, 50]))
USERS = [f"user {i}" for i in np.random.default_rng(1).integers(0, 23, len(LABELS))]


def dataset() -> Any:
    features = hf.Features({"label": hf.ClassLabel(names=list("vwxyz")), "user": hf.Value("string")})
    return hf.Dataset.from_dict({"label": LABELS.tolist(), "user": USERS}, features=features)


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The same arguments, by position as well, to their class and to ours."""
    pair = []
    for module in (flwr, ours):
        partitioner = getattr(module, name)(*args, **kwargs)
        partitioner.dataset = dataset()
        pair.append(partitioner)
    return pair[0], pair[1]


def sizes(partitioner: Any) -> list[int]:
    return [len(partitioner.load_partition(i)) for i in range(partitioner.num_partitions)]


def test_all_their_names_exist() -> None:
    assert len(NAMES) >= 13
    assert set(NAMES) <= set(ours.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_same_arguments_and_defaults(name: str) -> None:
    theirs = list(inspect.signature(getattr(flwr, name)).parameters.values())
    mine = list(inspect.signature(getattr(ours, name)).parameters.values())
    assert [p.name for p in mine[: len(theirs)]] == [p.name for p in theirs]
    for our, their in zip(mine, theirs, strict=False):
        if their.default is not their.empty:
            assert our.default == their.default, our.name
        else:  # Required there; here only what follows the optional `partition_by` has None as a mark.
            assert our.default in (None, our.empty), our.name
    # What we add at the end is optional.
    assert {p.name for p in mine[len(theirs) :]} <= {"shuffle", "seed"}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("IidPartitioner", (7,)),
        ("LinearPartitioner", (9,)),
        ("SquarePartitioner", (7,)),
        ("ExponentialPartitioner", (5,)),
        ("SizePartitioner", ([100, 40, 60, 40],)),
        ("IdToSizeFncPartitioner", (6, np.sqrt)),
        ("ContinuousPartitioner", (7, "label", 0.5)),
        ("InnerDirichletPartitioner", ([100, 40, 60, 40], "label", 1.0)),
        ("ShardPartitioner", (7, "label", 3)),
        ("ShardPartitioner", (7, "label", 3, 10)),
        ("ShardPartitioner", (7, "label", None, 9)),
        ("NaturalIdPartitioner", ("user",)),
        ("NaturalIdPartitioner", ("label",)),
        *[
            ("GroupedNaturalIdPartitioner", ("user", 4, mode, is_sorted))
            for mode in ("allow-smaller", "allow-bigger", "drop-reminder")
            for is_sorted in (False, True)
        ],
    ],
)
def test_same_sizes(name: str, args: tuple[Any, ...]) -> None:
    theirs, mine = both(name, *args)
    assert sizes(mine) == sizes(theirs)


@pytest.mark.parametrize("name", ["LinearPartitioner", "SquarePartitioner"])
def test_same_samples_in_order(name: str) -> None:
    theirs, mine = both(name, 6)
    mine.shuffle = False
    for i in range(6):
        assert LABELS[mine.load_partition(i)].tolist() == theirs.load_partition(i)["label"][:]


def test_same_number_of_samples_where_the_last_shard_is_short() -> None:
    theirs, mine = both("ShardPartitioner", 7, "label", None, 9, True)
    assert sum(sizes(mine)) == sum(sizes(theirs)) == len(LABELS)
    assert mine.num_partitions == theirs.num_partitions


@pytest.mark.parametrize("mode", ["random", "first-deterministic", "deterministic"])
def test_pathological_has_as_many_classes(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, mine = both("PathologicalPartitioner", 6, "label", 2, mode)
        for i in range(6):
            held, expected = LABELS[mine.load_partition(i)], theirs.load_partition(i)["label"][:]
            assert len(set(held)) == len(set(expected)) == 2
            if mode == "deterministic":
                assert sorted(held) == sorted(expected)


def test_natural_ids_hold_the_same_samples() -> None:
    theirs, mine = both("NaturalIdPartitioner", "user")
    theirs.load_partition(0)
    assert mine.partition_id_to_natural_id == theirs.partition_id_to_natural_id
    for i in range(theirs.num_partitions):
        assert LABELS[mine.load_partition(i)].tolist() == theirs.load_partition(i)["label"][:]


def test_groups_hold_the_same_ids() -> None:
    theirs, mine = both("GroupedNaturalIdPartitioner", "user", 4)
    theirs.load_partition(0)
    assert mine.natural_id_to_partition_id == theirs.natural_id_to_partition_id
    expected = {i: sorted(ids) for i, ids in theirs.partition_id_to_natural_ids.items()}
    assert mine.partition_id_to_natural_ids == expected


@pytest.mark.parametrize("rescale", [True, False])
def test_distribution_gives_the_same_table(rescale: bool) -> None:
    table = np.random.default_rng(3).integers(1, 10, size=(5, 4)).astype(float)
    theirs, mine = both("DistributionPartitioner", table, 10, 2, "label", 1, rescale)
    counts = ours.label_counts(mine.partition, LABELS)
    expected = np.array([np.bincount(theirs.load_partition(i)["label"][:], minlength=5) for i in range(10)])
    if rescale:
        # What rounding leaves over goes to a random client of each class, fewer samples than the class has clients.
        assert (counts.sum(axis=0) == expected.sum(axis=0)).all()
        assert np.abs(counts - expected).max() < 4
    else:
        assert (counts == expected).all()


@pytest.mark.parametrize("size_unit", ["absolute", "percent"])
@pytest.mark.parametrize("verbose", [True, False])
@pytest.mark.parametrize("plot_type", ["bar", "heatmap"])
def test_same_table_of_a_plot(size_unit: Any, verbose: bool, plot_type: Any) -> None:
    pd = pytest.importorskip("pandas")
    theirs_plots = pytest.importorskip("flwr_datasets.visualization")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    theirs, mine = both("NaturalIdPartitioner", "user")
    kwargs = {"size_unit": size_unit, "verbose_labels": verbose, "max_num_partitions": 9, "plot_type": plot_type}
    expected = theirs_plots.plot_label_distributions(theirs, "label", **kwargs)[-1]
    pyplot.close("all")
    table = ours.plot_label_distributions(mine, "label", **kwargs)[-1]
    pd.testing.assert_frame_equal(table, expected, check_index_type=False, check_column_type=False)
    assert table.index.name == expected.index.name == "Partition ID"


@pytest.mark.parametrize("name", ["plot_label_distributions", "plot_comparison_label_distribution"])
def test_same_arguments_of_plots(name: str) -> None:
    plots = pytest.importorskip("flwr_datasets.visualization")
    theirs = inspect.signature(getattr(plots, name)).parameters
    mine = inspect.signature(getattr(ours, name)).parameters
    assert list(mine) == list(theirs)
    assert {k: p.default for k, p in mine.items() if k != "label_name"} == {
        k: p.default for k, p in theirs.items() if k != "label_name"
    }
