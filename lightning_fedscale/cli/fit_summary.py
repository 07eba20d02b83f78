"""The files and the summary of ``fedscale fit`` and ``fedscale sweep``."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_fedscale.cli.files import written
from lightning_fedscale.scaling import LAW_FILE, Fit, write_report


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
