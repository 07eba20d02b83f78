"""What a report says, in order: sections of text, rows and pictures, whatever page they end up on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning_fedscale.fairness import Spread
from lightning_fedscale.memory import format_bytes
from lightning_fedscale.report.charts import (
    Picture,
    client_charts,
    metric_charts,
    phase_charts,
    position_chart,
    round_charts,
    spread_charts,
)
from lightning_fedscale.report.facts import clients, costs, metrics, phases, position, steps
from lightning_fedscale.report.run import Run

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
    "rejected_updates": "Updates left out, not finite",
    "dropped_clients": "Clients that did not answer in time",
}

_POSITION = {
    "law": "Law",
    "rho": "rho, what division among clients costs",
    "params": "Parameters",
    "optimal_params": "Best size for this compute",
    "optimal_params_95": "  between, by the law's constants (95 %)",
    "low": "  within 1 % of its loss, from",
    "high": "  to",
    "size_ratio": "Times too large",
    "predicted_loss": "Predicted loss",
    "optimal_loss": "  of the best size",
    "excess_loss": "  difference",
    "catch_up": "Times the compute that would make this size the best",
}

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
        title: its heading.
        text: sentences.
        rows: a table, the first row its head; empty for none.
        pictures: charts and figures.
    """

    title: str
    text: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to say."""
        return not (self.text or len(self.rows) > 1 or self.pictures)


def sections(run: Run) -> list[Section]:
    """All that there is to say of a run."""
    parts = [_metrics(run), _phases(run), _position(run), _costs(run), _rounds(run), _clients(run), _probe(run),
             _settings(run)]  # fmt: skip
    return [part for part in parts if not part.empty]


def headline(run: Run) -> str:
    """What ran, in a line."""
    clients = run.settings.get("federated/num_clients", run.position.get("clients"))
    cohort = run.settings.get("federated/clients_per_round")
    among = f" with {clients:,} clients" if run.federated and isinstance(clients, int) else ""
    each = f", {cohort:,} in each" if among and isinstance(cohort, int) and cohort != clients else ""
    number = steps(run)
    return f"{number:,} {run.unit}{'' if number == 1 else 's'}{among}{each}"


def number(value: Any) -> str:
    """A number as people read it.

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
    rows = [
        (name.replace("_", " "), number(of)) for name, of in found.items() if name not in ("spans", "critical_share")
    ]
    pictures = [*phase_charts(run), *_logged(run, "phase/")]
    return Section("Critical phases", (text,), (("", ""), *rows), tuple(pictures))


def _position(run: Run) -> Section:
    found = position(run)
    advice = str(found.get("advice", ""))
    rows = [(label, _range(found[name])) for name, label in _POSITION.items() if name in found]
    pictures = _logged(run, "compute/")
    if not pictures and (drawn := position_chart(found)):
        pictures = [drawn]
    text = (f"{advice[0].upper()}{advice[1:]}.",) if advice else ()
    return Section("Is the model of the right size?", text, (("", ""), *rows) if rows else (), tuple(pictures))


def _range(value: Any) -> str:
    return " to ".join(map(number, value)) if isinstance(value, list) else number(value)


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
    rows = [
        (name.replace("_", " "), format_bytes(value) if "bytes" in name else number(value))
        for name, value in found.items()
    ]
    return Section("How large a batch fits", rows=(("", ""), *rows), pictures=tuple(_logged(run, "probe/")))


def _settings(run: Run) -> Section:
    return Section("Settings", rows=(("", ""), *((name, number(value)) for name, value in run.settings.items())))


def _logged(run: Run, namespace: str) -> list[Picture]:
    return [Picture(name, data, "png") for name, data in sorted(run.pictures.items()) if name.startswith(namespace)]
