"""``fedscale fit``: fit a scaling law to runs."""

from __future__ import annotations

from glob import glob
from pathlib import Path

from lightning_fedscale.cli.files import made


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
    from lightning_fedscale.cli.fit_summary import finish  # only after the arguments are checked
    from lightning_fedscale.scaling import fit as make_fit

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
