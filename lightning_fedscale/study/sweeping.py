"""The smallest sweep of a project's own module that a scaling law can be fitted to: sizes x clients x compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from torch.utils._pytree import tree_leaves

from lightning_fedscale.partitioners import (
    FinishedPartitioner,
    GroupedNaturalIdPartitioner,
    NaturalIdPartitioner,
    Partition,
    Partitioner,
    by_name,
)
from lightning_fedscale.scaling.project import LEVELS
from lightning_fedscale.scaling.tuning import best_rate, tuned
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.study.arguments import check_makers, current_size, methods_of, partition_of, positive, rates_of
from lightning_fedscale.study.cost import Cost
from lightning_fedscale.study.loaders import train_loader
from lightning_fedscale.study.methods import METHODS, options_of
from lightning_fedscale.study.race import Job
from lightning_fedscale.study.settings import FED_AVG, Setting
from lightning_fedscale.study.trial import Project
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.checks import integer, one_of

_WIDEN = 6
"""Largest number of additional learning rates if the best one is at an end of the grid."""

_KEY = ("size", "clients", "share", "seed", "learning_rate")
"""Columns that identify a run of a sweep."""

_BEFORE: dict[str, Any] = {"argument": "size", "partition": "iid", "method": FED_AVG, "batch_size": 0}
"""Values for rows of older files without these columns."""


def sweep(
    module: Callable[..., pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    sizes: Sequence[int],
    flops: float,
    clients: Sequence[int] | None = None,
    *,
    partition: str | Partitioner | Partition | None = None,
    method: str | Mapping[str, Any] = FED_AVG,
    strategy: Mapping[str, Any] | None = None,
    argument: str = "size",
    folder: str | Path = "fedscale_sweep",
    loss: str | None = None,
    batch_size: int | None = None,
    local_steps: int = 5,
    seed: int = 0,
    seeds: int = 1,
    rates: Sequence[float] = (0.5, 1.0, 2.0),
    trainer: dict[str, Any] | None = None,
    each: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Train a module in several sizes, with several numbers of clients and amounts of compute.

    Each run stops at its fraction of the compute, by the counted FLOPs of its steps, and is then validated. Rows
    are written as runs finish; an interrupted sweep resumes with the missing runs.

    The learning rate is tuned for every size, number of clients and amount of compute, with the first seed. If the best
    rate is at an end of the grid, more are tried beyond it. With several seeds, those after the first train at the best
    rate, and only they count. Clients take fewer steps each, so that one rate for all would make ``rho`` meaningless.

    Args:
        module: class or function that makes the module of a size.
        data: class or function that makes the data module; it needs a validation loader.
        sizes: four sizes or more, which span at least a factor of ten in parameters.
        flops: training compute of the largest runs, of all clients together; others take a quarter and a sixteenth.
        clients: numbers of clients that train in a round; None for that of the partition, else for 1 and 4.
        partition: how the training data is divided: the name of a partitioner, for any number of clients; or the file
            of a saved partition, a Partition or a Partitioner, which fix the number of clients. None for equal parts.
        method: a name in `METHODS`, or arguments of `FederatedStrategy` (objects in Hydra's form).
        strategy: more arguments of `FederatedStrategy`, in the same form.
        argument: argument of ``module`` that sets the model's size.
        folder: folder for ``runs.csv``, with every run at every rate.
        loss: name of the logged validation loss; None for the first of the usual names.
        batch_size: a client's batch size; None for the data's own.
        local_steps: batches that a client trains on in a round.
        seed: seed of weights, partition and order, the first of ``seeds``.
        seeds: number of seeds; if there are several, the first one only tunes the learning rate.
        rates: learning rates to try, as multiples of the module's own. With a single rate nothing is tuned.
        trainer: arguments of the Trainer.
        each: called with every new row.
        say: called before the first run with the number of runs and their estimated cost.

    Returns:
        A row for each run that counts: ``size``, ``params``, ``clients``, ``tokens`` and ``flops`` (of one client),
        ``loss``, ``share``, ``seed``, ``learning_rate`` (a multiple of the module's own), ``rounds``, ``passes`` over
        the data, and the arguments ``method``, ``batch_size`` (0 for the data's own), ``local_steps``, ``partition``.
        Further columns record what a law of these runs is made for: ``partition_name`` and ``fingerprint``,
        ``mean_js_distance`` of clients' labels, ``samples`` of the data, ``batch`` in samples, the clients'
        ``optimizer``, and ``rules``, the method's options.

    Raises:
        ValueError: for too few sizes, a module without that argument, a loss that is not logged, or a partition of
            other data or for other numbers of clients.
    """
    check_makers(module, data)
    if len(set(sizes)) < 4:
        raise ValueError(f"sizes={list(sizes)}: pass at least four different sizes; fewer do not determine a law.")
    flops, grid = positive("flops", flops), rates_of(rates)
    batch = 0 if batch_size is None else integer("batch_size", batch_size, 1)
    local_steps, seeds = integer("local_steps", local_steps, 1), integer("seeds", seeds, 1)
    current_size(module, argument, None)
    name, arguments = _method_of(method, strategy)
    given: Any = "iid" if partition is None else partition
    loader = train_loader(None, data())
    is_decided = _is_decided(given)
    clients = _numbers(clients, partition_of(given, None, loader.dataset)[0] if is_decided else None)
    divisions = {number: partition_of(given, None if is_decided else number, loader.dataset) for number in clients}
    projects = {
        number: Project(
            module, data, argument=argument, partition=divided, clients_per_round=None, methods={name: arguments},
            flops=flops, seed=0, loss=loss, trainer=trainer or {},
        )
        for number, (divided, _) in divisions.items()
    }  # fmt: skip
    trained_as = {
        "batch": batch or getattr(loader, "batch_size", None), "optimizer": _optimizer_of(module, argument, sizes[0]),
        "rules": json.dumps(FederatedStrategy(**options_of(arguments)).method, sort_keys=True),
    }  # fmt: skip
    facts_of = {number: _facts(given, facts) | trained_as for number, (_, facts) in divisions.items()}
    common = {
        "argument": argument, "flops_asked": flops, "local_steps": local_steps,
        "partition": facts_of[clients[-1]]["fingerprint"] if is_decided else given,
        "method": name + (f" {json.dumps(strategy, sort_keys=True)}" if strategy else ""), "batch_size": batch,
    }  # fmt: skip
    runs = _SweepRuns(folder, common, Setting(0, name, batch, local_steps, 1.0), projects, facts_of, each)
    cells = list(product(clients, sizes, LEVELS))
    if say is not None:
        ends = [runs.setting._replace(size=size) for size in (min(sizes), max(sizes))]
        say(_announced(projects[clients[0]], ends, cells, len(grid) + seeds - 1, len(runs)))
    for number, size, share in cells:
        runs.tune(size, number, share, grid, range(seed, seed + seeds))
    return tuned(pd.DataFrame(runs.rows)).table.reset_index(drop=True)


class _SweepRuns:
    """The runs of a sweep, each of which is trained once and written to a file.

    Args:
        folder: where the file is, whose rows are read if an earlier sweep was interrupted.
        common: columns that have the same value in all rows.
        setting: the setting of all runs, but for size and rate.
        projects: what is trained, by the number of clients.
        facts_of: columns with the same value in all rows of a number of clients.
        each: called with every new row.

    Attributes:
        rows: the rows of all finished runs.
    """

    def __init__(
        self,
        folder: str | Path,
        common: Mapping[str, Any],
        setting: Setting,
        projects: Mapping[int, Project],
        facts_of: Mapping[int, Mapping[str, Any]],
        each: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.setting, self._common, self._each = setting, common, each
        self._path = Path(folder, "runs.csv")
        self._projects, self._facts_of = projects, facts_of
        self.rows = [{**row, **_missing(row, facts_of)} for row in _finished(self._path, common)]
        self._losses = {
            tuple({"learning_rate": 1.0, **row}[name] for name in _KEY): float(row["loss"]) for row in self.rows
        }

    def __len__(self) -> int:
        return len(self._losses)

    def tune(self, size: int, clients: int, share: float, grid: Sequence[float], seeds: Sequence[int]) -> None:
        """Tune the learning rate with the first seed, and train the other seeds at the best rate."""
        best = _tune(grid, partial(self.loss_of, size, clients, share, seeds[0]))
        for seed in seeds[1:]:
            self.loss_of(size, clients, share, seed, best)

    def loss_of(self, size: int, clients: int, share: float, seed: int, rate: float) -> float:
        """Return the loss of a run, which is trained if it is not finished."""
        key = (size, clients, share, seed, rate)
        if key not in self._losses:
            project = self._projects[clients]
            found = project.run(Job(self.setting._replace(size=size, rate=rate), share, seed))
            self.rows.append({
                "size": size, "share": share, **self._common, "seed": seed, "learning_rate": rate,
                "params": found["params"], "clients": clients, "tokens": found["tokens"] / clients,
                "flops": found["flops"] / clients, "loss": found["loss"], "rounds": found["rounds"],
                "passes": found["samples"] / project.partition.num_samples, **self._facts_of[clients],
            })  # fmt: skip
            pd.DataFrame(self.rows).to_csv(self._path, index=False)
            if self._each is not None:
                self._each(self.rows[-1])
            self._losses[key] = float(found["loss"])
        return self._losses[key]


def _method_of(method: str | Mapping[str, Any], strategy: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Return the name of a method and its arguments; a method without a name is named by its arguments."""
    if isinstance(method, str):
        one_of("method", method, tuple(METHODS))
    (found,) = methods_of([method] if isinstance(method, str) else {json.dumps(method): method}, strategy).items()
    return found


def _announced(
    project: Project, ends: Sequence[Setting], cells: Sequence[tuple[int, int, float]], each: int, done: int
) -> str:
    """Estimate the number of runs and their cost from a few rounds of the smallest and the largest model."""
    cost = Cost(project.flops, project.partition.num_clients)
    for setting in ends:
        for rounds in (2, 8):
            row = project.run(Job(setting, 1.0, 0), rounds=rounds)
            batches = row["rounds"] * project.partition.num_clients * setting.local_steps
            known = setting._replace(batch_size=max(1, round(row["samples"] / batches)))
            cost.learn(known, samples=row["samples"], flops=row["flops"], seconds=row["seconds"])
    seconds = each * sum(cost.seconds(known._replace(size=size), share) for _, size, share in cells)
    spent = each * sum(share for _, _, share in cells) * project.flops
    return (
        f"At least {len(cells) * each} runs, about {seconds / 60:.2g} minutes, {spent:.2g} FLOPs; more runs follow"
        " where the best learning rate is the smallest or the largest of those tried"
        + (f"; {done} runs are finished already" if done else "")
        + "."
    )


def _finished(path: Path, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the rows of an interrupted sweep.

    Raises:
        ValueError: if the file is of a sweep with other arguments.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return []
    rows = [{str(name): value for name, value in row.items()} for row in pd.read_csv(path).to_dict("records")]
    for row in rows:
        if changed := [name for name, value in common.items() if {**_BEFORE, **row}.get(name) != value]:
            raise ValueError(
                f"folder={str(path.parent)!r}: this folder holds a sweep with other values of {', '.join(changed)}."
                " Name another folder."
            )
    return rows


def _name_of(partition: Any) -> str | None:
    """Return the name of a partitioner or of a partition's file; None for a Partition."""
    if isinstance(partition, str):
        return Path(partition).name
    return None if isinstance(partition, Partition) else repr(partition)


def _facts(partition: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that record a partition."""
    known = {name: facts[name] for name in ("fingerprint", "mean_js_distance", "samples")}
    return {"partition_name": _name_of(partition), **known}


def _missing(row: Mapping[str, Any], facts_of: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts that a row of an older file lacks."""
    return {name: value for name, value in facts_of.get(row["clients"], {}).items() if name not in row}


def _optimizer_of(module: Callable[..., pl.LightningModule], argument: str, size: int) -> str | None:
    """Return the class of the clients' optimizer; None if the module cannot make it without a Trainer."""
    with suppress(Exception), randomness.untouched():
        found = module(**{argument: size}).configure_optimizers()
        leaves = tree_leaves(found, is_leaf=lambda leaf: hasattr(leaf, "param_groups"))
        names = [type(leaf).__name__ for leaf in leaves if hasattr(leaf, "param_groups")]
        return " and ".join(dict.fromkeys(names)) or None
    return None


def _tune(grid: Sequence[float], loss_at: Callable[[float], float]) -> float:
    """Return the rate with the least loss, of a grid that is extended while the best rate is at its end."""
    tried = {rate: loss_at(rate) for rate in grid}
    for _ in range(_WIDEN):
        best, is_end = best_rate(list(tried), list(tried.values()))
        if not is_end:
            break
        ordered = sorted(tried)
        beyond = ordered[-1] ** 2 / ordered[-2] if best == ordered[-1] else ordered[0] ** 2 / ordered[1]
        tried[beyond] = loss_at(beyond)
    return best_rate(list(tried), list(tried.values()))[0]


def _is_decided(partition: Any) -> bool:
    """Return whether the partition fixes the number of clients: it is finished, or it follows the data's ids."""
    decided = FinishedPartitioner | NaturalIdPartitioner | GroupedNaturalIdPartitioner
    return not isinstance(partition, str) or isinstance(by_name(partition), decided)


def _numbers(clients: Sequence[int] | None, division: Partition | None) -> Sequence[int]:
    """Return the numbers of clients to train with."""
    if division is not None:
        number = division.num_clients
        if clients is not None and list(clients) != [number]:
            raise ValueError(
                f"clients={list(clients)}: the partition has {number} clients. Pass clients=[{number}], or leave it"
                " out."
            )
        return [number]
    clients = (1, 4) if clients is None else clients
    if not clients or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in clients):
        raise ValueError(f"clients={list(clients)}: pass whole numbers, at least 1.")
    return clients
