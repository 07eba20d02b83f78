"""Numbers about a partition against independent ones, and its pictures."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedscale.partitioners import (
    DirichletPartitioner,
    IidPartitioner,
    LinearPartitioner,
    NaturalIdPartitioner,
    Partition,
    gini,
    heterogeneity,
    js_distance,
    js_distances,
    label_counts,
    plot_comparison_label_distribution,
    plot_label_distributions,
)
from lightning_fedscale.partitioners.grouping import group

property_test = settings(max_examples=40, deadline=None)


@st.composite
def labelled_partitions(draw: st.DrawFn) -> tuple[Partition, np.ndarray[Any, Any]]:
    pairs = draw(st.lists(st.tuples(st.integers(-1, 4), st.sampled_from("abcd")), min_size=1, max_size=50))
    owner = np.array([0, *(client for client, _ in pairs)])
    return Partition(*group(owner, 5)), np.array(["a", *(label for _, label in pairs)])


@property_test
@given(case=labelled_partitions())
def test_label_counts(case: tuple[Partition, np.ndarray[Any, Any]]) -> None:
    partition, labels = case
    expected = [[(labels[partition.client(i)] == c).sum() for c in sorted(set(labels))] for i in range(5)]
    assert label_counts(partition, labels).tolist() == expected
    assert label_counts(partition, labels, max_clients=2).tolist() == expected[:2]


@property_test
@given(case=labelled_partitions())
def test_js_distance_is_that_of_scipy(case: tuple[Partition, np.ndarray[Any, Any]]) -> None:
    spatial = pytest.importorskip("scipy.spatial.distance")
    partition, labels = case
    counts = label_counts(partition, labels)
    distances = js_distances(partition, labels)
    for i, row in enumerate(counts):
        if row.sum():
            expected = spatial.jensenshannon(row / row.sum(), counts.sum(axis=0) / counts.sum(), base=2)
            assert distances[i] == pytest.approx(np.nan_to_num(expected), abs=1e-6)
        else:
            assert np.isnan(distances[i])
    assert js_distance(partition, labels) == pytest.approx(np.nanmean(distances))


@property_test
@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30))
def test_gini_by_brute_force(sizes: list[int]) -> None:
    if sum(sizes) == 0:
        assert gini(sizes) == 0
        return
    differences = sum(abs(x - y) for x in sizes for y in sizes)
    assert gini(sizes) == pytest.approx(differences / (2 * len(sizes) * sum(sizes)), abs=1e-12)


@pytest.mark.parametrize("sizes", [[], [1, -1]])
def test_gini_errors(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="sizes="):
        gini(sizes)


def test_heterogeneity_by_hand() -> None:
    partition = Partition.from_lists([[0, 1], [], [2, 3, 4, 5]])
    result = heterogeneity(partition, ["a", "b", "a", "a", "a", "b"])
    assert result._replace(mean_js_distance=0.0, size_gini=0.0) == (0.0, 0.0, 2.0, 0, 4, 1)
    assert result.size_gini == pytest.approx(4 / 9)
    assert result.mean_js_distance == js_distance(partition, [0, 1, 0, 0, 0, 1])


def test_heterogeneity_of_many_clients_and_classes() -> None:
    # A dense table of 100,000 clients x 50,000 classes would take 40 GB.
    labels = np.arange(200_000) % 50_000
    result = heterogeneity(Partition(np.arange(200_000), np.arange(0, 200_001, 2)), labels)
    assert result.mean_js_distance == pytest.approx(1, abs=1e-3)
    assert (result.size_gini, result.mean_num_labels) == (0, 2)
    with pytest.raises(ValueError, match=r"100000 clients x 50000 classes exceeds a gigabyte: pass"):
        label_counts(Partition(np.arange(200_000), np.arange(0, 200_001, 2)), labels)


def test_labels_must_fit() -> None:
    partition = Partition.from_lists([[0, 5]])
    for labels in ([0, 1], np.zeros((6, 2), dtype=int)):
        with pytest.raises(ValueError, match="the partition has sample 5"):
            heterogeneity(partition, labels)
    with pytest.raises(ValueError, match="partition: no client has a sample"):
        heterogeneity(Partition.from_lists([[], []]), [0])


# Pictures

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


def partitioner(num_clients: int, labels: Any = None) -> DirichletPartitioner:
    result = DirichletPartitioner(num_clients, alpha=0.5, min_partition_size=1)
    result.dataset = np.arange(3000) % 4 if labels is None else labels
    return result


def bar_lengths(axis: Any, id_axis: str) -> np.ndarray[Any, Any]:
    """Lengths of the bars, clients x labels, as drawn."""
    if axis.containers:
        return np.array([[b.get_height() if id_axis == "x" else b.get_width() for b in c] for c in axis.containers]).T
    steps = [patch.get_data() for patch in axis.patches]
    return np.array([values - baseline for values, _, baseline in steps]).T


@pytest.mark.parametrize("id_axis", ["x", "y"])
@pytest.mark.parametrize("num_clients", [10, 150])
@pytest.mark.parametrize("size_unit", ["absolute", "percent"])
def test_bars_show_the_table(id_axis: Any, num_clients: int, size_unit: Any) -> None:
    p = partitioner(num_clients)
    figure, axis, table = plot_label_distributions(p, size_unit=size_unit, partition_id_axis=id_axis, legend=True)
    counts = label_counts(p.partition, p.dataset)
    if size_unit == "percent":
        counts = 100 * counts / counts.sum(axis=1, keepdims=True)
    assert np.allclose(table.to_numpy(), counts)
    assert np.allclose(bar_lengths(axis, id_axis), counts)
    assert (table.index.name, table.index.tolist()) == ("Partition ID", list(range(num_clients)))
    columns: list[Any] = table.columns.tolist()  # pandas says str
    assert columns == [0, 1, 2, 3]
    assert axis.figure is figure
    labels = (axis.get_xlabel(), axis.get_ylabel())
    unit = "Count" if size_unit == "absolute" else "Percent %"
    assert labels == (("Partition ID", unit) if id_axis == "x" else (unit, "Partition ID"))
    legend = axis.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["3", "2", "1", "0"]
    assert legend.get_title().get_text() == "Labels"


@pytest.mark.parametrize("id_axis", ["x", "y"])
def test_heatmap_shows_the_table(id_axis: Any) -> None:
    figure, axis, table = plot_label_distributions(
        partitioner(7), plot_type="heatmap", partition_id_axis=id_axis, legend=True, legend_title="Images"
    )
    array = axis.collections[0].get_array()
    assert array is not None
    drawn = array.reshape((4, 7) if id_axis == "x" else (7, 4))
    assert (drawn == (table.T if id_axis == "x" else table).to_numpy()).all()
    assert [a.get_ylabel() for a in figure.axes[1:]] == ["Images"]


@pytest.mark.parametrize("plot_type", ["bar", "heatmap"])
@pytest.mark.parametrize("id_axis", ["x", "y"])
@pytest.mark.parametrize("num_clients", [10, 100])
def test_nothing_overlaps(plot_type: Any, id_axis: Any, num_clients: int) -> None:
    words = np.array(["airplane", "automobile", "bird", "a long name of a class"])[np.arange(3000) % 4]
    p = partitioner(num_clients, words)
    figure, axis, _ = plot_label_distributions(p, plot_type=plot_type, partition_id_axis=id_axis, legend=True)
    figure.draw_without_rendering()
    for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
        boxes = [t.get_window_extent() for t in ticks if t.get_text()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    if plot_type == "bar":
        legend = axis.get_legend()
        assert legend is not None
        assert not legend.get_window_extent().overlaps(axis.get_window_extent())
        assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_a_column_for_another_label_than_the_one_split_by() -> None:
    hf = pytest.importorskip("datasets")
    features = hf.Features({"user": hf.Value("string"), "label": hf.ClassLabel(names=["no", "yes", "never"])})
    p = NaturalIdPartitioner("user")
    p.dataset = hf.Dataset.from_dict({"user": ["b", "a", "b"], "label": [0, 1, 1]}, features=features)
    expected = pd.DataFrame([[0, 1, 0], [1, 1, 0]], columns=["no", "yes", "never"])
    assert plot_label_distributions(p, "label")[2].equals(expected)
    assert plot_label_distributions(p)[2].columns.tolist() == ["a", "b"]
    columns: list[Any] = plot_label_distributions(p, "label", verbose_labels=False)[2].columns.tolist()
    assert columns == [0, 1, 2]


def test_options_reach_matplotlib() -> None:
    from matplotlib.figure import Figure

    given_figure = Figure()
    given_axis = given_figure.subplots()
    figure, axis, table = plot_label_distributions(
        partitioner(9),
        max_num_partitions=3,
        axis=given_axis,
        title="My title",
        cmap="viridis",
        legend=True,
        legend_title="Species",
        plot_kwargs={"width": 0.5},
        legend_kwargs={"ncols": 2},
    )
    assert (figure, axis) == (given_figure, given_axis)
    assert len(table) == 3
    assert axis.get_title() == "My title"
    assert axis.containers[0][0].get_width() == 0.5
    legend = axis.get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "Species"
    assert len({container[0].get_facecolor() for container in axis.containers}) == 4
    assert plot_label_distributions(partitioner(3), figsize=(3, 2))[0].get_size_inches().tolist() == [3, 2]


def test_no_figure_is_left_in_pyplot() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plot_label_distributions(partitioner(3))
    plot_comparison_label_distribution([partitioner(3)])
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("plot_type", ["bar", "heatmap"])
@pytest.mark.parametrize("id_axis", ["x", "y"])
@pytest.mark.parametrize("size_unit", ["absolute", "percent"])
def test_comparison(plot_type: Any, id_axis: Any, size_unit: Any) -> None:
    linear, iid = LinearPartitioner(40), IidPartitioner(10)
    linear.dataset = iid.dataset = np.arange(3000) % 4
    figure, axes, tables = plot_comparison_label_distribution(
        [linear, iid],
        plot_type=plot_type,
        partition_id_axis=id_axis,
        size_unit=size_unit,
        titles=["l", "i"],
        legend=True,
    )
    figure.draw_without_rendering()
    assert [len(table) for table in tables] == [30, 10]
    assert [axis.get_title() for axis in axes] == ["l", "i"]
    for p, table in zip((linear, iid), tables, strict=True):
        assert table.equals(plot_label_distributions(p, size_unit=size_unit, max_num_partitions=30)[2])
    if plot_type == "bar":
        # One scale for both, that holds the longest bar of either.
        limits = [axis.get_ylim() if id_axis == "x" else axis.get_xlim() for axis in axes]
        assert limits[0] == limits[1]
        assert limits[0][1] >= max(table.sum(axis=1).max() for table in tables) - 1e-9
        assert [axis.get_legend() is None for axis in axes] == [True, False]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"plot_type": "pie"}, "plot_type='pie': pass one of 'bar', 'heatmap'"),
        ({"size_unit": "share"}, "size_unit='share'"),
        ({"partition_id_axis": "z"}, "partition_id_axis='z'"),
        ({"max_num_partitions": 0}, "max_num_partitions=0"),
    ],
)
def test_plot_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_label_distributions(partitioner(3), **kwargs)


def test_comparison_errors() -> None:
    with pytest.raises(ValueError, match=r"partitioner_list=\[\]"):
        plot_comparison_label_distribution([])
    with pytest.raises(ValueError, match="titles has 1 entries for 2 partitioners"):
        plot_comparison_label_distribution([partitioner(3)] * 2, titles=["one"])
