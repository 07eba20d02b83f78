"""The reports of `ComputeAccounting` on the cost of a run: curves against compute, a figure, a table, a file."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from lightning_fedscale.callbacks.compute_accounting.parameter_counts import ParameterCounts
from lightning_fedscale.callbacks.compute_accounting.run_facts import trained_as
from lightning_fedscale.callbacks.compute_accounting.study import Measured
from lightning_fedscale.core.lightning.loggers import Layout, lay_out, run_folder, show, writers
from lightning_fedscale.devices.profiling.operator_counter import Operator
from lightning_fedscale.scaling import Law, Position
from lightning_fedscale.scaling.ledger import Ledger
from lightning_fedscale.scaling.position import plot
from lightning_fedscale.utils.memory import format_bytes

_UNITS = {1.0: "FLOPs", 1e3: "kFLOPs", 1e6: "MFLOPs", 1e9: "GFLOPs", 1e12: "TFLOPs", 1e15: "PFLOPs", 1e18: "EFLOPs"}
_FINEST = 100
"""The first point of the compute axis is at this step or later; steps are integers."""


class ComputeCurves:
    """The run's loss against compute, and in a sibling run ``predicted_optimal`` the predicted loss of the best size.

    Attributes:
        unit: FLOPs per step of the axis; 0 before the first point.
    """

    def __init__(self) -> None:
        self.unit = 0.0
        self._sibling: SummaryWriter | None = None
        self._begun = self._warned = False

    @property
    def tag(self) -> str:
        """The tag of both curves."""
        return f"compute/loss_by_{_UNITS[self.unit]}"

    def _begin(self, trainer: pl.Trainer, flops: float) -> None:
        """Choose the unit and lay out TensorBoard's charts."""
        if not self.unit:
            self.unit = max((unit for unit in _UNITS if flops / unit >= _FINEST), default=1.0)
        layout: Layout = {
            "ComputeAccounting": {
                "loss against compute": ["Multiline", [f"{self.tag}$"]],
                "parameters in the optimal band": [
                    "Margin", ["compute/params_by_law", "compute/optimal_params_low", "compute/optimal_params_high"],
                ],
                "size ratio": ["Multiline", ["compute/size_ratio$"]],
            }
        }  # fmt: skip
        lay_out(trainer, layout)

    def add(self, trainer: pl.Trainer, flops: float, loss: float | None, position: Position | None) -> None:
        """Add a point to each curve.

        Args:
            trainer: the Trainer.
            flops: FLOPs spent so far.
            loss: loss of the step or round, None if it has none.
            position: position under the law.
        """
        if not self._begun:
            self._begin(trainer, flops)
            self._begun = True
        at = int(flops / self.unit)
        if loss is not None and not math.isfinite(loss):
            if not self._warned:
                rank_zero_warn(f"ComputeAccounting: the loss is {loss}: the curve against compute leaves it out.")
            self._warned = True
        elif loss is not None:
            for writer in writers(trainer, "add_scalar"):
                writer.add_scalar(self.tag, loss, at)
        if position is not None and math.isfinite(position.optimal_loss):
            for writer in writers(trainer, "add_scalar"):
                if self._sibling is None:
                    self._sibling = SummaryWriter(f"{writer.log_dir}/predicted_optimal")
                self._sibling.add_scalar(self.tag, position.optimal_loss, at)
                break

    def close(self) -> None:
        """Close the writer of the sibling run."""
        if self._sibling is not None:
            self._sibling.close()
        self._sibling = None


class Report(NamedTuple):
    """What there is to say of a run at its end.

    Attributes:
        ledger: what was spent.
        size: the model's parameters.
        clients: number of clients that the position is about.
        operators: every operator of the steps that were counted.
        position: where the run stands, if a law says so.
        law: the law in use.
        no_position: why there is no position, in words.
        measured: what a study measured of runs like this one.
    """

    ledger: Ledger
    size: ParameterCounts
    clients: int
    operators: dict[str, Operator]
    position: Position | None
    law: Law | None
    no_position: str = ""
    measured: Measured | None = None


def print_report(report: Report) -> None:
    """Print table and advice, log figure and operators to TensorBoard, write ``position.json`` to the run's folder."""
    console = Console()
    console.print(_table(report.ledger, report.size, report.clients, report.position))
    if report.measured is not None:
        console.print(f"{report.measured.said}.", highlight=False)
    if report.position is not None:
        console.print(report.position.sentences(), highlight=False)
    elif report.no_position:
        console.print(f"No position: {report.no_position}.", highlight=False)


def save_report(trainer: pl.Trainer, report: Report) -> None:
    """Write ``position.json`` into the run's folder, and give figure, advice and operators to TensorBoard."""
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
        writer.add_text("compute/operators", _coverage(report.operators), trainer.global_step)


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


def _coverage(operators: dict[str, Operator]) -> str:
    rows = sorted(operators.items(), key=lambda item: (item[1].kind, -item[1].flops, item[0]))
    lines = [f"| {name} | {seen.kind} | {seen.calls:,} | {seen.flops:.3g} |" for name, seen in rows]
    return "\n".join(["| operator | FLOPs are | calls | FLOPs |", "|---|---|---:|---:|", *lines])
