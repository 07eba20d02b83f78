"""``fedscale bench``: time the executors against a plain Trainer."""

from __future__ import annotations

import copy
import json as json_format
import math
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from lightning_fedscale.cli.digits import Classifier, Digits
from lightning_fedscale.cli.projects import check_accelerator
from lightning_fedscale.core.executors import ClientLoader
from lightning_fedscale.core.plan import pass_order, steps_from
from lightning_fedscale.partitioners import Partition, by_name
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.study.loaders import train_loader
from lightning_fedscale.study.trial import quiet
from lightning_fedscale.types import Cursor
from lightning_fedscale.utils.checks import integer

_TURNS = 3
"""Turns of each contender. Contenders alternate, so that a machine that slows down affects all of them."""

_WARM_UP = 25
"""Steps that are not timed: the vectorized executor records a graph at the twentieth step with the same signature."""

_FEWEST_ROUNDS = 3
"""Fewest rounds that are timed in a turn, even if they take longer than the turn."""

_NAMES = {
    "central": "plain Trainer, same number of batches",
    "sequential": "sequential",
    "vectorized": "vectorized",
}
_REASON = re.compile(r"executor=.*? cannot.*?: (.*?)\.?", re.DOTALL)
"""The warning of a strategy that gives up vectorization."""


class Pace(NamedTuple):
    """The timed rounds of an executor or of the plain Trainer.

    Attributes:
        seconds: seconds of each timed round; for the plain Trainer, of the same number of batches.
        obstacle: why this executor cannot train this module; None if it can.
    """

    seconds: list[float]
    obstacle: str | None = None

    def facts(self, batches: int, central: float) -> dict[str, Any]:
        """Summarise, given the number of batches in a round and the seconds that the plain Trainer takes for them."""
        if self.obstacle is not None:
            return {"obstacle": self.obstacle}
        each = median(self.seconds)
        return {
            "seconds_per_round": each,
            "rounds_per_second": 1 / each,
            "batches_per_second": batches / each,
            "times_central": each / central,
            "rounds": len(self.seconds),
        }


def bench(
    module: pl.LightningModule | None = None,
    data: pl.LightningDataModule | None = None,
    clients: int | None = None,
    partition: str = "iid",
    clients_per_round: int | None = None,
    local_steps: int = 10,
    seconds: float = 1.0,
    accelerator: str = "auto",
    json: bool = False,
) -> None:
    """Time rounds with each executor against plain steps on the same number of batches of the same sizes.

    Args:
        module: class of the LightningModule, such as my_package.MyModule; its arguments follow as --module.name. By
            default a perceptron that reads scikit-learn's digits.
        data: class of the LightningDataModule, if the module itself has no train_dataloader.
        clients: number of clients; 10 by default, or those of the partition's file.
        partition: how the data is divided among them: a name such as 'dirichlet', or the file of a saved partition; in
            equal parts by default.
        clients_per_round: how many of them train in a round; all by default.
        local_steps: batches of a client in a round.
        seconds: how long each of three turns lasts, for each executor and for the plain Trainer.
        accelerator: as of a Trainer.
        json: print one JSON object instead of a table.
    """
    if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds!r}: pass a finite number above 0.")
    local_steps = integer("local_steps", local_steps)
    partitioner = by_name(partition, None if clients is None else integer("clients", clients))
    check_accelerator(accelerator)
    if module is None and data is None:
        module, data = Classifier(), Digits()
    elif module is None:
        raise ValueError("module: pass --module, the class of the LightningModule that is trained on --data.")
    loader = train_loader(module, data)
    if loader.batch_sampler is None:
        raise ValueError("train_dataloader: batch_size=None: return a DataLoader that makes the batches.")
    partitioner.dataset = loader.dataset
    divided = partitioner.partition
    clients = divided.num_clients
    cohort = clients if clients_per_round is None else integer("clients_per_round", clients_per_round)
    contest = _Contest(module, data, loader, divided, cohort, local_steps, seconds, accelerator)
    with quiet():
        paces = contest.run()
    central = median(paces["central"].seconds)
    found = {name: pace.facts(contest.batches, central) for name, pace in paces.items()}
    able = [name for name in ("sequential", "vectorized") if paces[name].obstacle is None]
    fastest = min(able, key=lambda name: found[name]["seconds_per_round"])
    if json:
        settings = {"clients": clients, "clients_per_round": cohort, "local_steps": local_steps}
        print(json_format.dumps({**settings, "batches_per_round": contest.batches, **found, "fastest": fastest}))
        return
    _show(found, fastest, contest.batches)


@dataclass
class _Contest:
    """The contenders, each with a copy of the module and the same data."""

    module: pl.LightningModule
    data: pl.LightningDataModule | None
    loader: DataLoader[Any]
    partition: Partition
    cohort: int
    local_steps: int
    seconds: float
    accelerator: str

    @property
    def batches(self) -> int:
        """Number of batches in a round."""
        return self.cohort * self.local_steps

    def run(self) -> dict[str, Pace]:
        """Time the contenders in turn, `_TURNS` times."""
        found: dict[str, Pace] = {name: Pace([]) for name in _NAMES}
        for _ in range(_TURNS):
            # Federated runs come first, since they raise for modules that cannot be federated.
            for name in ("sequential", "vectorized", "central"):
                if found[name].obstacle is None:
                    turn = self._central() if name == "central" else self._federated(name)
                    found[name] = Pace(found[name].seconds + turn.seconds, turn.obstacle)
        return found

    def _federated(self, executor: str) -> Pace:
        strategy = FederatedStrategy(
            partitioner=self.partition, clients_per_round=self.cohort, local_steps=self.local_steps,
            executor=executor,  # type: ignore[arg-type]
        )  # fmt: skip
        clock = _Clock(1, math.ceil(_WARM_UP / self.local_steps), self.seconds)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._fit(clock, self.loader, strategy=strategy)
        reasons = [found[1] for each in caught if (found := _REASON.fullmatch(str(each.message))) is not None]
        return Pace(clock.times(), next(iter(reasons), None))

    def _central(self) -> Pace:
        batches = _Batches(self.loader, self.module, self.partition, self.cohort, self.local_steps)
        loader = DataLoader(
            self.loader.dataset, batch_sampler=batches, collate_fn=self.loader.collate_fn,
            num_workers=self.loader.num_workers, pin_memory=self.loader.pin_memory,
            worker_init_fn=self.loader.worker_init_fn, timeout=self.loader.timeout,
        )  # fmt: skip
        clock = _Clock(self.batches, math.ceil(_WARM_UP / self.batches), self.seconds)
        self._fit(clock, loader)
        return Pace(clock.times())

    def _fit(self, clock: _Clock, loader: DataLoader[Any], **options: Any) -> None:
        trainer = pl.Trainer(
            accelerator=self.accelerator, devices=1, max_epochs=-1, limit_val_batches=0, callbacks=[clock],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        module, data = copy.deepcopy(self.module), copy.copy(self.data)
        owner: Any = module if data is None else data  # its hooks move batches to the device
        owner.train_dataloader = lambda: loader
        trainer.fit(module, datamodule=data)


class _Clock(Callback):
    """Records when rounds end, and stops training after enough timed rounds.

    Args:
        every: steps of the Trainer in a round.
        warm_up: number of rounds that are not timed.
        seconds: least total time of the timed rounds.
    """

    def __init__(self, every: int, warm_up: int, seconds: float) -> None:
        self._every, self._warm_up, self._seconds = every, warm_up + 1, seconds
        self._ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Record the time at the end of each round."""
        if trainer.global_step % self._every:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._ends.append(time.perf_counter())
        timed = self._ends[self._warm_up - 1 :]
        trainer.should_stop = len(timed) > _FEWEST_ROUNDS and timed[-1] - timed[0] >= self._seconds

    def times(self) -> list[float]:
        """Return the seconds of each timed round."""
        timed = self._ends[self._warm_up - 1 :]
        return [after - before for before, after in pairwise(timed)]


class _Batches:
    """The batches of an endless sequence of rounds, with each client's own samples and batch sizes."""

    def __init__(
        self, loader: DataLoader[Any], module: pl.LightningModule, partition: Partition, cohort: int, local_steps: int
    ) -> None:
        norms = torch.nn.modules.batchnorm._BatchNorm
        self._cut = ClientLoader(loader, merge_single=any(isinstance(part, norms) for part in module.modules()))
        self._partition = partition
        self._cohort, self._steps = cohort, local_steps

    def __iter__(self) -> Iterator[list[int]]:
        cursors: dict[int, Cursor] = {}
        turn = 0
        while True:
            client = turn % self._partition.num_clients
            batches, cursors[client] = steps_from(
                cursors.get(client, (0, 0)), self._steps, lambda number, client=client: self._of(client, number)  # type: ignore[misc]
            )  # fmt: skip
            yield from batches
            turn += 1

    def _of(self, client: int, number: int) -> list[list[int]]:
        """Return the batches of one pass of a client over its data."""
        samples = self._partition.client(client)
        order = pass_order(samples, shuffle=self._cut.shuffle, seed=0, client=client, number=number)
        return self._cut.batches(order)


def _show(found: dict[str, dict[str, Any]], fastest: str, batches: int) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table(
        "", "Seconds per round", "Rounds/s", "Batches/s", "Time / plain", title=f"{batches:,} batches per round"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, of in found.items():
        if "obstacle" in of:
            table.add_row(_NAMES[name], "not possible", "", "", "")
            continue
        numbers = (of["seconds_per_round"], of["rounds_per_second"], of["batches_per_second"])
        table.add_row(_NAMES[name], *(f"{each:.3g}" for each in numbers), f"{of['times_central']:.2f}")
    console.print(table)
    if obstacle := found["vectorized"].get("obstacle"):
        console.print(f"These clients cannot be vectorized: {obstacle}.")
    times = found[fastest]["times_central"]
    console.print(f"Fastest here: executor={fastest!r}, which takes {times:.2f} times as long as the plain Trainer.")
