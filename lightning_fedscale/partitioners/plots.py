"""Plots of a partition: how many samples of each label each client has.

pandas and matplotlib are needed only here, and imported only when a function is called. Figures are made without
pyplot, so that nothing is shown or kept in memory implicitly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lightning_fedscale.partitioners import checks
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.labels import class_names, find_labels
from lightning_fedscale.partitioners.statistics import label_counts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

PlotType: TypeAlias = Literal["bar", "heatmap"]
SizeUnit: TypeAlias = Literal["absolute", "percent"]
IdAxis: TypeAlias = Literal["x", "y"]

_MAX_TICKS = 20
_MAX_SEPARATE_BARS = 100
_LEGEND_ROWS = 20


def plot_label_distributions(
    partitioner: Partitioner,
    label_name: str | None = None,
    plot_type: PlotType = "bar",
    size_unit: SizeUnit = "absolute",
    max_num_partitions: int | None = None,
    partition_id_axis: IdAxis = "x",
    axis: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    title: str = "Per Partition Label Distribution",
    cmap: str | Colormap | None = None,
    legend: bool = False,
    legend_title: str | None = None,
    verbose_labels: bool = True,
    plot_kwargs: dict[str, Any] | None = None,
    legend_kwargs: dict[str, Any] | None = None,
) -> tuple[Figure, Axes, pd.DataFrame]:
    """Plot how many samples of each label each client has.

    Args:
        partitioner: a partitioner with a dataset.
        label_name: column with the labels; None takes the partitioner's ``partition_by``, or looks in the usual places.
        plot_type: ``"bar"``, one stacked bar per client, or ``"heatmap"``, clients by labels.
        size_unit: ``"absolute"`` numbers of samples, or ``"percent"`` of each client's samples.
        max_num_partitions: show only this many clients, the first ones. More than a few hundred are hard to tell apart.
        partition_id_axis: axis of the clients, ``"x"`` or ``"y"``.
        axis: draw here instead of in a new figure.
        figsize: size of the new figure in inches; None chooses one that suits the number of clients.
        title: title of the plot.
        cmap: colours, a matplotlib colormap or its name.
        legend: add a legend (bar) or a colour bar (heatmap) next to the plot.
        legend_title: title of the legend.
        verbose_labels: use the names of the classes if the dataset has them.
        plot_kwargs: more arguments for ``Axes.bar``, ``Axes.stairs`` (over 100 clients) or ``Axes.pcolormesh``.
        legend_kwargs: more arguments for ``Axes.legend`` or ``Figure.colorbar``.

    Returns:
        ``(figure, axis, table)``; the table has a row per client (index "Partition ID") and a column per label.

    Raises:
        ValueError: an argument is not one of its options, or the labels are not found.

    Example:
        >>> from lightning_fedscale.partitioners import IidPartitioner
        >>> partitioner = IidPartitioner(num_partitions=2)
        >>> partitioner.dataset = [0, 0, 0, 0]
        >>> figure, axis, table = plot_label_distributions(partitioner)
        >>> table[0].tolist()
        [2, 2]
    """
    checks.one_of("plot_type", plot_type, ("bar", "heatmap"))
    checks.one_of("size_unit", size_unit, ("absolute", "percent"))
    checks.one_of("partition_id_axis", partition_id_axis, ("x", "y"))
    if max_num_partitions is not None:
        checks.integer("max_num_partitions", max_num_partitions)
    table = _table(partitioner, label_name, size_unit, max_num_partitions, verbose_labels)
    if axis is None:
        axis = _new_axis(figsize, plot_type, partition_id_axis, *table.shape)
    unit = "Count" if size_unit == "absolute" else "Percent %"
    if plot_type == "bar":
        _draw_bars(axis, table, partition_id_axis, cmap, unit, plot_kwargs or {})
        if legend:
            _add_legend(axis, len(table.columns), {"title": legend_title or "Labels", **(legend_kwargs or {})})
    else:
        mesh = _draw_heatmap(axis, table, partition_id_axis, cmap, plot_kwargs or {})
        if legend:
            axis.figure.colorbar(mesh, ax=axis, **{"label": legend_title or unit, **(legend_kwargs or {})})
    axis.set_title(title)
    figure = axis.get_figure(root=True)
    assert figure is not None
    return figure, axis, table


def plot_comparison_label_distribution(
    partitioner_list: Sequence[Partitioner],
    label_name: str | Sequence[str | None] | None = None,
    plot_type: PlotType = "bar",
    size_unit: SizeUnit = "percent",
    max_num_partitions: int | None = 30,
    partition_id_axis: IdAxis = "y",
    figsize: tuple[float, float] | None = None,
    subtitle: str = "Comparison of Per Partition Label Distribution",
    titles: Sequence[str] | None = None,
    cmap: str | Colormap | None = None,
    legend: bool = False,
    legend_title: str | None = None,
    verbose_labels: bool = True,
    plot_kwargs_list: Sequence[dict[str, Any] | None] | None = None,
    legend_kwargs: dict[str, Any] | None = None,
) -> tuple[Figure, list[Axes], list[pd.DataFrame]]:
    """Plot several partitions next to each other, for example of one dataset with several values of alpha.

    Args:
        partitioner_list: partitioners with datasets.
        label_name: column with the labels, one for all or one for each.
        plot_type: see :func:`plot_label_distributions`.
        size_unit: see there.
        max_num_partitions: see there.
        partition_id_axis: see there.
        figsize: size of the whole figure.
        subtitle: title of the whole figure.
        titles: title of each plot.
        cmap: see there.
        legend: add one legend, next to the last plot.
        legend_title: see there.
        verbose_labels: see there.
        plot_kwargs_list: ``plot_kwargs`` for each plot.
        legend_kwargs: see there.

    Returns:
        ``(figure, axes, tables)``, an axis and a table for each partitioner.

    Raises:
        ValueError: a list does not have one entry per partitioner.

    Example:
        >>> from lightning_fedscale.partitioners import IidPartitioner, LinearPartitioner
        >>> partitioners = [IidPartitioner(2), LinearPartitioner(2)]
        >>> for partitioner in partitioners:
        ...     partitioner.dataset = [0] * 6
        >>> figure, axes, tables = plot_comparison_label_distribution(partitioners, size_unit="absolute")
        >>> [table[0].tolist() for table in tables]
        [[3, 3], [2, 4]]
    """
    from matplotlib.figure import Figure

    number = len(partitioner_list)
    if number == 0:
        raise ValueError("partitioner_list=[]: pass at least one partitioner with a dataset.")
    label_names = [label_name] * number if label_name is None or isinstance(label_name, str) else list(label_name)
    lists = {"label_name": label_names, "titles": titles, "plot_kwargs_list": plot_kwargs_list}
    for name, values in lists.items():
        if values is not None and len(values) != number:
            raise ValueError(f"{name} has {len(values)} entries for {number} partitioners: pass one for each.")
    figure = Figure(figsize=figsize or (4 + 2.2 * (number - 1), 4.8), layout="constrained")
    # Sizes are comparable only on a common scale; the client axes may differ in length.
    size_axis, has_sizes = "x" if partition_id_axis == "y" else "y", plot_type == "bar"
    shared: dict[str, Any] = {f"share{size_axis}": has_sizes}
    axes = figure.subplots(1, number, squeeze=False, **shared)[0]
    tables = []
    for i, (partitioner, axis) in enumerate(zip(partitioner_list, axes, strict=True)):
        _, _, table = plot_label_distributions(
            partitioner,
            label_names[i],
            plot_type,
            size_unit,
            max_num_partitions,
            partition_id_axis,
            axis=axis,
            title="" if titles is None else titles[i],
            cmap=cmap,
            legend=legend and i == number - 1,
            legend_title=legend_title,
            verbose_labels=verbose_labels,
            plot_kwargs=None if plot_kwargs_list is None else plot_kwargs_list[i],
            legend_kwargs=legend_kwargs,
        )
        tables.append(table)
    if has_sizes:
        top = 100.0 if size_unit == "percent" else 1.04 * max(float(table.sum(axis=1).max()) for table in tables)
        axes[0].set(**{f"{size_axis}lim": (0.0, top)})
    figure.supxlabel(axes[0].get_xlabel(), fontsize="medium")
    figure.supylabel(axes[0].get_ylabel(), fontsize="medium")
    for axis in axes:
        axis.set(xlabel="", ylabel="")
    figure.suptitle(subtitle)
    return figure, list(axes), tables


def _table(
    partitioner: Partitioner, label_name: str | None, size_unit: str, max_num_partitions: int | None, verbose: bool
) -> pd.DataFrame:
    import pandas as pd

    dataset, partition = partitioner.dataset, partitioner.partition
    label_name = partitioner.partition_by if label_name is None else label_name
    labels = find_labels(dataset, label_name)
    counts = label_counts(partition, labels, max_num_partitions)
    columns = encode_classes(labels)[0]
    names = class_names(dataset, label_name)
    if names is not None and columns.dtype.kind in "iu" and columns[0] >= 0 and columns[-1] < len(names):
        # A class without samples is part of the plot too.
        full = np.zeros((len(counts), len(names)), dtype=np.int64)
        full[:, columns] = counts
        counts, columns = full, np.arange(len(names))
    values = counts
    if size_unit == "percent":
        values = 100.0 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    index = pd.RangeIndex(len(counts), name="Partition ID")
    shown = names if verbose and names is not None and len(names) == len(columns) else columns.tolist()
    return pd.DataFrame(values, index=index, columns=shown)


def _new_axis(
    figsize: tuple[float, float] | None, plot_type: str, id_axis: str, num_partitions: int, num_labels: int
) -> Axes:
    from matplotlib.figure import Figure

    across = float(np.clip(2.0 + 0.22 * num_partitions, 6.4, 14.0))
    along = float(np.clip(1.6 + 0.22 * num_labels, 3.2, 10.0)) if plot_type == "heatmap" else 4.8
    default = (
        (across, along) if id_axis == "x" else (max(along, 6.4), min(across, 10.0) if num_partitions > 20 else 4.8)
    )
    figure = Figure(figsize=figsize or default, layout="constrained")
    return figure.subplots()


def _draw_bars(
    axis: Axes, table: pd.DataFrame, id_axis: str, cmap: str | Colormap | None, unit: str, kwargs: dict[str, Any]
) -> None:
    num_partitions, num_labels = table.shape
    colors = _colors(num_labels, cmap)
    clients = np.arange(num_partitions)
    below = np.zeros(num_partitions)
    for k, label in enumerate(table.columns):
        values = table.iloc[:, k].to_numpy(dtype=np.float64)
        style = {"color": colors[k], "label": str(label), **kwargs}
        if num_partitions > _MAX_SEPARATE_BARS:
            # One outline for all clients: thousands of separate bars would take minutes.
            edges = np.arange(num_partitions + 1) - 0.5
            orientation: Literal["vertical", "horizontal"] = "vertical" if id_axis == "x" else "horizontal"
            axis.stairs(below + values, edges, baseline=below, fill=True, orientation=orientation, **style)
        elif id_axis == "x":
            axis.bar(clients, values, bottom=below, **{"width": 0.85, **style})
        else:
            axis.barh(clients, values, left=below, **{"height": 0.85, **style})
        below = below + values
    top = float(below.max(initial=0.0)) or 1.0
    _set_limits(axis, id_axis, (-0.6, num_partitions - 0.4), (0.0, top if unit.startswith("Percent") else 1.04 * top))
    _set_ticks(axis, id_axis, clients, [str(i) for i in table.index])
    axis.set(**_axis_labels(id_axis, unit))
    axis.spines[["top", "right"]].set_visible(False)


def _draw_heatmap(
    axis: Axes, table: pd.DataFrame, id_axis: str, cmap: str | Colormap | None, kwargs: dict[str, Any]
) -> Any:
    values = table.to_numpy(dtype=np.float64)
    clients, labels = np.arange(len(table)), np.arange(len(table.columns))
    style = {"cmap": cmap or "Blues", "vmin": 0.0, **kwargs}
    # Cells are centred on the whole numbers, where the ticks are.
    if id_axis == "x":
        mesh = axis.pcolormesh(clients, labels, values.T, shading="nearest", **style)
    else:
        mesh = axis.pcolormesh(labels, clients, values, shading="nearest", **style)
    axis.invert_yaxis()
    _set_ticks(axis, id_axis, clients, [str(i) for i in table.index])
    _set_ticks(axis, "y" if id_axis == "x" else "x", labels, [str(name) for name in table.columns], most=40)
    axis.set(**_axis_labels(id_axis, "Label"))
    return mesh


def _axis_labels(id_axis: str, other: str) -> dict[str, str]:
    return (
        {"xlabel": "Partition ID", "ylabel": other} if id_axis == "x" else {"xlabel": other, "ylabel": "Partition ID"}
    )


def _set_limits(axis: Axes, id_axis: str, clients: tuple[float, float], values: tuple[float, float]) -> None:
    x, y = (clients, values) if id_axis == "x" else (values, clients)
    axis.set_xlim(x)
    axis.set_ylim(y)


def _set_ticks(axis: Axes, which: str, positions: Any, names: Sequence[str], most: int = _MAX_TICKS) -> None:
    if which == "x":
        # A letter takes about a tenth of an inch: show fewer names on a narrow axis, and long ones upright.
        figure = axis.get_figure(root=True)
        assert figure is not None
        width = axis.get_position().width * figure.get_figwidth()
        longest = max(len(name) for name in names) + 2
        is_upright = longest > 6 and longest * len(names) > 11 * width
        most = min(most, max(2, int(width / (0.2 if is_upright else 0.09 * longest))))
    # Show every 1st, 2nd, 5th, 10th, ... name, so that they do not overlap.
    step = next(s * 10**e for e in range(12) for s in (1, 2, 5) if len(names) <= most * s * 10**e)
    if which == "y":
        axis.set_yticks(positions[::step], names[::step])
    else:
        axis.set_xticks(positions[::step], names[::step], rotation=90 if is_upright else 0)


def _colors(number: int, cmap: str | Colormap | None) -> list[Any]:
    import matplotlib

    if cmap is None:
        cmap = "tab10" if number <= 10 else "tab20" if number <= 20 else "nipy_spectral"
    colormap = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
    if colormap.N <= 20:  # A list of distinct colours is used in its order.
        return [colormap(i % colormap.N) for i in range(number)]
    return [colormap(x) for x in np.linspace(0.05, 0.95, number)]


def _add_legend(axis: Axes, num_labels: int, kwargs: dict[str, Any]) -> None:
    handles, names = axis.get_legend_handles_labels()
    # Place it next to the plot, never over the bars, and in the order in which the bars are stacked.
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False}
    columns = math.ceil(num_labels / _LEGEND_ROWS)
    size = "small" if num_labels > 10 else "medium"
    axis.legend(handles[::-1], names[::-1], **{**place, "ncols": columns, "fontsize": size, **kwargs})
