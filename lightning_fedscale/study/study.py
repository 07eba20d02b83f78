"""`size`: the best size, method, batch size, local steps and learning rate for a project's clients and compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch

from lightning_fedscale.core.options.trainer_checks import is_user_error
from lightning_fedscale.partitioners import Partition, Partitioner
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.study.answer import Answer, current_of, results_of
from lightning_fedscale.study.arguments import (
    axis,
    batch_sizes_of,
    check_makers,
    check_size,
    current_size,
    methods_of,
    name_of,
    partition_of,
    positive,
    rates_of,
)
from lightning_fedscale.study.cost import Cost
from lightning_fedscale.study.ledger import Ledger
from lightning_fedscale.study.loaders import train_loader
from lightning_fedscale.study.methods import expression_of, options_of
from lightning_fedscale.study.race import FEWEST_ROUNDS, Job, Measured, Prices, Race
from lightning_fedscale.study.settings import FED_AVG, Setting, Space, ladder
from lightning_fedscale.study.trial import Executing, Project
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.checks import integer

_EXECUTORS: tuple[Executing, ...] = ("sequential", "vectorized")
_PILOT_ROUNDS = (2, 8)
"""Rounds of the pilot runs, which measure costs; the shorter ones determine the fixed part."""


def size(
    module: Callable[..., pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    flops: float,
    *,
    argument: str = "size",
    partition: Partition | Partitioner | str = "iid",
    clients: int | None = None,
    clients_per_round: int | float | None = None,
    current: int | None = None,
    sizes: Sequence[int] | None = None,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    strategy: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] | None = None,
    local_steps: Sequence[int] = (5, 20),
    rates: Sequence[float] = (0.25, 1.0, 4.0),
    study_minutes: float = 30.0,
    study_flops: float | None = None,
    seeds: int = 3,
    seed: int = 0,
    loss: str | None = None,
    workers: int = 1,
    pool: Executor | None = None,
    folder: str | Path = "fedscale_size",
    trainer: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Answer:
    """Find the best size, method, batch size, local steps and learning rate for a number of clients and a budget.

    Settings are trained on the clients' own partition: many with a small fraction of the budget, the best of these with
    more, and a few with all of it, with several seeds. The measured losses decide. Every run is stored, and an
    interrupted study resumes.

    Args:
        module: class or function that makes the module of a size.
        data: class or function that makes the data module, with a validation loader.
        flops: training compute of a whole run, of all clients together.
        argument: argument of ``module`` that sets the model's size.
        partition: a partition, a partitioner or its name, or a file of `Partition.save`.
        clients: number of clients, for a partitioner given by name; None for its default.
        clients_per_round: number of clients that train in a round, as in `FederatedStrategy`.
        current: size of the current model; None takes the default of ``argument``.
        sizes: sizes to try; None for seven around the current one, by factors of two.
        methods: names in `METHODS`, or arguments of `FederatedStrategy` by custom names (objects in Hydra's form,
            ``{"_target_": ...}``); None for all of `METHODS`.
        strategy: arguments of `FederatedStrategy` for all methods, such as ``{"compressor": "qsgd"}``, in the same
            form.
        batch_sizes: a client's batch sizes to try; None for the data's own and four times that.
        local_steps: numbers of batches of a client in a round to try.
        rates: learning rates to try, as multiples of the module's own. Around the best setting, further values of all
            these are tried too.
        study_minutes: time limit of the study, in minutes.
        study_flops: limit of the study's training compute, of all clients together; None for no limit.
        seeds: number of seeds of the finalists, besides the one that selects them; two or more.
        seed: seed of weights, partition and order.
        loss: name of the logged validation loss; None for the first of the usual names.
        workers: number of processes that train at the same time; more than one needs a module and data that can be
            pickled.
        pool: where these processes run: any `concurrent.futures.Executor` of ``workers`` processes, such as a cluster's
            (``dask.distributed.Client().get_executor()``); None for this machine.
        folder: folder for ``runs.csv``, with every run.
        trainer: arguments of the Trainer.
        say: called with each line of progress.

    Raises:
        ValueError: for an argument that does not change the size, a budget or a study that is too small, or a partition
            of other data, or if all settings diverge.
    """
    say = say or _silent
    flops, study_minutes = positive("flops", flops), positive("study_minutes", study_minutes)
    study_flops = math.inf if study_flops is None else positive("study_flops", study_flops)
    seeds, workers = integer("seeds", seeds, 2), integer("workers", workers, 1)
    check_makers(module, data)
    current = current_size(module, argument, current)
    with randomness.untouched():  # keep the state of the caller's generators
        loader = train_loader(None, data())
        divided, facts = partition_of(partition, clients, loader.dataset)
    known = methods_of(methods, strategy)
    space = Space(
        axis("sizes", sizes if sizes is not None else ladder(current) if current else ()),
        tuple(known),
        axis("batch_sizes", batch_sizes_of(loader.batch_size, divided) if batch_sizes is None else batch_sizes),
        axis("local_steps", local_steps),
        rates_of(rates),
    )
    with randomness.untouched():
        check_size(module, argument, space.sizes)
    project = Project(
        module, data, argument=argument, partition=divided, clients_per_round=clients_per_round, methods=known,
        flops=flops, seed=seed, loss=loss, trainer=trainer or {},
    )  # fmt: skip
    common = {
        "module": name_of(module), "data": name_of(data), "argument": argument,
        "arguments": [getattr(each, "arguments", {}) for each in (module, data)], "flops": flops, **facts,
        "clients_per_round": clients_per_round, "methods": known, "seed": seed, "loss": loss,
    }  # fmt: skip
    with _processes(workers, pool) as where:
        return _Study(
            project, space, current, Ledger(folder, common), study_minutes * 60, study_flops, seeds, where, workers,
            say,
        ).run()  # fmt: skip


class _Study:
    def __init__(
        self,
        project: Project,
        space: Space,
        current: int | None,
        ledger: Ledger,
        seconds: float,
        flops: float,
        seeds: int,
        pool: Executor | None,
        workers: int,
        say: Callable[[str], None],
    ) -> None:
        self.project, self.space, self.current, self.ledger = project, space, current, ledger
        self.seconds, self.seeds, self.pool, self.workers, self.say = seconds, seeds, pool, workers, say
        # If compute is the tighter limit, a run is charged the same fraction of the time as of the compute.
        self._seconds_of_flop = workers * seconds / flops
        cohort = FederatedStrategy(
            num_clients=project.partition.num_clients, clients_per_round=project.clients_per_round
        ).cohort_size
        assert cohort is not None
        self.cohort = cohort
        self.notes: list[str] = []
        # Rows in the order of the requests, so that a resumed study makes the same decisions.
        self.seen: list[dict[str, Any]] = []
        self._piloted = set[Job]()
        self._known: tuple[int, dict[Executing, Cost]] = -1, {}  # costs, fitted to this number of rows

    def run(self) -> Answer:
        self._pilot()
        anchors = [] if self.current is None else [self._plain(self.current)]
        prices = Prices(self._charge, self._rounds, self.workers)
        race = Race(self.space, anchors, self.seconds - self._spent(), self.seeds, prices, self._measure)
        self._announce(race)
        race.run()
        return self._answer()

    def _plain(self, size: int) -> Setting:
        middle = min(self.space.rates, key=lambda each: abs(math.log(each)))
        return Setting(size, FED_AVG if FED_AVG in self.space.methods else self.space.methods[0],
                       self.space.batch_sizes[0], self.space.local_steps[0], middle)  # fmt: skip

    # ---- costs of runs

    def _pilot(self) -> None:
        """Run a few rounds of the smallest, the current and the largest size, and of every method."""
        smallest, largest = self.space.sizes[0], self.space.sizes[-1]
        for size in dict.fromkeys((smallest, self.current or smallest, largest)):
            for rounds in _PILOT_ROUNDS:
                for executor in _EXECUTORS:
                    self._short(self._plain(size), rounds, executor)
        for name in self.space.methods[:]:
            try:
                row = self._short(self._plain(smallest)._replace(method=name), _PILOT_ROUNDS[0], _EXECUTORS[0])
            except Exception as error:
                if not is_user_error(error) or name == FED_AVG:
                    raise
                self._drop(name, str(error))
                continue
            if name == "kept_optimizer" and not row["keeps"]:
                self._drop(name, "the optimizer has no state to keep, so that this method equals fed_avg")
        paid = self._rounds(self._plain(smallest), 1.0)
        if paid < FEWEST_ROUNDS:
            raise ValueError(
                f"flops={self.project.flops:g}: this budget allows {paid:.2g} rounds of the smallest model, and a study"
                f" needs at least {FEWEST_ROUNDS}. Pass {self.project.flops / paid * 10:.1g} or more, fewer local steps"
                " or smaller batches."
            )
        if self.current is not None and self._rounds(self._plain(self.current), 1.0) < FEWEST_ROUNDS:
            who = f"{self.project.argument} {self.current}"
            self.notes.append(f"{who} was left out: the budget allows too few rounds of it")

    def _drop(self, method: str, reason: str) -> None:
        self.notes.append(f"{method} was left out: {reason}")
        self.space = self.space._replace(methods=tuple(each for each in self.space.methods if each != method))

    def _short(self, setting: Setting, rounds: int, executor: Executing) -> dict[str, Any]:
        """Do a pilot run; in the ledger its share is 0, and its seed encodes rounds and executor."""
        job = Job(setting, 0.0, -(rounds * 10 + _EXECUTORS.index(executor)))
        row = self.ledger.get(job)
        if row is None:
            row = {**self.project.run(job._replace(share=1.0), executor, rounds=rounds), **job._asdict()}
            row.pop("setting")
            self.ledger.add(job, row)
        if job not in self._piloted:
            self.seen.append(row)
        self._piloted.add(job)
        return row

    def _cost(self, executor: Executing) -> Cost:
        cost = Cost(self.project.flops, self.cohort)
        cost.learn_all(row for row in self.seen if row["executor"] == executor)
        return cost

    def _costs(self) -> dict[Executing, Cost]:
        number, costs = self._known
        if number != len(self.seen):
            costs = {name: self._cost(name) for name in _EXECUTORS}
            self._known = len(self.seen), costs
        return costs

    def _seconds(self, setting: Setting, share: float) -> float:
        return min(each.seconds(setting, share) for each in self._costs().values())

    def _rounds(self, setting: Setting, share: float) -> float:
        return self._costs()[_EXECUTORS[0]].rounds(setting, share)

    def _charge(self, setting: Setting, share: float) -> float:
        return max(self._seconds(setting, share), share * self.project.flops * self._seconds_of_flop)

    def _executor(self, job: Job) -> Executing:
        costs = self._costs()
        return min(costs, key=lambda name: costs[name].seconds(job.setting, job.share))

    def _spent(self) -> float:
        return sum(map(self._charged, self.seen))

    def _charged(self, row: Mapping[str, Any]) -> float:
        return max(float(row["seconds"]), float(row["flops"]) * self._seconds_of_flop)

    def _announce(self, race: Race) -> None:
        jobs = race.plan()
        seconds, charged = (
            sum(price(job.setting, job.share) for job in jobs) for price in (self._seconds, self._charge)
        )
        shorter = ", ".join(f"1/{round(1 / each)}" for each in race.shares[:-1])
        stages = f"{shorter} of the budget, and the best of these with all of it" if shorter else "all of the budget"
        self.say(
            f"About {len(jobs)} runs, {self.seconds / 60 * seconds / charged:.3g} minutes,"
            f" {sum(job.share for job in jobs) * self.project.flops:.2g} FLOPs: some of the {self.space.number:,}"
            f" settings train with {stages}."
        )

    # ---- runs

    def _measure(self, jobs: Sequence[Job]) -> list[Measured]:
        missing = [job for job in jobs if self.ledger.get(job) is None]
        for job, row in self._made(missing):
            self.ledger.add(job, row)
            self.say(f"{_of_budget(job.share)}: {job.setting}: loss {row['loss']:.4g}")
        rows = [self.ledger.get(job) or {} for job in jobs]
        self.seen += rows
        return [Measured(float(row["loss"]), self._charged(row)) for row in rows]

    def _made(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        if self.pool is None:
            for job in jobs:
                yield job, self.project.run(job, self._executor(job), each_client=job.share == 1 and job.seed > 0)
            return
        # The longest jobs start first, so that workers finish at about the same time.
        ordered = sorted(jobs, key=lambda job: -self._seconds(job.setting, job.share))
        futures: dict[Future[dict[str, Any]], Job] = {
            self.pool.submit(
                self.project.run, job, self._executor(job), each_client=job.share == 1 and job.seed > 0
            ): job
            for job in ordered
        }
        for future in as_completed(futures):
            yield futures[future], future.result()

    # ---- results

    def _answer(self) -> Answer:
        table = pd.DataFrame(self.seen)
        whole = table[(table["share"] == 1) & (table["seed"] >= 0)]
        if missing := sorted(set(self.space.sizes) - set(whole["size"])):
            sizes = ", ".join(map(str, missing))
            self.notes.append(f"there was no time to train {self.project.argument} {sizes} with the whole budget")
        results = results_of(whole, self.project.partition.sizes)
        best = results[0].setting
        parts = [f"num_clients={self.project.partition.num_clients}", f"partitioner={self.ledger.study['partition']}"]
        if self.project.clients_per_round is not None:
            parts.append(f"clients_per_round={self.project.clients_per_round}")
        parts += ["local_epochs=None", f"local_steps={best.local_steps}"]
        parts += expression_of(self.project.methods[best.method])
        return Answer(
            argument=self.project.argument,
            flops=self.project.flops,
            clients=self.project.partition.num_clients,
            results=tuple(results),
            current=current_of(results, self.current),
            notes=tuple(self.notes),
            strategy=f"FederatedStrategy({', '.join(parts)})",
            study=self._made_for(),
            runs=len(table),
            minutes=float(table["seconds"].sum()) / 60,
            study_flops=float(table["flops"].sum()),
        )

    def _made_for(self) -> dict[str, Any]:
        known = {name: self.project.methods[name] for name in self.space.methods}
        methods = {name: FederatedStrategy(**options_of(each)).method for name, each in known.items()}
        return {**self.ledger.study, "cohort": self.cohort, "methods": methods}


def _of_budget(share: float) -> str:
    return "whole budget" if share == 1 else f"1/{round(1 / share)} of the budget"


def _silent(line: str) -> None:
    pass


@contextmanager
def _processes(workers: int, pool: Executor | None) -> Iterator[Executor | None]:
    """Yield the pool, or one of processes on this machine; None for one worker, which is this process.

    Raises:
        TypeError: for something else than a pool.
    """
    if pool is not None and not isinstance(pool, Executor):
        raise TypeError(f"pool={pool!r}: pass a concurrent.futures.Executor, or None for this machine.")
    if pool is not None or workers == 1:
        yield pool
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as own:
        yield own
