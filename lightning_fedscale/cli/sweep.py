"""``fedscale sweep``: run the smallest sweep that a scaling law can be fitted to, and fit it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_fedscale.cli.files import made
from lightning_fedscale.cli.makers import Maker
from lightning_fedscale.utils.checks import integer


def sweep(
    module: Maker,
    data: Maker,
    flops: float,
    sizes: list[int] = [8, 16, 32, 64, 128],  # noqa: B006  # jsonargparse shows it as the default
    clients: list[int] | None = None,
    partition: str | None = None,
    argument: str = "size",
    method: str = "fed_avg",
    strategy: dict[str, Any] | None = None,
    batch_size: int | None = None,
    local_steps: int = 5,
    rates: list[float] = [0.5, 1.0, 2.0],  # noqa: B006
    seeds: int = 1,
    loss: str | None = None,
    law: str = "Rosenfeld",
    task: str = "this task",
    bootstrap: int = 200,
    accelerator: str = "auto",
    runs: str = "fedscale_sweep",
    output: str = ".",
    json: bool = False,
) -> None:
    """Train a module in several sizes, with several numbers of clients, and fit a scaling law to the runs.

    Args:
        module: class or function that makes the LightningModule of a size, such as my_package.MyModule; its other
            arguments follow as --module.name=value.
        data: class of the LightningDataModule, with a validation loader; its arguments follow as --data.name=value.
        flops: training compute of the largest runs, of all clients together, such as 1e12.
        sizes: values of the module's argument; they should span a factor of ten in parameters or more.
        clients: numbers of clients that train in a round; by default that of the partition's file, else 1 and 4.
        partition: how the data is divided: a name such as 'dirichlet', or the file of a saved partition; in equal parts
            by default.
        argument: name of the module's argument that sets the model's size.
        method: method of the clients, by a name of fedscale size, such as 'scaffold'.
        strategy: more arguments of FederatedStrategy, such as --strategy.compressor=qsgd.
        batch_size: a client's batch size; by default the data's own.
        local_steps: batches that a client trains on in a round.
        rates: learning rates to try for each size and number of clients, as multiples of the module's own; more are
            tried if the best is the first or the last.
        seeds: number of seeds; if there are several, the first tunes the learning rate, and only the others count.
        loss: name of the logged validation loss; by default the first of the usual names.
        law: form of the law, by name.
        task: the module's task, for which the law will hold.
        bootstrap: number of refits for the intervals.
        accelerator: accelerator, as for a Trainer.
        runs: folder for the runs' table; an interrupted sweep resumes there.
        output: folder for fedscale_law.json, report.md and fit.png.
        json: print one JSON object instead of tables.
    """
    from lightning_fedscale.cli.fit_summary import finish  # only after the arguments are checked
    from lightning_fedscale.cli.projects import check_accelerator
    from lightning_fedscale.scaling import fit as make_fit
    from lightning_fedscale.study.sweeping import sweep as run_sweep

    def show(row: dict[str, Any]) -> None:
        print(
            f"size {row['size']}, clients {row['clients']}, rate {row['learning_rate']:g}: {row['params']:,.0f}"
            f" parameters, {row['tokens']:,.0f} tokens or samples each, loss {row['loss']:.4f}",
            file=sys.stderr,
        )

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    check_accelerator(accelerator)
    bootstrap = integer("bootstrap", bootstrap, 0)
    for name, folder in (("runs", runs), ("output", output)):
        made(name, folder)
    run = module.version_of(run_sweep, {argument: sizes[0]} if sizes else {})
    run(
        module, data, sizes, flops, clients, partition=partition, method=method, strategy=strategy,
        argument=argument, folder=runs, loss=loss, batch_size=batch_size, local_steps=local_steps, rates=rates,
        seeds=seeds, trainer={"accelerator": accelerator}, each=show, say=say,
    )  # fmt: skip
    finish(make_fit([str(Path(runs, "runs.csv"))], law, bootstrap=bootstrap, task=task), output, json)
