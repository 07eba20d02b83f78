"""``fedscale plan``: plan a run for a compute budget and a number of clients."""

from __future__ import annotations

import json as json_format
import warnings
from typing import Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lightning_fedscale.cli.files import written
from lightning_fedscale.devices import device_class
from lightning_fedscale.scaling import Plan, plot_plans
from lightning_fedscale.scaling import plan as make_plan
from lightning_fedscale.utils.memory import format_bytes


def plan(
    flops: float,
    clients: int | list[int] | None = None,
    law: str = "auto",
    rho: float | list[float] | Literal["auto"] = "auto",
    device: str | list[str] | None = None,
    tokens: float | None = None,
    local_steps: int | None = None,
    utilization: float = 0.3,
    activation_bytes: float | None = None,
    batch_size: int | None = None,
    method: str | None = None,
    partition: str | None = None,
    plot: str | None = None,
    json: bool = False,
) -> None:
    """Plan how large a model to train, on how much data, for a compute budget and a number of clients.

    Args:
        flops: training compute of all clients together, such as 1e20.
        clients: number of clients that train in a round; several in a list, '[1, 10, 100]'; by default those of
            the partition, or of the law's runs.
        law: a scaling law by name, or a file of fedscale fit; by default fedscale_law.json of this folder if there is
            one, else Chinchilla's, which holds for text.
        rho: cost of dividing the compute among clients: 1 counts the average client's compute, 0 that of all clients;
            the two ends of an interval in a list; by default the value measured with the law, else 0 to 1, and the plan
            is for 1.
        device: device class of the clients, such as 'phone', for memory and time; several in a list, '[phone, jetson]'.
        tokens: tokens that each client has, if these are few.
        local_steps: batches between exchanges; by default those of the law's runs, else 30.
        utilization: fraction of the devices' peak speed that training reaches.
        activation_bytes: bytes per token in the batch, to limit the batch by memory; fedscale probe finds them per
            sample.
        batch_size: a client's batch size, in samples; by default that of the law's runs.
        method: method of the clients, such as 'scaffold', to be compared with the law's runs.
        partition: how the data will be divided, to be compared with the law's runs: a partitioner's name, or the file
            of a saved partition.
        plot: file for a figure of size and loss over the number of clients.
        json: print one JSON object instead of a table.
    """
    kinds = [device_class(name) for name in ([device] if isinstance(device, str) else device or [])]
    numbers = clients if isinstance(clients, list) else [clients]
    if not numbers:
        raise ValueError("clients=[]: pass at least one number of clients.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="plan: ")  # printed as notes instead
        plans = [
            make_plan(
                flops, number, law, rho, kinds, tokens, local_steps, utilization, activation_bytes,
                batch_size=batch_size, method=method, partition=partition,
            )
            for number in numbers
        ]  # fmt: skip
    if plot is not None:
        written("plot", plot, lambda: plot_plans(plans).savefig(plot, dpi=150))
    if json:
        print(json_format.dumps({str(found.clients): found.as_dict() for found in plans}))
        return
    _show(Console(soft_wrap=True), plans)


def _show(console: Console, plans: list[Plan]) -> None:
    table = _table(plans)
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
