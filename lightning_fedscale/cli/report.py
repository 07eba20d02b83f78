"""``fedscale report``: write one page about a finished run."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from rich.console import Console
from rich.table import Table


def report(run: str, output: str | None = None, json: bool = False) -> None:
    """Write one page about a finished run: curves, phases, position, costs, probe and settings.

    Args:
        run: folder of a logger, such as lightning_logs/version_0, with TensorBoard's events, metrics.csv, hparams.yaml
            or position.json; sections without data are left out.
        output: file to write, .html or .md; by default report.html in that folder.
        json: print all numbers as one JSON object, curves included, instead of a table.
    """
    from lightning_fedscale.cli.run_page import facts, read_run, write_page  # only after the arguments are checked

    found = read_run(run)
    page = write_page(found, found.folder / "report.html" if output is None else Path(output))
    known = facts(found)
    if json:
        print(json_format.dumps({**known, "page": str(page)}))
        return
    console = Console(soft_wrap=True, highlight=False)
    table = Table("Metric", "Last", "Lowest", "Highest", title=str(found.folder))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, of in known.get("metrics", {}).items():
        table.add_row(name, *(f"{of[each]:.4g}" for each in ("last", "lowest", "highest")))
    console.print(table)
    if advice := known.get("position", {}).get("advice"):
        console.print(f"{advice.capitalize()}.")
    console.print(f"Report: {page}")
