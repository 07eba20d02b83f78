"""The results of an evaluation on clients' validation data, and their display in loggers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_fedscale.core.lightning.loggers import lay_out, show, shows_figures, writers
from lightning_fedscale.core.lightning.trainer_state import steps_logged
from lightning_fedscale.types import FloatArray, IntArray
from lightning_fedscale.utils.fairness import TAIL, Spread, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 10
"""Number of the worst clients that the table and the figure name."""


@dataclass(frozen=True)
class ClientReport:
    """An evaluation on clients' own data; it is the same on every rank.

    Attributes:
        round: the round after which it was made, counted from 0.
        clients: the evaluated clients, ascending.
        samples: validation samples of each of them.
        values: value of each of them by metric; NaN for those that did not log it.
        higher_is_better: by metric, whether higher values are better.
    """

    round: int
    clients: IntArray
    samples: IntArray
    values: dict[str, FloatArray]
    higher_is_better: dict[str, bool]

    def spread(self, metric: str) -> Spread | None:
        """Return the spread over the clients that have a finite value; None if no client has one."""
        values = self.values[metric]
        known = np.isfinite(values)
        if not known.any():
            return None
        weights = self.samples[known].tolist()
        return spread(values[known].tolist(), weights, higher_is_better=self.higher_is_better[metric])

    def worst(self, metric: str, count: int = _SHOWN) -> list[tuple[int, int, float]]:
        """Return the worst clients as (number, validation samples, value); those without a finite value come first."""
        values = self.values[metric]
        badness = -values if self.higher_is_better[metric] else values
        order = np.argsort(-np.where(np.isfinite(values), badness, np.inf), kind="stable")[:count]
        return [(int(self.clients[i]), int(self.samples[i]), float(values[i])) for i in order]

    def plot(self, metric: str) -> Figure:
        """Plot every client's value, worst first, with the worst tenth and the mean; the worst ten are numbered."""
        from matplotlib.figure import Figure

        values = self.values[metric][np.isfinite(self.values[metric])]
        clients = self.clients[np.isfinite(self.values[metric])]
        order = np.argsort(values if self.higher_is_better[metric] else -values, kind="stable")
        places = np.arange(len(order))
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(places, values[order], step="mid", color="tab:blue", alpha=0.3)
        axes.plot(places, values[order], drawstyle="steps-mid", color="tab:blue", label="client")
        tail = slice(0, max(1, int(TAIL * len(order))))
        axes.plot(places[tail], values[order][tail], "o", color="tab:red", label="worst tenth")
        axes.axhline(float(values.mean()), color="black", linestyle=":", label="mean")
        axes.set_xticks(places[:_SHOWN], list(map(str, clients[order][:_SHOWN].tolist())), rotation=90)
        axes.set(xlabel="clients, the worst first", ylabel=metric, title=f"after round {self.round:,}")
        axes.legend(frameon=False)
        return figure

    def metrics(self, namespace: str) -> dict[str, float]:
        """Return the values to log."""
        logged = {f"{namespace}/evaluated": float(len(self.clients))}
        for metric in self.values:
            if (over_clients := self.spread(metric)) is not None:
                named = over_clients._asdict().items()
                logged |= {f"{namespace}/{metric}/{name}": value for name, value in named if math.isfinite(value)}
        return logged

    def state_dict(self) -> dict[str, Any]:
        """Return the report as tensors and primitives."""
        return {
            "round": self.round,
            "clients": torch.from_numpy(self.clients),
            "samples": torch.from_numpy(self.samples),
            "values": {metric: torch.from_numpy(values) for metric, values in self.values.items()},
            "higher_is_better": dict(self.higher_is_better),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ClientReport:
        """Restore a report from its `state_dict`."""
        values = {metric: values.numpy() for metric, values in state["values"].items()}
        clients, samples = state["clients"].numpy(), state["samples"].numpy()
        return cls(state["round"], clients, samples, values, state["higher_is_better"])


def show_clients(trainer: pl.Trainer, report: ClientReport, namespace: str) -> None:
    """Log a histogram over clients and a table of the worst ones for each metric, to loggers that support them."""
    step = steps_logged(trainer)
    for metric, values in report.values.items():
        known = values[np.isfinite(values)]
        for writer in writers(trainer, "add_histogram") if len(known) else ():
            writer.add_histogram(f"{namespace}/{metric}", known, step)
        for writer in writers(trainer, "add_text"):
            writer.add_text(f"{namespace}/{metric}/worst", _table(metric, report.worst(metric)), step)


def draw_clients(trainer: pl.Trainer, report: ClientReport, namespace: str) -> None:
    """Log a figure of all clients for each metric."""
    for metric, values in report.values.items() if shows_figures(trainer) else ():
        if np.isfinite(values).any():
            show(trainer, f"{namespace}/{metric}/sorted", report.plot(metric))  # the histogram has the shorter name


def lay_out_clients(trainer: pl.Trainer, report: ClientReport, namespace: str) -> None:
    """Add one chart for each metric: the mean between the best and the worst tenth."""
    charts: dict[str, list[Any]] = {}
    for metric, higher in report.higher_is_better.items():
        low, high = ("worst10", "best10") if higher else ("best10", "worst10")
        charts[metric] = ["Margin", [f"{namespace}/{metric}/{name}" for name in ("mean", low, high)]]
    lay_out(trainer, {f"ClientMetrics: {namespace}": charts})


def _table(metric: str, rows: list[tuple[int, int, float]]) -> str:
    lines = [f"| client | samples | {metric} |", "|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {client} | {samples:,} | {value:.4g} |" for client, samples, value in rows)])
