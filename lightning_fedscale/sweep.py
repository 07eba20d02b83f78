"""The smallest sweep of a project's own module that a scaling law can be fitted to: sizes x clients x compute."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from torch.utils._pytree import tree_leaves

from lightning_fedscale import randomness
from lightning_fedscale.callbacks.compute_accounting import ComputeAccounting
from lightning_fedscale.checks import integer
from lightning_fedscale.partitioners import (
    FinishedPartitioner,
    GroupedNaturalIdPartitioner,
    NaturalIdPartitioner,
    Partition,
    Partitioner,
    by_name,
)
from lightning_fedscale.scaling.project import LEVELS
from lightning_fedscale.scaling.runs import LOSSES
from lightning_fedscale.scaling.tuning import best_rate, tuned
from lightning_fedscale.strategy import FederatedStrategy

_WIDEN = 6
"""At most so many more learning rates where the best is at an end of the grid."""


def sweep(
    module: Callable[..., pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    sizes: Sequence[int],
    flops: float,
    clients: Sequence[int] | None = None,
    *,
    partition: str | Partitioner | Partition | None = None,
    argument: str = "size",
    folder: str | Path = "fedscale_sweep",
    loss: str | None = None,
    local_steps: int = 5,
    seed: int = 0,
    seeds: int = 1,
    rates: Sequence[float] = (0.5, 1.0, 2.0),
    strategy: Callable[[int], FederatedStrategy] | None = None,
    trainer: dict[str, Any] | None = None,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Train a module in several sizes, with several numbers of clients and amounts of compute.

    Each run stops at its share of the compute, counted in FLOPs of its own step, and is then validated. Rows are
    written as they come; a sweep that was interrupted goes on with what is missing.

    The learning rate is tuned for every size, number of clients and amount of compute, with the first seed; where the
    best is at an end of the grid, more are tried beyond it. With several seeds, those after the first train at the best
    rate and count. Clients take fewer steps each, and at one rate for all what division costs comes out anywhere.

    Args:
        module: makes the module of a size: a class or function.
        data: makes the data module; it needs a validation loader.
        sizes: four or more, that span a factor of ten in parameters at least.
        flops: training compute of the largest runs, of all clients together; others take a quarter and a sixteenth.
        clients: numbers of clients that train in a round; None for those of the partition, else for 1 and 4.
        partition: how the training data is divided: the name of a partitioner, for any number of clients; or the file
            of a saved partition, a Partition or a Partitioner, which have clients of their own. None for equal parts.
        argument: of ``module``, which makes the model larger or smaller.
        folder: where ``runs.csv`` goes, with every run at every rate.
        loss: name of the logged validation loss; None for the first of the usual names.
        local_steps: batches of a client in a round.
        seed: of weights, partition and order, the first of ``seeds``.
        seeds: how many; the first is there to tune where there are several.
        rates: to try, as multiples of the module's own learning rate. One of them alone tunes nothing.
        strategy: makes the strategy in which so many clients train a round, in place of ``partition`` and
            ``local_steps``.
        trainer: arguments of the Trainer.
        each: called with every new row.

    Returns:
        A row per run that counts: ``size``, ``params``, ``clients``, ``tokens`` and ``flops`` (of one client),
        ``loss``, ``share``, ``seed``, ``learning_rate`` (a multiple of the module's own).

    Raises:
        ValueError: for too few sizes, a module without that argument, a loss that is not logged, or a partition of
            other data or for other numbers of clients.
    """
    for name, given in (("module", module), ("data", data)):
        if not callable(given):
            raise TypeError(f"{name}={given!r}: pass a class or a function that makes it.")
    parts: Any = "iid" if partition is None else partition
    division = _division(parts, data)
    clients = _numbers(clients, division)
    _check(module, argument, sizes, flops, clients)
    if strategy is not None and partition is not None:
        raise ValueError(
            f"partition={partition!r} with strategy={strategy!r}, which divides the data: pass one of them."
        )
    grid = _grid(rates)
    seeds = integer("seeds", seeds, 1)
    path = Path(folder, "runs.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if path.is_file():
        rows = [{str(name): value for name, value in row.items()} for row in pd.read_csv(path).to_dict("records")]
    asked = {
        "argument": argument, "flops_asked": flops, "local_steps": local_steps,
        "partition": parts if division is None else division.fingerprint,
    }  # fmt: skip
    for row in rows:
        before = {"argument": "size", "partition": "iid", **row}
        if changed := [name for name, value in asked.items() if before.get(name) != value]:
            raise ValueError(
                f"folder={str(folder)!r}: holds a sweep with other {', '.join(changed)}; name another folder."
            )
    keys = ("size", "clients", "share", "seed", "learning_rate")
    done = {tuple({"learning_rate": 1.0, **row}[name] for name in keys): float(row["loss"]) for row in rows}

    def loss_of(size: int, number: int, share: float, own: int, rate: float) -> float:
        key = (size, number, share, own, rate)
        if key in done:
            return done[key]
        if strategy is None:
            kind = _strategy(by_name(parts, number) if division is None else division, local_steps, own)
        else:
            kind = strategy(number)
        # Not `seed_everything`: the caller's generators and environment are not the sweep's.
        with quiet(), randomness.untouched():
            randomness.seed_globals(own, torch.device("cpu"))
            net = at_rate(module(**{argument: size}), rate)
            found = _train(net, data(), kind, flops * share, number, loss, trainer or {})
        rows.append({"size": size, "share": share, **asked, "seed": own, "learning_rate": rate, **found})
        pd.DataFrame(rows).to_csv(path, index=False)
        if each is not None:
            each(rows[-1])
        done[key] = float(found["loss"])
        return done[key]

    for number, size, share in product(clients, sizes, LEVELS):
        best = _tune(grid, partial(loss_of, size, number, share, seed))
        for own in range(seed + 1, seed + seeds):
            loss_of(size, number, share, own, best)
    return tuned(pd.DataFrame(rows)).table.reset_index(drop=True)


def _tune(grid: Sequence[float], loss_at: Callable[[float], float]) -> float:
    """The rate with the least loss, of a grid that goes on as long as the best is at its end."""
    tried = {rate: loss_at(rate) for rate in grid}
    for _ in range(_WIDEN):
        best, is_end = best_rate(list(tried), list(tried.values()))
        if not is_end:
            break
        ordered = sorted(tried)
        beyond = ordered[-1] ** 2 / ordered[-2] if best == ordered[-1] else ordered[0] ** 2 / ordered[1]
        tried[beyond] = loss_at(beyond)
    return best_rate(list(tried), list(tried.values()))[0]


def _grid(rates: Sequence[float]) -> list[float]:
    if not rates or any(isinstance(each, bool) or not isinstance(each, (int, float)) or each <= 0 for each in rates):
        raise ValueError(f"rates={rates!r}: pass multiples of the module's own learning rate, such as [0.5, 1, 2].")
    return sorted({float(each) for each in rates})


def at_rate(module: pl.LightningModule, factor: float) -> pl.LightningModule:
    """The module with its learning rates times a factor, those of its schedulers too."""
    if factor == 1.0:
        return module
    configure = module.configure_optimizers

    def configured() -> Any:
        found = configure()
        for part in tree_leaves(found, is_leaf=lambda leaf: hasattr(leaf, "param_groups") or hasattr(leaf, "base_lrs")):
            for group in getattr(part, "param_groups", ()):
                group.update({name: group[name] * factor for name in _RATES if name in group})
            if hasattr(part, "base_lrs"):
                part.base_lrs = [rate * factor for rate in part.base_lrs]
        return found

    module.configure_optimizers = configured  # type: ignore[method-assign]
    return module


_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def _check(
    module: Callable[..., Any], argument: str, sizes: Sequence[int], flops: float, clients: Sequence[int]
) -> None:
    if len(set(sizes)) < 4:
        raise ValueError(f"sizes={list(sizes)}: pass four different ones or more; fewer determine no law.")
    if not isinstance(flops, (int, float)) or not 0 < flops < math.inf:
        raise ValueError(f"flops={flops!r}: pass a finite number above 0.")
    if not clients or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in clients):
        raise ValueError(f"clients={list(clients)}: pass whole numbers, at least 1.")
    parameters = inspect.signature(module).parameters
    if argument not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        name = getattr(module, "__qualname__", repr(module))
        raise ValueError(
            f"module={name}: it has no argument {argument}: pass argument=, the name of the one that makes the model"
            f" larger or smaller; there are {', '.join(parameters) or 'none'}."
        )


def _division(partition: Any, data: Callable[[], pl.LightningDataModule]) -> Partition | None:
    """Who holds what, where that goes for one number of clients only; None where a name does for any number."""
    given = by_name(partition) if isinstance(partition, str) else partition
    if isinstance(given, Partition):
        given = FinishedPartitioner(given)
    if not isinstance(given, Partitioner):
        raise TypeError(
            f"partition={partition!r}: pass a name such as 'dirichlet', a file, a Partition or a Partitioner."
        )
    decided = FinishedPartitioner | NaturalIdPartitioner | GroupedNaturalIdPartitioner  # by a file, or by the data
    if isinstance(partition, str) and not isinstance(given, decided):
        return None
    source, made = data(), copy.copy(given)
    source.prepare_data()
    source.setup("fit")
    made.dataset = source.train_dataloader().dataset
    try:
        return made.partition
    except ValueError as error:
        raise ValueError(f"partition={partition!r}: {error}") from error


def _numbers(clients: Sequence[int] | None, division: Partition | None) -> Sequence[int]:
    """The numbers of clients to train with."""
    if division is None:
        return (1, 4) if clients is None else clients
    number = division.num_clients
    if clients is not None and list(clients) != [number]:
        raise ValueError(
            f"clients={list(clients)}: the partition divides the data among {number} clients: pass [{number}], or leave"
            " clients out."
        )
    return [number]


def _strategy(partition: Partitioner | Partition, local_steps: int, seed: int) -> FederatedStrategy:
    # One after the other: a rehearsal of both executors would cost more than most of the runs.
    return FederatedStrategy(
        partitioner=partition, local_epochs=None, local_steps=local_steps, seed=seed, executor="sequential"
    )


class Counts(ComputeAccounting):
    """Without a table at the end of each run."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say nothing."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without what every Trainer says of itself.

    Where both of Lightning's packages are there, both say it by the logger of the one that was imported last.
    """
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _train(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    strategy: FederatedStrategy,
    flops: float,
    clients: int,
    loss: str | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    accounting = Counts(law=None, max_flops=flops)
    quiet: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    run = pl.Trainer(
        **{"accelerator": "auto", "devices": 1, **options, **quiet}, max_epochs=-1, strategy=strategy,
        callbacks=[accounting], limit_val_batches=0,
    )  # fmt: skip
    run.fit(module, datamodule=data)
    ledger = accounting.ledger
    test = pl.Trainer(**{"accelerator": "auto", "devices": 1, **options, **quiet})
    (found,) = list(losses_in(test.validate(module, datamodule=data, verbose=False), loss))
    return {
        "params": ledger.average_params,
        "clients": clients,
        "tokens": ledger.tokens / clients,
        "flops": ledger.training_flops / clients,
        "loss": found,
    }


def losses_in(metrics: Sequence[Any], loss: str | None) -> Iterator[float]:
    """The validation loss in what ``trainer.validate`` returns: one number.

    Raises:
        ValueError: if none of its names was logged.
    """
    logged = {name: float(value) for each in metrics for name, value in each.items()}
    names = LOSSES if loss is None else (loss,)
    name = next((each for each in names if each in logged), None)
    if name is None:
        raise ValueError(
            f"loss={loss!r}: validation_step logs {', '.join(logged) or 'nothing'}; log the loss as"
            f" {' or '.join(names[:2])}, or name it."
        )
    yield logged[name]
