"""``fedscale fit``: fit a scaling law to runs."""

from __future__ import annotations

import json as json_format
from glob import glob
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_fedscale.cli.files import made, written
from lightning_fedscale.scaling import LAW_FILE, Fit, write_report
from lightning_fedscale.scaling import fit as make_fit


def fit(
    runs: list[str],
    law: str = "Rosenfeld",
    loss: str | None = None,
    task: str = "this task",
    holdout: bool = True,
    bootstrap: int = 200,
    flops_per: float | None = None,
    partition: str | None = None,
    method: str | None = None,
    batch_size: int | None = None,
    local_steps: int | None = None,
    output: str = ".",
    json: bool = False,
) -> None:
    """Fit a scaling law to runs, and write it, a report and a figure.

    Args:
        runs: CSV files, or directories of runs that were trained with ComputeAccounting; patterns such as 'multirun/*'
            are accepted.
        law: form of the law, by name.
        loss: name of the logged loss; by default the first of the usual names.
        task: the task of the runs, for which the law will hold.
        holdout: first measure the error on the runs of the largest compute, by a fit without them.
        bootstrap: number of refits for the intervals.
        flops_per: expected FLOPs per parameter and token, if these are far from 6.
        partition: fit only the runs of this partition: a partitioner's name, or the file of a saved partition.
        method: fit only the runs of this method.
        batch_size: fit only the runs with this batch size.
        local_steps: fit only the runs with this number of local steps.
        output: folder for fedscale_law.json, report.md and fit.png.
        json: print one JSON object instead of tables.
    """
    made("output", output)
    found = make_fit(
        _expanded(runs), law, holdout=holdout, bootstrap=bootstrap, loss=loss, task=task, flops_per=flops_per,
        partition=partition, method=method, batch_size=batch_size, local_steps=local_steps,
    )  # fmt: skip
    finish(found, output, json)


def _expanded(runs: list[str]) -> list[str]:
    """Expand patterns that the shell has not; keep what matches nothing, so that an error names it."""
    return [
        path
        for each in runs
        for path in ([each] if Path(each).exists() else sorted(glob(each, recursive=True)) or [each])
    ]


def finish(found: Fit, output: str, json: bool) -> None:
    """Write a fit's law and report, and print a summary."""
    page, law = Path(output, "report.md"), Path(output, LAW_FILE)
    written("output", str(page), lambda: write_report(found, output))
    written("output", str(law), lambda: found.save(law))
    if json:
        document: dict[str, Any] = json_format.loads(law.read_text(encoding="utf-8"))
        document.pop("refits")
        print(json_format.dumps({**document, "file": str(law), "report": str(page)}))
        return
    console = Console(soft_wrap=True, highlight=False)
    table = Table("Constant", "Value", "95 % interval", title=f"{found.law.name}, fitted to {found.runs} runs")
    rows = {**found.intervals, **({} if found.rho is None else {"rho": found.rho})}
    for name, each in rows.items():
        table.add_row(name, f"{each.value:.4g}", each.ends if found.bootstrap else "")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    if trained := str(found.made_for):
        console.print(f"Fitted to runs with {trained}")
    is_known = found.held_out == found.held_out
    largest = f"; {found.held_out:.2g} for the runs of the largest compute, by a fit without them" if is_known else ""
    console.print(f"RMS error of log(loss): {found.error:.2g} for all runs{largest}")
    if found.rho is not None:
        console.print(f"How rho was measured: {found.learning_rate}")
    for note in found.notes:
        console.print(f"Note: {note}")
    if found.problems:
        console.print(
            f"These runs do not determine a best size: {'; '.join(found.problems)}. Correct the table, or add runs to"
            " it."
        )
    console.print(f"Law: {law} (in its folder, law='auto' uses it). Report: {page}")
