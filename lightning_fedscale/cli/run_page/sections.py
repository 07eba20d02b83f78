"""The sections of a report in order, with text, rows and pictures, for any page format."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning_fedscale.cli.run_page.charts import (
    Picture,
    client_charts,
    metric_charts,
    phase_charts,
    position_chart,
    round_charts,
    spread_charts,
)
from lightning_fedscale.cli.run_page.facts import clients, costs, metrics, phases, position, steps
from lightning_fedscale.cli.run_page.run import Run
from lightning_fedscale.scaling.position import in_sentences
from lightning_fedscale.utils.fairness import Spread
from lightning_fedscale.utils.memory import format_bytes

_COSTS = {
    "flops": "Training FLOPs",
    "flops_forward": "FLOPs, forward",
    "flops_backward": "FLOPs, backward",
    "flops_optimizer": "FLOPs, optimizer",
    "flops_aggregation": "FLOPs, aggregation",
    "flops_evaluation": "FLOPs, evaluation",
    "flops_probing": "FLOPs, probing",
    "tokens": "Tokens or samples",
    "params": "Active parameters",
    "clients": "Clients",
    "samples": "Samples trained on",
    "local_steps": "Local batches",
    "upload_bytes": "Sent by all clients",
    "download_bytes": "Received by all clients",
    "seconds": "Seconds",
    "simulated_seconds": "Simulated seconds",
    "joules": "Joules",
    "epsilon": "Privacy spent, epsilon",
    "rejected_updates": "Updates excluded since they were not finite",
    "dropped_clients": "Clients that did not answer in time",
}

_POSITION = {
    "law": "Law",
    "rho": "rho: k clients with compute C are worth C / k^rho",
    "params": "Parameters",
    "optimal_params": "Best number of parameters for this compute",
    "optimal_params_95": "95 % interval of this number, from the law's constants",
    "band": "Sizes within 1 % of the best loss",
    "size_ratio": "Size over best size",
    "predicted_loss": "Predicted loss",
    "optimal_loss": "Predicted loss of the best size",
    "excess_loss": "Difference between these losses",
    "catch_up": "Compute at which this size is the best, over the run's compute",
}

_PHASES = {
    "scale": "Updates are multiplied by",
    "noise_scale": "Gradient noise scale, in samples",
    "noise_scale_low": "Gradient noise scale, lower end of the 95 % interval",
    "noise_scale_high": "Gradient noise scale, upper end of the 95 % interval",
    "critical_batch": "Critical batch, in samples",
    "critical_cohort": "Critical cohort, in clients",
}

_PROBE = {
    "max_batch": "Largest batch size that fits, in samples",
    "batch_size": "Batch size of training, in samples",
    "budget_bytes": "Memory budget",
    "predicted_bytes": "Predicted peak at the largest batch",
    "measured_bytes": "Measured peak",
    "bytes_per_sample": "Memory per sample",
    "real_steps": "Real steps of the probe",
    "seconds": "Seconds of the probe",
    "step_fixed_seconds": "Fixed seconds per step",
    "step_seconds_per_sample": "Seconds per sample",
    "step_residual": "Relative error of these seconds",
    "steps_timed": "Timed steps",
    "best_batch": "Batch size that reaches a target first, in samples",
}

_FIGURES = {
    "client/labels": "labels by client",
    "compute/position": "predicted loss of other sizes at this compute",
    "phase/course": "gradient norm and the detector's decisions",
    "probe/memory": "memory against batch size",
    "probe/time": "time against batch size",
}
"""Captions of the figures that callbacks draw."""

_SPREAD = {
    "mean": "mean",
    "weighted_mean": "weighted by samples",
    "worst10": "worst tenth",
    "best10": "best tenth",
    "std": "standard deviation",
    "jain": "Jain's index",
}


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        title: heading.
        text: paragraphs.
        rows: rows of a table, the first one its header; empty without a table.
        pictures: charts and figures.
    """

    title: str
    text: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether the section has no content."""
        return not (self.text or len(self.rows) > 1 or self.pictures)


def sections(run: Run) -> list[Section]:
    """Return the sections of a run that have content."""
    parts = [_metrics(run), _phases(run), _position(run), _costs(run), _rounds(run), _clients(run), _probe(run),
             _settings(run)]  # fmt: skip
    return [part for part in parts if not part.empty]


def headline(run: Run) -> str:
    """Summarise the run in one line."""
    clients = run.settings.get("federated/num_clients", run.position.get("clients"))
    cohort = run.settings.get("federated/clients_per_round")
    among = f" with {clients:,} clients" if run.federated and isinstance(clients, int) else ""
    each = f", {cohort:,} in each" if among and isinstance(cohort, int) and cohort != clients else ""
    number = steps(run)
    return f"{number:,} {run.unit}{'' if number == 1 else 's'}{among}{each}"


def number(value: Any) -> str:
    """Format a number for people.

    Example:
        >>> number(1234567.0), number(0.012341), number(3.2e12), number("sgd"), number(None)
        ('1,234,567', '0.01234', '3.2e+12', 'sgd', 'not known')
    """
    if value is None:
        return "not known"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _metrics(run: Run) -> Section:
    found = metrics(run)
    rows = [(name, *(number(of[each]) for each in ("last", "lowest", "highest"))) for name, of in found.items()]
    return Section("Metrics", rows=(("", "last", "lowest", "highest"), *rows), pictures=tuple(metric_charts(run)))


def _phases(run: Run) -> Section:
    found = phases(run)
    if not found:
        return Section("Critical phases")
    spans = ", ".join(f"{a} to {b}" if a != b else str(a) for a, b in found["spans"][:10])
    more = "" if len(found["spans"]) <= 10 else f" and {len(found['spans']) - 10} more"
    said = f"{found['critical_share']:.0%} of the {run.unit}s that were logged were critical"
    text = f"{said}: {run.unit}s {spans}{more}." if spans else f"{said}."
    if found["spans"] and found["spans"][0][0] == 0:
        text += " A detector counts everything as critical until it has enough data."
    rows = [(label, number(found[name])) for name, label in _PHASES.items() if name in found]
    pictures = [*phase_charts(run), *_logged(run, "phase/")]
    return Section("Critical phases", (text,), (("", ""), *rows), tuple(pictures))


def _position(run: Run) -> Section:
    found = position(run)
    advice = str(found.get("advice", ""))
    shown = {**found, **({"band": [found["low"], found["high"]]} if {"low", "high"} <= set(found) else {})}
    sizes = ("params", "optimal_params", "optimal_params_95", "band")
    rows = [(label, _range(shown[name], whole=name in sizes)) for name, label in _POSITION.items() if name in shown]
    pictures = _logged(run, "compute/")
    if not pictures and (drawn := position_chart(found)):
        pictures = [drawn]
    text = (in_sentences(advice, found["law"], found.get("outside", ())),) if advice else ()
    return Section("Is the model of the right size?", text, (("", ""), *rows) if rows else (), tuple(pictures))


def _range(value: Any, *, whole: bool) -> str:
    known = value if isinstance(value, list) else [value]
    return " to ".join(number(round(each) if whole else each) for each in known)


def _costs(run: Run) -> Section:
    found = costs(run)
    shown = {name: format_bytes(v) if name.endswith("_bytes") else number(v) for name, v in found.items()}
    return Section("What it cost", rows=(("", ""), *((label, shown[n]) for n, label in _COSTS.items() if n in shown)))


def _rounds(run: Run) -> Section:
    return Section("Rounds", pictures=tuple(round_charts(run)))


def _clients(run: Run) -> Section:
    found = clients(run)
    rows = [(name, *(number(of.get(part)) for part in Spread._fields)) for name, of in found.items()]
    head = ("", *(_SPREAD[part] for part in Spread._fields))
    drawn = [picture for namespace in ("client/", "clients/", "personal/") for picture in _logged(run, namespace)]
    pictures = (*spread_charts(run), *drawn, *client_charts(run))
    return Section("Clients", rows=(head, *rows) if rows else (), pictures=pictures)


def _probe(run: Run) -> Section:
    found = {name.removeprefix("probe/"): run.last(name) or 0.0 for name in run.scalars if name.startswith("probe/")}
    of_classes = {name: f"{_PROBE['max_batch']}: {name.partition('/')[2]}" for name in found if "/" in name}
    rows = [
        (label, format_bytes(found[name]) if "bytes" in name else number(found[name]))
        for name, label in {**_PROBE, **of_classes}.items()
        if name in found
    ]
    return Section("How large a batch fits", rows=(("", ""), *rows), pictures=tuple(_logged(run, "probe/")))


def _settings(run: Run) -> Section:
    return Section("Settings", rows=(("", ""), *((name, number(value)) for name, value in run.settings.items())))


def _logged(run: Run, namespace: str) -> list[Picture]:
    return [
        Picture(_caption(name), data, "png")
        for name, data in sorted(run.pictures.items())
        if name.startswith(namespace)
    ]


def _caption(name: str) -> str:
    value, _, last = name.rpartition("/")
    return f"{value} of every client" if last == "sorted" else _FIGURES.get(name, name)
