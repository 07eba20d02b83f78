"""``fedscale size``: find what to train, by runs on the project's own clients."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_fedscale.cli.files import made, written
from lightning_fedscale.cli.makers import Maker


def size(
    module: Maker,
    data: Maker,
    flops: float,
    argument: str = "size",
    current: int | None = None,
    partition: str = "iid",
    clients: int | None = None,
    clients_per_round: int | None = None,
    study_minutes: float = 30.0,
    study_flops: float | None = None,
    sizes: list[int] | None = None,
    methods: list[str] | None = None,
    strategy: dict[str, Any] | None = None,
    batch_sizes: list[int] | None = None,
    local_steps: list[int] = [5, 20],  # noqa: B006  # jsonargparse shows it as the default
    rates: list[float] = [0.25, 1.0, 4.0],  # noqa: B006
    seeds: int = 3,
    seed: int = 0,
    loss: str | None = None,
    workers: int = 1,
    accelerator: str = "auto",
    runs: str = "fedscale_size",
    output: str = ".",
    json: bool = False,
) -> None:
    """Find the size, method, batch and local steps for clients and a budget, by training on the clients' own data.

    Args:
        module: class or function that makes the LightningModule of a size, such as my_package.MyModule; its other
            arguments follow as --module.name=value.
        data: class of the LightningDataModule, with a validation loader; its arguments follow as --data.name=value.
        flops: training compute of a whole run, of all clients together, such as 1e12.
        argument: name of the module's argument that sets the model's size.
        current: value of the argument in the current model; by default the argument's default.
        partition: a partitioner's name, or a file of fedscale partition --save.
        clients: number of clients, for a partitioner's name; 10 by default.
        clients_per_round: number of clients that train in a round; all by default.
        study_minutes: time limit of the study, in minutes.
        study_flops: limit of the study's training compute; none by default.
        sizes: sizes to try; by default seven around the current one, by factors of two.
        methods: methods to try, by name; by default all known ones.
        strategy: arguments of FederatedStrategy for all methods, such as --strategy.compressor=qsgd.
        batch_sizes: a client's batch sizes to try; by default the data's own and four times that.
        local_steps: numbers of batches of a client in a round to try.
        rates: learning rates to try, as multiples of the module's own.
        seeds: number of seeds of the finalists, besides the one that selects them.
        seed: seed of weights, partition and order.
        loss: name of the logged validation loss; by default the first of the usual names.
        workers: number of processes that train at the same time.
        accelerator: accelerator, as for a Trainer.
        runs: folder for every run; an interrupted study resumes there.
        output: folder for size.md, size.png and size.json.
        json: print one JSON object instead of a table and sentences.
    """
    from lightning_fedscale.cli.projects import check_accelerator  # only after the arguments are checked
    from lightning_fedscale.study import size as find
    from lightning_fedscale.study.answer_page import PAGE, rows_of, sentences, write

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    check_accelerator(accelerator)
    for name, folder in (("runs", runs), ("output", output)):
        made(name, folder)
    answer = module.version_of(find, {} if current is None else {argument: current})(
        module, data, flops, argument=argument, partition=partition, clients=clients,
        clients_per_round=clients_per_round, current=current, sizes=sizes, methods=methods, strategy=strategy,
        batch_sizes=batch_sizes, local_steps=local_steps, rates=rates, study_minutes=study_minutes,
        study_flops=study_flops, seeds=seeds, seed=seed, loss=loss, workers=workers, folder=runs,
        trainer={"accelerator": accelerator}, say=say,
    )  # fmt: skip
    written("output", str(Path(output, PAGE)), lambda: write(answer, output))
    if json:
        print(json_format.dumps(answer.as_dict()))
        return
    console = Console(soft_wrap=True, highlight=False)
    rows = rows_of(answer)
    table = Table(*rows[0], title=f"{answer.flops:.3g} FLOPs, {answer.clients:,} clients")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for line in sentences(answer):
        console.print(line)
