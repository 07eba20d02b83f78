"""The table of ``fedscale plan``."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lightning_fedscale.scaling import Plan
from lightning_fedscale.utils.memory import format_bytes


def show(plans: list[Plan]) -> None:
    """Print a table with a column for each plan, or one table each if the console is too narrow."""
    console, table = Console(soft_wrap=True), _table(plans)
    if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
        console.print(table)
    else:
        for each in plans:
            console.print(_table([each]))
    if plans[0].made_for:
        console.print(f"The law was fitted to runs with {plans[0].made_for}")
    for note in dict.fromkeys(note for each in plans for note in each.notes):
        console.print(f"Note: {note}")
    if any(each.fits is False for each in plans):
        devices = plans[0].devices
        which = f"at least one of {', '.join(devices)}" if len(devices) > 1 else devices[0]
        console.print(f"(!) does not fit into the memory of {which}")


def _table(plans: list[Plan]) -> Table:
    first = plans[0]
    devices = ", ".join(first.devices)
    title = f"{first.flops:.3g} FLOPs, {first.law} ({first.task}), {plans[-1].of_rho}" + (devices and f", {devices}")
    table = Table("", *(f"{each.clients:,} client{'s' if each.clients > 1 else ''}" for each in plans), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns:
        column.overflow = "fold"  # truncated numbers would be wrong
    cells = [_cells(each) for each in plans]
    for name in cells[0]:
        if any(row := [each[name] for each in cells]):
            table.add_row(name, *row)
    return table


def _cells(plan: Plan) -> dict[str, str]:
    def known(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def ends(low: float | None, high: float | None, form: str) -> str:
        return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"

    name, size = plan.argument or "", "" if plan.size is None else f"{plan.size:g}"
    if plan.size_between is not None:
        size += " (between {:g} and {:g})".format(*plan.size_between)
    return {
        "Parameters": f"{plan.params:.3g}",
        "  95 % interval": ends(plan.params_low, plan.params_high, ".3g"),
        f"  as {name}": size,
        f"  {name}, 95 % interval": ends(plan.size_low, plan.size_high, "g"),
        "Tokens per client": f"{plan.tokens_per_client:.3g}",
        "  passes over the data": known(plan.passes, ".3g"),
        "Predicted loss": known(plan.loss, ".4g"),
        "  its 95 % interval": ends(plan.loss_low, plan.loss_high, ".4g"),
        "Batch per client, in tokens": known(plan.batch_per_client, ",.0f"),
        "  limited by": plan.batch_limit or "",
        "Method": plan.method or "",
        "Local steps": f"{plan.local_steps:,}",
        "Rounds": known(plan.rounds, ",.0f"),
        "Inner learning rate": known(plan.inner_learning_rate, ".2g"),
        "Outer learning rate": known(plan.outer_learning_rate, ".2g"),
        "Sent and received per client": "" if plan.bytes_per_client is None else format_bytes(plan.bytes_per_client),
        "Weights, gradients, moments": format_bytes(plan.training_bytes) + (" (!)" if plan.fits is False else ""),
        "Days": known(plan.days, ",.1f"),
    }
