"""One run of a study: a setting is trained with a fraction of the budget, then validated."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset

from lightning_fedscale.callbacks.compute_accounting.callback import ComputeAccounting
from lightning_fedscale.core.lightning.train_data import TrainData
from lightning_fedscale.core.round.server_step import Diverged
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.scaling.runs import LOSSES
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.study.methods import options_of
from lightning_fedscale.study.race import Job
from lightning_fedscale.utils import randomness

Executing: TypeAlias = Literal["sequential", "vectorized"]

_QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Project:
    """The module, the data and the options that a study trains with.

    Args:
        module: class or function that makes the module of a size.
        data: class or function that makes the data module.
        argument: argument of ``module`` that sets the model's size.
        partition: the partition of the data.
        clients_per_round: number of clients that train in a round; None for all.
        methods: arguments of `FederatedStrategy` in Hydra's form, by the method's name.
        flops: compute of a whole run, of all clients together.
        seed: the first seed.
        loss: name of the logged validation loss; None for the first of the usual names.
        trainer: arguments of the Trainer.
    """

    def __init__(
        self,
        module: Callable[..., pl.LightningModule],
        data: Callable[[], pl.LightningDataModule],
        *,
        argument: str,
        partition: Partition,
        clients_per_round: int | float | None,
        methods: Mapping[str, Mapping[str, Any]],
        flops: float,
        seed: int,
        loss: str | None,
        trainer: Mapping[str, Any],
    ) -> None:
        self.module, self.data, self.argument, self.partition = module, data, argument, partition
        self.clients_per_round, self.methods, self.flops = clients_per_round, methods, flops
        self.seed, self.loss, self.trainer = seed, loss, dict(trainer)

    def run(
        self, job: Job, executor: Executing = "sequential", *, each_client: bool = False, rounds: int = -1
    ) -> dict[str, Any]:
        """Train and validate.

        Args:
            job: the run to do.
            executor: executor of the clients; it does not change the result.
            each_client: whether to validate the model on every client's training data too.
            rounds: limit of the rounds; -1 for as many as the budget allows.

        Returns:
            the row of the ledger: loss (infinite if it is not finite), parameters, samples, tokens and FLOPs of all
            clients, bytes of a client in both directions, rounds, seconds, ``worst``, the largest loss of a client, and
            ``keeps``, whether optimizers have a state that a client could keep.
        """
        setting, begun, seed = job.setting, time.monotonic(), self.seed + max(0, job.seed)
        with quiet(), randomness.untouched():
            randomness.seed_globals(seed, torch.device("cpu"))
            net = at_rate(self.module(**{self.argument: setting.size}), setting.rate)
            data = self.data()
            counts, sent = _Counts(law=None, study=None, max_flops=self.flops * job.share), _Sent()
            strategy = FederatedStrategy(
                partitioner=self.partition,
                clients_per_round=self.clients_per_round,
                local_epochs=None,
                local_steps=setting.local_steps,
                executor=executor,
                seed=seed,
                **options_of(self.methods[setting.method]),
            )
            options = {"accelerator": "auto", "devices": 1, **self.trainer, **_QUIET}
            batches = _BatchSize(setting.batch_size)
            run = pl.Trainer(
                **options, max_epochs=-1, max_steps=rounds, strategy=strategy, callbacks=[batches, counts, sent],
                limit_val_batches=0,
            )  # fmt: skip
            test = pl.Trainer(**options)
            try:
                run.fit(net, datamodule=data)
                loss = _loss_in(test.validate(net, datamodule=data, verbose=False), self.loss)
            except Diverged:
                loss = math.inf
            worst = math.nan
            if each_client:
                # validation_step may not accept training data; an optional measurement must not stop the study.
                with suppress(Exception):
                    worst = max(self._losses_of_clients(pl.Trainer(**options), net, batches), default=math.nan)
        ledger = counts.ledger
        return {
            **setting._asdict(),
            "share": job.share,
            "seed": job.seed,
            "loss": loss if math.isfinite(loss) else math.inf,
            "worst": worst,
            "params": ledger.average_params,
            "samples": ledger.samples,
            "tokens": ledger.tokens,
            "flops": ledger.training_flops,
            "bytes": sent.total / max(1, sent.clients),
            "rounds": run.global_step,
            "seconds": time.monotonic() - begun,
            "executor": executor,
            "keeps": not all(map(_is_plain, run.optimizers)),
        }

    def _losses_of_clients(self, test: pl.Trainer, net: pl.LightningModule, batches: _BatchSize) -> list[float]:
        # This takes a separate Trainer, since one with a data module would set that up again for every client.
        loader = batches.loader
        if loader is None:
            return []
        found = list[float]()
        for client in range(self.partition.num_clients):
            samples = Subset(loader.dataset, self.partition.client(client).tolist())
            if len(samples):
                own = DataLoader(samples, batch_size=256, collate_fn=loader.collate_fn)
                found.append(_loss_in(test.validate(net, dataloaders=own, verbose=False), self.loss))
        return found


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer is SGD without momentum, which has no state."""
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)


class _BatchSize(pl.Callback):
    """Sets the batch size of the project's train loader; 0 leaves it unchanged."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.loader: DataLoader[Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = TrainData(trainer, need_samples=False)
        if self._size and data.batch_size != self._size:
            data.set_batch_size(self._size)
        self.loader = data.loaders[0] if len(data.loaders) == 1 else None


class _Sent(pl.Callback):
    """Sums the bytes that clients send and receive."""

    def __init__(self) -> None:
        self.total, self.clients = 0.0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        record: Any = trainer.strategy.last_round  # type: ignore[attr-defined]
        self.total += record.upload_bytes + record.download_bytes
        self.clients = max(self.clients, len(record.clients))


class _Counts(ComputeAccounting):
    """`ComputeAccounting` without a table at the end of each run."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print nothing."""


def at_rate(module: pl.LightningModule, factor: float) -> pl.LightningModule:
    """Multiply the learning rates of the module's optimizers and schedulers by a factor."""
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


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages that every Trainer logs about itself.

    If both of Lightning's packages are installed, both log with the logger of the one that was imported last.
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


def _loss_in(metrics: Sequence[Any], loss: str | None) -> float:
    """Find the validation loss in the result of ``trainer.validate``.

    Raises:
        ValueError: if the loss was not logged under any of its names.
    """
    logged = {name: float(value) for each in metrics for name, value in each.items()}
    names = LOSSES if loss is None else (loss,)
    name = next((each for each in names if each in logged), None)
    if name is None:
        raise ValueError(
            f"loss={loss!r}: validation_step logs {', '.join(logged) or 'nothing'}. Log the loss as"
            f" {' or '.join(names[:2])}, or pass its name as loss=."
        )
    return logged[name]
