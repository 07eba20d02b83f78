"""``fedscale plan``: what compute buys for a number of clients."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_fedscale.devices import device_class
from lightning_fedscale.memory import format_bytes
from lightning_fedscale.scaling import Law, Plan, law_by_name, law_from_file, plot_plans
from lightning_fedscale.scaling import plan as make_plan


def plan(
    flops: float,
    clients: int | list[int] = 1,
    law: str = "Chinchilla",
    rho: float | None = None,
    device: str | None = None,
    tokens: float | None = None,
    local_steps: int = 30,
    plot: str | None = None,
    json: bool = False,
) -> None:
    """Say how large a model to train, on how much data, for so much compute and so many clients.

    Args:
        flops: training compute of all clients together, such as 1e20.
        clients: number of clients; several in a list, '[1, 10, 100]'.
        law: a scaling law by name, or a file that Fit.save wrote.
        rho: what division among clients costs: 1 counts the average client's compute, 0 all of it; by default that of
            the law's file, else 1.
        device: what the clients are, such as 'phone', for memory and time.
        tokens: that each client holds, if that is few.
        local_steps: batches between exchanges.
        plot: file for a figure of size and loss over the number of clients.
        json: print one JSON object instead of a table.
    """
    chosen, fitted = _law(law)
    rho = (1.0 if fitted is None else fitted) if rho is None else rho
    kind = None if device is None else device_class(device)
    plans = [
        make_plan(flops, number, chosen, rho, kind, tokens, local_steps)
        for number in ([clients] if isinstance(clients, int) else clients)
    ]
    if plot is not None:
        plot_plans(plans).savefig(plot, dpi=150)
    if json:
        print(json_format.dumps({str(found.clients): found.as_dict() for found in plans}))
        return
    _show(Console(soft_wrap=True), plans)


def _law(law: str) -> tuple[Law, float | None]:
    if Path(law).suffix == ".json":
        return law_from_file(law)
    found = law_by_name(law)
    found.check()
    return found, None


def _show(console: Console, plans: list[Plan]) -> None:
    first = plans[0]
    title = f"{first.flops:.3g} FLOPs, {first.law}, rho {first.rho:g}" + (f", {first.device}" if first.device else "")
    table = Table("", *(f"{each.clients:,} client{'s' if each.clients > 1 else ''}" for each in plans), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    cells = [_cells(each) for each in plans]
    for name in cells[0]:
        if any(row := [each[name] for each in cells]):
            table.add_row(name, *row)
    console.print(table)
    if any(each.fits is False for each in plans):
        console.print(f"(!) more than {first.device} holds, without activations")


def _cells(plan: Plan) -> dict[str, str]:
    def known(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return {
        "Parameters": f"{plan.params:.3g}",
        "Tokens per client": f"{plan.tokens_per_client:.3g}",
        "Predicted loss": f"{plan.loss:.4g}",
        "Batch per client, in tokens": known(plan.batch_per_client, ",.0f"),
        "Rounds": known(plan.rounds, ",.0f"),
        "Inner learning rate": known(plan.inner_learning_rate, ".2g"),
        "Outer learning rate": known(plan.outer_learning_rate, ".2g"),
        "Sent and received per client": "" if plan.bytes_per_client is None else format_bytes(plan.bytes_per_client),
        "Weights, gradients, moments": format_bytes(plan.training_bytes) + (" (!)" if plan.fits is False else ""),
        "Days": known(plan.days, ",.1f"),
    }
