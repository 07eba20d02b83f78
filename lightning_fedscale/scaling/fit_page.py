"""The report of a fit: a page and a figure, with a checklist of what a scaling study must state."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.fit import Fit
from lightning_fedscale.scaling.runs import columns_of
from lightning_fedscale.scaling.search import HUBER
from lightning_fedscale.scaling.tuning import TUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_report(found: Fit, folder: str | Path) -> Path:
    """Write ``report.md`` and ``fit.png`` about a fit.

    Returns:
        The page's path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot_fit(found).savefig(folder / "fit.png", dpi=150)
    page = folder / "report.md"
    page.write_text("\n".join([*_head(found), *_constants(found), *_sizes(found), *_checklist(found), ""]), "utf-8")
    return page


def plot_fit(found: Fit) -> Figure:
    """Plot measured over predicted loss, and the profiles at each compute with the law's curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8))
    # A layout engine would draw all text once more, a tenth of the time of `fedscale fit`.
    edges = {"left": 0.09, "right": 0.985, "bottom": 0.14, "top": 0.965, "wspace": 0.24}
    left, right = figure.subplots(1, 2, gridspec_kw=edges)
    table = found.table
    known = columns_of(table, found.law)
    if found.rho is not None:
        known["tokens"] = known["tokens"] * known["clients"] ** (1.0 - found.rho.value)
    predicted = found.law.formula(SimpleNamespace(**found.law.constants), SimpleNamespace(**known))
    for held_out, color, label in ((False, "tab:blue", "fitted"), (True, "tab:red", "fitted, after it was held out")):
        rows = (table["held_out"] == held_out).to_numpy()
        if rows.any():
            left.plot(predicted[rows], table["loss"][rows], "o", ms=4, color=color, label=label)
    ends = [min(predicted.min(), table["loss"].min()), max(predicted.max(), table["loss"].max())]
    left.plot(ends, ends, color="0.5", lw=0.8)
    left.set(xlabel=f"loss by {found.law.name}", ylabel="measured loss")
    _logarithmic(left)
    left.legend(frameon=False)
    _profiles(found, right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _profiles(found: Fit, axes: Axes) -> None:
    from matplotlib import colormaps

    if found.isoflop is None or not isinstance(found.law, Law) or found.law.missing:
        axes.set_axis_off()
        return
    rho, profiles = _rho(found), found.isoflop.profiles
    for profile, share in zip(profiles, np.linspace(0.0, 0.9, len(profiles)), strict=True):
        color = colormaps["viridis"](share)
        axes.plot(profile.params, profile.loss, "o", ms=3, color=color)
        sizes = np.geomspace(profile.params.min(), profile.params.max(), 50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = [
                found.law.loss_federated(size, profile.flops / (found.law.flops_per * size * profile.clients),
                                         profile.clients, rho)
                for size in sizes.tolist()
            ]  # fmt: skip
        axes.plot(sizes, losses, color=color, lw=1, label=f"{profile.flops:.1e}, {profile.clients:,}")
    axes.set(xlabel="parameters", ylabel="loss")
    _logarithmic(axes)
    if len(profiles) <= 12:
        axes.legend(frameon=False, title="FLOPs, clients", fontsize="x-small", title_fontsize="x-small")


def _logarithmic(axes: Axes) -> None:
    """Have both axes logarithmic, with short labels that do not overlap."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if high < 10 * low:  # too few powers of ten to label
            axis.set_major_locator(MaxNLocator(6))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())


def _rho(found: Fit) -> float:
    return 1.0 if found.rho is None else found.rho.value


def _head(found: Fit) -> list[str]:
    summary = type(found.law).__doc__ or ""
    lines = [f"# {found.law.name}, fitted to {found.runs} runs", "", summary.split("\n\n")[0].strip(), ""]
    lines += [f"Units: {found.law.units}. Source: {found.law.source}.", ""]
    if found.problems:
        lines += [f"**These runs do not determine a best size:** {'; '.join(found.problems)}.", ""]
    return [*lines, "![Measured and predicted loss](fit.png)", ""]


def _constants(found: Fit) -> list[str]:
    rows = [f"| {name} | {each.value:.5g} | {each.ends} |" for name, each in found.intervals.items()]
    if found.rho is not None:
        rows.append(f"| rho ({found.learning_rate}) | {found.rho.value:.4g} | {found.rho.ends} |")
    return ["| constant | value | 95 % interval |", "|---|---:|---:|", *rows, ""]


def _sizes(found: Fit) -> list[str]:
    if found.problems or not isinstance(found.law, Law) or found.law.missing or found.isoflop is None:
        return []
    lines = ["## Best sizes", "", "| FLOPs | clients | by the law | by a parabola |", "|---:|---:|---:|---:|"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in found.isoflop.profiles:
            size = found.optimal(each.flops, each.clients)
            parabola = f"{each.best:.4g}" if math.isfinite(each.best) else "none among these sizes"
            lines.append(f"| {each.flops:.3g} | {each.clients:,} | {size} | {parabola} |")
    second = found.isoflop
    lines += ["", f"By parabolas, the best size grows as C^{second.p}" + (
        "." if second.q is None else f", and falls with clients as K^-{second.q}: rho = {second.rho}."
    )]  # fmt: skip
    if math.isfinite(second.bias):
        lines.append(
            "Parabolas are biased, since the law is not symmetric in ln N: here by a factor of"
            f" {second.bias:.3f}, if the fitted law is true."
        )
    return [*lines, ""]


def _checklist(found: Fit) -> list[str]:
    table, held_out, made = found.table, int(found.table["held_out"].sum()), found.made_for
    lines = ["## What a scaling study must state", ""]
    done = [f"law and its source: {found.law.name}, {found.law.source}", f"units: {found.law.units}"]
    for name in ("params", "tokens", "flops", "clients"):
        if name in table:
            done.append(f"range of {name}: {table[name].min():.3g} to {table[name].max():.3g}")
    done += [
        *([f"method of the runs: {made}; clients' optimizer: {made.optimizer or 'not recorded'}"] if str(made) else []),
        *([] if made.passes is None else [f"passes over the data: {made.passes[0]:.3g} to {made.passes[1]:.3g}"]),
        f"runs: {len(table)}, all fitted"
        + (f"; {held_out} of the largest compute were held out first, for the error there" if held_out else ""),
        f"objective: sum of Huber losses (delta {HUBER:g}) of log-loss residuals",
        "search: least squares for linear constants at many starts (Sobol points), the best of them to a minimum with"
        " exact gradients",
        *(["learning rate: tuned for each size and number of clients"] if found.learning_rate == TUNED else []),
        f"condition of the scaled Hessian: {found.condition:.2g}",
        f"error of the log-loss: {found.error:.2g} on fitted runs"
        + (f", {found.held_out:.2g} on those of the largest compute by a fit without them" if held_out else ""),
    ]
    if found.bootstrap:
        done.append(f"intervals: {found.bootstrap} refits to resampled runs, 2.5 and 97.5 percent quantiles")
    open_ = [
        *([] if found.bootstrap else ["intervals: none (bootstrap=0)"]),
        *([] if math.isfinite(found.held_out) else ["held-out error: no runs were held out"]),
        "data, its order" + (", and how often it was repeated" if made.passes is None else ""),
        *([f"not recorded in the table of runs: {', '.join(made.unknown).replace('_', ' ')}"] if made.unknown else []),
        "architecture by size: what grows, and which parameters are counted (ComputeAccounting counts trained ones that"
        " are not embeddings)",
        f"hyperparameters by size: batch, schedule, and how they were tuned; the learning rate: {found.learning_rate}",
        *found.notes,
        "which runs were left out of the table, and why",
        "whether losses were measured at the end of training or before, and on which data",
        "number of seeds by run",
    ]
    return [*lines, *(f"- [x] {each}" for each in done), *(f"- [ ] {each}" for each in open_)]
