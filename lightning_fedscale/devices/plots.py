"""Plots of memory and time against batch size.

matplotlib is imported only when a function is called. Figures are made without pyplot, so that nothing is shown or kept
in memory implicitly.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plot_memory(table: pd.DataFrame, budgets: dict[str, int]) -> Figure:
    """Plot stacked areas of memory by part against batch size, with budgets as horizontal lines.

    Args:
        table: a table of `MemoryModel.table`, with one row per batch size.
        budgets: bytes by name.
    """
    from matplotlib.figure import Figure

    table = table.sort_index()
    parts = [part for part in table.columns if part != "peak" and (table[part] > 0).any()]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.add_subplot()
    top = max([table["peak"].max(), *budgets.values()])
    divisor, unit = next(((1024**i, u) for i, u in ((3, "GiB"), (2, "MiB"), (1, "KiB")) if top >= 1024**i), (1, "B"))
    areas = [(table[part] / divisor).to_numpy() for part in parts]
    axis.stackplot(table.index, areas, labels=parts, alpha=0.8, step=None)
    for style, (name, budget) in zip(cycle(("--", ":", "-.")), budgets.items(), strict=False):
        axis.axhline(budget / divisor, linestyle=style, color="black", label=f"{name}: {budget / divisor:.3g} {unit}")
    axis.set_xlim(table.index.min(), max(table.index.max(), table.index.min() + 1))
    axis.set_ylim(0, 1.05 * top / divisor)
    axis.set_xlabel("batch size")
    axis.set_ylabel(f"peak memory ({unit})")
    handles, labels = axis.get_legend_handles_labels()
    # Place it next to the plot, whose empty corner has the budgets.
    axis.legend(
        handles[::-1], labels[::-1], fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    return figure


def plot_batches(table: pd.DataFrame, best: int, max_batch: int | None) -> Figure:
    """Plot time against batch size, each curve relative to its smallest value, and mark the best and largest batch.

    Args:
        table: a table of `PerformanceModel.table`, in ascending order.
        best: the batch to mark as best.
        max_batch: the largest that fits, if known.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.add_subplot()
    curves = {"seconds per round": table["seconds_per_round"]}
    if "seconds_to_target" in table:
        curves = {
            "seconds to target": table["seconds_to_target"],
            "rounds to target": table["rounds_to_target"],
        } | curves
    else:
        curves = {"seconds per sample": 1 / table["samples_per_second"]} | curves
    for number, (label, curve) in enumerate(curves.items()):
        axis.plot(table.index, curve / curve.min(), label=label, linewidth=2.5 if number == 0 else 1.2)
    axis.axvline(best, color="black", linewidth=1, label=f"best: {best}")
    if max_batch is not None:
        axis.axvline(max_batch, color="grey", linestyle="--", linewidth=1, label=f"largest: {max_batch}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("batch size of each client")
    axis.set_ylabel("relative to the minimum")
    axis.legend(fontsize="small")
    return figure
