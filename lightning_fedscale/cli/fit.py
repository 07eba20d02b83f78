"""``fedscale fit``: a scaling law of one's own, from runs."""

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
    output: str = ".",
    json: bool = False,
) -> None:
    """Fit a scaling law to runs, and write it, a report and a figure.

    Args:
        runs: CSV files, or directories of runs that were trained with ComputeAccounting; patterns such as 'multirun/*'
            will do.
        law: form of the law, by name.
        loss: name of the logged loss; by default the first of the usual names.
        task: what the runs did; the law holds for that.
        holdout: keep the runs of the largest compute out and report their error.
        bootstrap: number of refits behind the intervals.
        flops_per: FLOPs per parameter and token, where these are right and far from 6.
        output: folder for fedscale_law.json, report.md and fit.png.
        json: print one JSON object instead of tables.
    """
    made("output", output)
    found = make_fit(
        _expanded(runs), law, holdout=holdout, bootstrap=bootstrap, loss=loss, task=task, flops_per=flops_per
    )  # fmt: skip
    finish(found, output, json)


def _expanded(runs: list[str]) -> list[str]:
    """Patterns that no shell has expanded; what matches nothing stays as it is, to be named."""
    return [
        path
        for each in runs
        for path in ([each] if Path(each).exists() else sorted(glob(each, recursive=True)) or [each])
    ]


def finish(found: Fit, output: str, json: bool) -> None:
    """Write a fit's law and report, and show it."""
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
    held_out = "" if found.held_out != found.held_out else f", {found.held_out:.2g} of the largest, which were held out"
    console.print(f"Error of the log-loss: {found.error:.2g} of the runs that were fitted{held_out}")
    if found.rho is not None:
        console.print(f"rho: {found.learning_rate}")
    for note in found.notes:
        console.print(f"Note: {note}")
    if found.problems:
        console.print(f"No best size: {'; '.join(found.problems)}. Mend the table, or add runs to it.")
    console.print(f"Law: {law} (law='auto' takes it, in its folder); report: {page}")
