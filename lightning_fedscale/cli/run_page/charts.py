"""Charts of a run as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from lightning_fedscale.cli.run_page.facts import clients, is_metric, kind_of
from lightning_fedscale.cli.run_page.run import Run, Series, along

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 1000
"""Limit of the points of a curve; more cannot be distinguished, and make pages slow."""

_AXES = {"compute/flops_total": "training FLOPs", "round/simulated_total": "simulated seconds"}
"""Quantities that curves are shown over besides steps, if they were logged."""

GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "update norm": ("norm", ("round/delta_norm",)),
    "client drift": ("relative to the mean's norm", ("round/drift",)),
    "clients": ("clients", ("round/clients", "round/rejected", "round/dropped")),
    "bytes in a round": ("bytes", ("round/upload_bytes", "round/download_bytes")),
    "seconds of a round": ("seconds", ("round/seconds", "round/simulated_seconds")),
    "privacy spent": ("epsilon", ("round/epsilon",)),
    "staleness in rounds": ("rounds", ("round/staleness",)),
}
"""Charts of the rounds: title, label of the axis, and names of the curves."""


class Picture(NamedTuple):
    """A chart, or a figure that the run logged.

    Attributes:
        title: caption.
        data: contents of the file.
        kind: "svg" or "png".
    """

    title: str
    data: bytes
    kind: str


def metric_charts(run: Run) -> list[Picture]:
    """Draw a chart for each kind of metric, over rounds and over their costs."""
    kinds: dict[str, dict[str, Series[float]]] = {}
    for name, values in run.scalars.items():
        if is_metric(name) and len(finite := values[np.isfinite(values)]):
            kinds.setdefault(kind_of(name), {})[name] = finite
    # Losses come first, since every run has them.
    ordered = sorted(kinds.items(), key=lambda item: ("loss" not in item[0], item[0]))
    return [_over_all(run, kind, curves) for kind, curves in ordered]


def round_charts(run: Run) -> list[Picture]:
    """Draw the charts of the rounds."""
    return _charts(run, GROUPS)


def client_charts(run: Run) -> list[Picture]:
    """Draw a chart for each name that was logged per client."""
    names = [name for name in run.scalars if name.startswith("client/")]
    return _charts(run, {name: (name.removeprefix("client/"), (name,)) for name in names})


def spread_charts(run: Run) -> list[Picture]:
    """Draw how each value is distributed over clients: the mean, and the worst and best tenth."""
    found = []
    for name in clients(run):
        parts = {part: run.scalars.get(f"{name}/{part}") for part in ("mean", "worst10", "best10")}
        known = {part: values for part, values in parts.items() if values is not None}
        if len(known) == len(parts):
            found.append(_spread(run, name, pd.DataFrame(known).dropna()))
    return found


def phase_charts(run: Run) -> list[Picture]:
    """Draw the gradient norm and the detector's values, with critical phases shaded, unless the run logged them."""
    charts = {
        "gradient norm": ("norm", ("grad_norm",)),
        "statistic and threshold": ("statistic", ("relative_change", "cumulative_sum", "threshold")),
        "gradient noise scale": ("samples", ("noise_scale", "noise_scale_low", "noise_scale_high")),
    }
    if "phase/course" in run.pictures:
        del charts["gradient norm"], charts["statistic and threshold"]
    return _charts(run, {
        title: (label, tuple(f"phase/{name}" for name in names)) for title, (label, names) in charts.items()
    })  # fmt: skip


def position_chart(place: Mapping[str, Any]) -> Picture | None:
    """Draw the run and the best size from the numbers in ``position.json``."""
    if not {"params", "optimal_params", "predicted_loss", "optimal_loss"} <= set(place):
        return None
    figure = _figure(1)
    axes = figure.subplots()
    if {"low", "high"} <= set(place):
        axes.axvspan(place["low"], place["high"], color="tab:green", alpha=0.15, label="within 1 % of the best")
    axes.plot(place["optimal_params"], place["optimal_loss"], "o", color="tab:green", label="best size")
    axes.plot(place["params"], place["predicted_loss"], "D", color="tab:red", label="this run")
    axes.set(xscale="log", xlabel="parameters", ylabel="predicted loss", title=place["law"])
    axes.margins(0.15)
    axes.legend(frameon=False)
    return Picture("size and predicted loss", _svg(figure), "svg")


def _over_all(run: Run, kind: str, curves: dict[str, Series[float]]) -> Picture:
    axes_of = {run.unit: curves}
    for name, label in _AXES.items():
        if name in run.scalars and len(run.scalars[name]) > 1:
            axes_of[label] = {each: along(values, run.scalars[name]) for each, values in curves.items()}
    shown = {label: of for label, of in axes_of.items() if any(len(values) for values in of.values())}
    figure = _figure(len(shown))
    for axes, (label, of) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        _draw(axes, of)
        axes.set(xlabel=label, ylabel=kind if axes.get_subplotspec().is_first_col() else "")
    return Picture(kind, _svg(figure), "svg")


def _charts(run: Run, groups: Mapping[str, tuple[str, tuple[str, ...]]]) -> list[Picture]:
    """Draw a chart for each title that has a curve that is not constant."""
    found: list[Picture] = []
    for title, (label, names) in groups.items():
        known = {name: run.scalars[name] for name in names if name in run.scalars}
        curves = {name: finite for name, values in known.items() if len(finite := values[np.isfinite(values)])}
        if any(values.nunique() > 1 for values in curves.values()):
            found.append(_chart(run, title, label, curves))
    return found


def _chart(run: Run, title: str, label: str, curves: Mapping[str, Series[float]]) -> Picture:
    figure = _figure(1)
    axes = figure.subplots()
    _draw(axes, curves)
    if title in ("gradient norm", "statistic and threshold"):
        for first, last in run.spans():
            axes.axvspan(first - 0.5, last + 0.5, color="tab:red", alpha=0.15, linewidth=0)
    batches = title.startswith("client/") and _counts_batches(run, curves.values())
    axes.set(xlabel="local batch" if batches else run.unit, ylabel=label)
    return Picture(title, _svg(figure), "svg")


def _spread(run: Run, name: str, parts: pd.DataFrame) -> Picture:
    figure = _figure(1)
    axes = figure.subplots()
    axes.fill_between(parts.index, parts["worst10"], parts["best10"], color="tab:blue", alpha=0.15, linewidth=0)
    _draw(axes, {"mean": parts["mean"], "worst tenth": parts["worst10"], "best tenth": parts["best10"]})
    axes.set(xlabel=run.unit, ylabel=name.partition("/")[2])
    return Picture(name, _svg(figure), "svg")


def _counts_batches(run: Run, curves: Iterable[Series[float]]) -> bool:
    """Return whether the clients' curves go beyond the last round, because their steps count batches."""
    return run.federated and max(int(each.index[-1]) for each in curves) > int(run.scalars["round/clients"].index[-1])


def _draw(axes: Axes, curves: Mapping[str, Series[float]]) -> None:
    for name, values in curves.items():
        thin = values.iloc[:: max(1, -(-len(values) // _MOST_POINTS))]
        axes.plot(thin.index, thin, lw=1.2, label=name, marker="o" if len(thin) <= 20 else "", ms=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def _figure(panels: int) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(4.2 * panels, 2.8), layout="constrained")


def _svg(figure: Figure) -> bytes:
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fedscale"}):  # makes pages reproducible
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
