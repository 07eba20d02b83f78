"""The smallest sweep of a project's own module that a scaling law can be fitted to: sizes x clients x compute."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch

from lightning_fedscale import randomness
from lightning_fedscale.callbacks.compute_accounting import ComputeAccounting
from lightning_fedscale.scaling.runs import LOSSES
from lightning_fedscale.strategy import FederatedStrategy

LEVELS = (1 / 16, 1 / 4, 1.0)
"""Shares of the compute that are trained with: a law of size and data takes several amounts of both."""


def sweep(
    module: Callable[..., pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    sizes: Sequence[int],
    flops: float,
    clients: Sequence[int] = (1, 4),
    *,
    argument: str = "size",
    folder: str | Path = "fedscale_sweep",
    loss: str | None = None,
    local_steps: int = 5,
    seed: int = 0,
    strategy: Callable[[int], FederatedStrategy] | None = None,
    trainer: dict[str, Any] | None = None,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Train a module in several sizes, with several numbers of clients and amounts of compute.

    Each run stops at its share of the compute, counted in FLOPs of its own step, and is then validated. Rows are
    written as they come; a sweep that was interrupted goes on with what is missing.

    Args:
        module: makes the module of a size: a class or function.
        data: makes the data module; it needs a validation loader.
        sizes: four or more, that span a factor of ten in parameters at least.
        flops: training compute of the largest runs, of all clients together; others take a quarter and a sixteenth.
        clients: numbers of clients.
        argument: of ``module``, which makes the model larger or smaller.
        folder: where ``runs.csv`` goes.
        loss: name of the logged validation loss; None for the first of the usual names.
        local_steps: batches of a client in a round.
        seed: of weights, partition and order.
        strategy: makes the strategy for a number of clients; None for equal parts and `local_steps`.
        trainer: arguments of the Trainer.
        each: called with every new row.

    Returns:
        A row per run: ``size``, ``params``, ``clients``, ``tokens`` and ``flops`` (of one client), ``loss``, ``share``.

    Raises:
        ValueError: for too few sizes, a module without that argument, or a loss that is not logged.
    """
    for name, given in (("module", module), ("data", data)):
        if not callable(given):
            raise TypeError(f"{name}={given!r}: pass a class or a function that makes it.")
    _check(module, argument, sizes, flops, clients)
    path = Path(folder, "runs.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if path.is_file():
        rows = [{str(name): value for name, value in row.items()} for row in pd.read_csv(path).to_dict("records")]
    asked = {"argument": argument, "flops_asked": flops, "local_steps": local_steps, "seed": seed}
    for row in rows:
        if changed := [name for name, value in asked.items() if {"argument": "size", **row}.get(name) != value]:
            raise ValueError(
                f"folder={str(folder)!r}: holds a sweep with other {', '.join(changed)}; name another folder."
            )
    done = {(row["size"], row["clients"], row["share"]) for row in rows}
    for number, size, share in product(clients, sizes, LEVELS):
        if (size, number, share) in done:
            continue
        kind = _strategy(number, local_steps, seed) if strategy is None else strategy(number)
        # Not `seed_everything`: the caller's generators and environment are not the sweep's.
        with quiet(), randomness.untouched():
            randomness.seed_globals(seed, torch.device("cpu"))
            found = _train(module(**{argument: size}), data(), kind, flops * share, number, loss, trainer or {})
        rows.append({"size": size, "share": share, **asked, **found})
        pd.DataFrame(rows).to_csv(path, index=False)
        if each is not None:
            each(rows[-1])
    return pd.DataFrame(rows)


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


def _strategy(clients: int, local_steps: int, seed: int) -> FederatedStrategy:
    # One after the other: a rehearsal of both executors would cost more than most of the runs.
    return FederatedStrategy(
        num_clients=clients, local_epochs=None, local_steps=local_steps, seed=seed, executor="sequential"
    )


class _Counts(ComputeAccounting):
    """Without a table at the end of each run."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass


@contextmanager
def quiet() -> Iterator[None]:
    """Without what every Trainer says of itself."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec")
            yield
    finally:
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
    accounting = _Counts(law=None, max_flops=flops)
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
    (found,) = list(_losses(test.validate(module, datamodule=data, verbose=False), loss))
    return {
        "params": ledger.average_params,
        "clients": clients,
        "tokens": ledger.tokens / clients,
        "flops": ledger.training_flops / clients,
        "loss": found,
    }


def _losses(metrics: Sequence[Any], loss: str | None) -> Iterator[float]:
    logged = {name: float(value) for each in metrics for name, value in each.items()}
    names = LOSSES if loss is None else (loss,)
    name = next((each for each in names if each in logged), None)
    if name is None:
        raise ValueError(
            f"loss={loss!r}: validation_step logs {', '.join(logged) or 'nothing'}; log the loss as"
            f" {' or '.join(names[:2])}, or name it."
        )
    yield logged[name]
