"""The facts of a run as plain dictionaries: metrics, costs, phases, probe, position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_fedscale.cli.run_page.run import Run, Series
from lightning_fedscale.types import NAMESPACES
from lightning_fedscale.utils.fairness import part_of_spread

_PARTS = ("train", "training", "val", "valid", "validation", "test", "step", "epoch", "round")
"""Parts of a metric's name that do not identify the metric."""


def facts(run: Run) -> dict[str, Any]:
    """Return all facts for JSON; missing ones are left out, and numbers that are not finite become None."""
    found = {
        "run": str(run.folder),
        f"{run.unit}s": steps(run),
        "metrics": metrics(run),
        "clients": clients(run),
        "costs": costs(run),
        "phases": phases(run),
        "position": position(run),
        "probe": {name.removeprefix("probe/"): run.last(name) for name in run.scalars if name.startswith("probe/")},
        "settings": {name: value if _plain(value) else str(value) for name, value in run.settings.items()},
        "curves": {
            name: {"steps": values.index.tolist(), "values": values.tolist()} for name, values in run.scalars.items()
        },
    }
    return {name: _finite(value) for name, value in found.items() if value not in ({}, None)}


def steps(run: Run) -> int:
    """Return the number of rounds, or of steps up to the last logged one."""
    if run.federated:
        return len(run.scalars["round/clients"])
    return max((int(values.index[-1]) + 1 for values in run.scalars.values()), default=0)


def metrics(run: Run) -> dict[str, dict[str, float]]:
    """Return the last, lowest and highest value of the user's metrics and of the rounds' loss."""
    shown = sorted(filter(is_metric, run.scalars), key=lambda name: name == "round/loss")  # the user's own first
    known = {name: run.scalars[name].dropna() for name in shown}
    return {
        name: {"last": float(values.iloc[-1]), "lowest": float(values.min()), "highest": float(values.max())}
        for name, values in known.items()
        if len(values)
    }


def is_metric(name: str) -> bool:
    """Return whether a name is a metric of the model, rather than a statistic of the training.

    Example:
        >>> [name for name in ("val_loss", "round/loss", "round/seconds", "lr-SGD") if is_metric(name)]
        ['val_loss', 'round/loss']
    """
    if name.partition("/")[0] in NAMESPACES:
        return name == "round/loss"
    return name != "hp_metric" and not name.startswith("lr-")


def kind_of(name: str) -> str:
    """Return which metric a name stands for on any data; curves of one kind share a chart.

    Example:
        >>> kind_of("val_loss"), kind_of("round/loss"), kind_of("train/acc_epoch"), kind_of("epoch")
        ('loss', 'loss', 'acc', 'epoch')
    """
    words = [word for word in name.replace("/", "_").split("_") if word not in _PARTS]
    return "_".join(words) or name


def clients(run: Run) -> dict[str, dict[str, float]]:
    """Return how the last values of `ClientMetrics` are distributed over clients."""
    found: dict[str, dict[str, float]] = {}
    for name, values in run.scalars.items():
        if (of := part_of_spread(name)) is not None:
            found.setdefault(of[0], {})[of[1]] = float(values.iloc[-1])
    return found


def costs(run: Run) -> dict[str, float]:
    """Return the run's costs, from the ledger of `ComputeAccounting` if there is one, else as logged by rounds."""
    ledger, by_purpose = run.position, run.position.get("flops_by_purpose", {})
    found: dict[str, float | None] = {
        "flops": ledger.get("flops", run.last("compute/flops_total")),
        **{f"flops_{purpose}": spent or None for purpose, spent in by_purpose.items()},
        "tokens": ledger.get("tokens", run.last("compute/tokens")),
        "params": ledger.get("params", run.last("compute/params")),
        "clients": ledger.get("clients", run.settings.get("federated/num_clients")) if run.federated else None,
        "samples": ledger.get("samples") or _sum(run, "round/samples"),
        "local_steps": _sum(run, "round/local_steps"),
        "upload_bytes": ledger.get("upload_bytes") or _sum(run, "round/upload_bytes"),
        "download_bytes": ledger.get("download_bytes") or _sum(run, "round/download_bytes"),
        "seconds": ledger.get("seconds") or _sum(run, "round/seconds"),
        "simulated_seconds": run.last("round/simulated_total"),
        "joules": ledger.get("joules"),
        "epsilon": run.last("round/epsilon"),
        "rejected_updates": _sum(run, "round/rejected") or None,
        "dropped_clients": _sum(run, "round/dropped") or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def phases(run: Run) -> dict[str, Any]:
    """Return the critical phases, and the last gradient noise."""
    critical = run.scalars.get("phase/critical")
    if critical is None:
        return {}
    names = ("scale", "noise_scale", "noise_scale_low", "noise_scale_high", "critical_batch", "critical_cohort")
    known = {name: run.last(f"phase/{name}") for name in names}
    found = {"critical_share": float(critical.mean()), "spans": [list(span) for span in run.spans()]}
    return {**found, **{name: value for name, value in known.items() if value is not None}}


def position(run: Run) -> dict[str, Any]:
    """Return the run's position under a law; empty without a law."""
    names = ("law", "rho", "params", "optimal_params", "optimal_params_95", "low", "high", "size_ratio",
             "predicted_loss", "optimal_loss", "excess_loss", "catch_up", "advice", "outside")  # fmt: skip
    if run.position.get("law") is None:
        return {}
    return {name: run.position[name] for name in names if run.position.get(name) not in (None, [], [None, None])}


def _sum(run: Run, name: str) -> float | None:
    values: Series[float] | None = run.scalars.get(name)
    return None if values is None else float(values.sum())


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
