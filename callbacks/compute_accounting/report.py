"""The report of `ComputeAccounting` at the end of a run: a table, advice, a file, a figure."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.table import Table

from lightning_fedscale.callbacks.compute_accounting.advice import sweep_advice
from lightning_fedscale.callbacks.compute_accounting.coverage import OperatorCoverage
from lightning_fedscale.callbacks.compute_accounting.parameter_counts import ParameterCounts
from lightning_fedscale.callbacks.compute_accounting.run_facts import trained_as
from lightning_fedscale.callbacks.compute_accounting.study import Measured
from lightning_fedscale.core.lightning.loggers import run_folder, show, writers
from lightning_fedscale.scaling import Law, Position
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.scaling.position import plot
from lightning_fedscale.utils.memory import format_bytes
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(
    __name__, {"ComputeCurves": "lightning_fedscale.callbacks.compute_accounting.curves.ComputeCurves"}
)


class Report(NamedTuple):
    """The results of a run.

    Attributes:
        ledger: its costs.
        size: the model's parameters.
        clients: number of clients of the position.
        coverage: the operators of the counted steps.
        position: its position, if a law applies.
        law: the law in use.
        chosen_by_task: whether the law was chosen by the task.
        no_position: why there is no position, in words.
        measured: the result of a study for runs like this one.
    """

    ledger: Ledger
    size: ParameterCounts
    clients: int
    coverage: OperatorCoverage
    position: Position | None
    law: Law | None
    chosen_by_task: bool = False
    no_position: str = ""
    measured: Measured | None = None


def report_run(trainer: pl.Trainer, module: pl.LightningModule, report: Report) -> None:
    """Print and save the results on rank 0, and say what to do if there is no position."""
    if trainer.is_global_zero:
        print_report(report)
        save_report(trainer, report)
    law = report.law
    if report.no_position and law is not None and not (report.chosen_by_task and law.fitted_on is None):
        rank_zero_warn(f"ComputeAccounting: no position under {law.name}: {report.no_position}")
    nothing_said = report.measured is None and report.position is None and report.chosen_by_task
    if nothing_said and (law is None or not law.problems):
        advice = sweep_advice(trainer, module, report.ledger.training_flops)
        rank_zero_info(f"ComputeAccounting: no law for this task yet: fit one. {advice}")


def print_report(report: Report) -> None:
    """Print the table of costs, and the study's result and the advice if there are any."""
    console = Console()
    console.print(_table(report.ledger, report.size, report.clients, report.position))
    if report.measured is not None:
        console.print(f"{report.measured.said}.", highlight=False)
    if report.position is not None:
        console.print(report.position.sentences(), highlight=False)
    elif report.no_position:
        console.print(f"No position: {report.no_position}.", highlight=False)


def save_report(trainer: pl.Trainer, report: Report) -> None:
    """Write ``position.json`` into the run's folder, and log figure, advice and operators to TensorBoard."""
    position, measured = report.position, report.measured
    if (folder := run_folder(trainer)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        facts = _facts(report.ledger, report.size, report.clients, position, report.no_position)
        facts["trained_as"] = trained_as(trainer)
        facts["measured"] = None if measured is None else measured._asdict()
        (folder / "position.json").write_text(json.dumps(facts, indent=1), "utf8")
    if position is not None and report.law is not None:
        show(trainer, "compute/position", plot(position, report.law))
    for writer in writers(trainer, "add_text"):
        if measured is not None:
            writer.add_text("compute/measured", measured.said, trainer.global_step)
        if position is not None:
            writer.add_text("compute/advice", position.sentences(), trainer.global_step)
        writer.add_text("compute/operators", report.coverage.table(), trainer.global_step)


def _facts(
    ledger: Ledger, size: ParameterCounts, clients: int, position: Position | None, no_position: str
) -> dict[str, Any]:
    """Return what a fit needs to know of the run: its cost, and its position if a law gives one."""
    facts: dict[str, Any] = {
        "params": ledger.average_params, "tokens": ledger.tokens, "flops": ledger.training_flops, "clients": clients,
        "samples": ledger.samples, "seconds": ledger.seconds, "joules": ledger.joules,
        "upload_bytes": ledger.upload_bytes, "download_bytes": ledger.download_bytes,
        "flops_by_purpose": ledger.flops, "parameters": size._asdict(),
        "flops_interval": list(ledger.flops_interval), "steps": ledger.steps, "counted_steps": ledger.counted,
    }  # fmt: skip
    # A position may be that at the end of a budget; the costs are always those spent so far.
    return {"law": None, "no_position": no_position, **({} if position is None else position.as_dict()), **facts}


def _table(ledger: Ledger, size: ParameterCounts, clients: int, position: Position | None) -> Table:
    table = Table(title="What the run cost", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    flops, ratio, (low, high) = ledger.flops, ledger.six_n_ratio, ledger.flops_interval
    rows = [
        ("Active parameters, mean over tokens", f"{ledger.average_params:,.0f}"),
        ("  of all parameters", f"{size.total:,}"),
        ("Tokens or samples", f"{ledger.tokens:,.0f}"),
        ("Training FLOPs", f"{ledger.training_flops:.3e}"),
        ("  95 % interval, since steps differ", f"{low:.3e} to {high:.3e}" if low < high else ""),
        ("  counted in steps", f"{ledger.counted:,.0f} for {ledger.steps:,.0f}" if ledger.steps else ""),
        ("  forward and backward", f"{flops['forward']:.2e} and {flops['backward']:.2e}"),
        ("  of 6 x parameters x tokens", "" if math.isnan(ratio) else f"{ratio:.2f} times"),
        (f"  mean of {clients:,} clients a round" if clients > 1 else "", f"{ledger.training_flops / clients:.3e}"),
        *((f"FLOPs of {purpose}", f"{flops[purpose]:.2e}") for purpose in flops if purpose not in _TRAINING),
        ("Seconds", f"{ledger.seconds:,.1f}"),
        ("Energy", "" if ledger.joules is None else f"{ledger.joules:,.0f} J"),
        ("Sent and received", _bytes(ledger)),
    ]
    if position is not None:
        for each in position.readings if position.known_rho and position.known_rho.is_span else (position,):
            at = f", rho {each.rho:g}" if position.known_rho else ""
            rows += [
                (f"Best size under {each.law}{at}", f"{each.optimal_params:,.0f}"),
                ("  95 % interval by its constants", _ends(*each.ends)),
                ("  within 1 % of its loss", _ends(each.low, each.high)),
                ("Predicted loss", _number(each.predicted_loss)),
                ("  of the best size", _number(each.optimal_loss)),
            ]
        if round(position.params) != round(ledger.average_params):
            rows.append((f"Parameters as {position.law} counts them", f"{position.params:,.0f}"))
    for name, value in rows:
        if name and value and value != f"{0:.2e}":
            table.add_row(name, value)
    return table


_TRAINING = ("forward", "backward")


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""


def _bytes(ledger: Ledger) -> str:
    if not ledger.upload_bytes:
        return ""
    return f"{format_bytes(int(ledger.upload_bytes))} and {format_bytes(int(ledger.download_bytes))}"


def _ends(low: float, high: float) -> str:
    return f"{low:,.0f} to {high:,.0f}" if math.isfinite(low + high) else ""
