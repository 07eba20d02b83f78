"""One run of a study: a setting trained with a share of the budget, then validated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Subset

from lightning_fedscale import randomness
from lightning_fedscale.global_model import Diverged
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.study.methods import options_of
from lightning_fedscale.study.race import Job
from lightning_fedscale.sweep import Counts, at_rate, losses_in, quiet
from lightning_fedscale.train_data import TrainData

Executing: TypeAlias = Literal["sequential", "vectorized"]

_QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Project:
    """What a study trains.

    Args:
        module: makes the module of a size: a class or function.
        data: makes the data module.
        argument: of ``module``, which makes the model larger or smaller.
        partition: who holds what.
        clients_per_round: how many train in a round; None for all.
        methods: arguments of `FederatedStrategy` in Hydra's form, by name.
        flops: of all clients together, of a whole run.
        seed: of the first of the seeds.
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
            job: what to train.
            executor: how clients train; all train alike.
            each_client: whether the model is also validated on every client's training data.
            rounds: most of them; -1 for as many as the budget pays.

        Returns:
            the row of the ledger: loss (infinite where it is not finite), parameters, samples of all clients, FLOPs,
            bytes of a client in both directions, rounds, seconds, ``worst``, the largest loss of a client, and
            ``keeps``, whether optimizers have a state that a client could keep.
        """
        setting, begun, seed = job.setting, time.monotonic(), self.seed + max(0, job.seed)
        with quiet(), randomness.untouched():
            randomness.seed_globals(seed, torch.device("cpu"))
            net = at_rate(self.module(**{self.argument: setting.size}), setting.rate)
            data = self.data()
            counts, sent = Counts(law=None, max_flops=self.flops * job.share), _Sent()
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
                (loss,) = losses_in(test.validate(net, datamodule=data, verbose=False), self.loss)
            except Diverged:
                loss = math.inf
            worst = math.nan
            if each_client:
                # Training data need not be what validation_step takes, and what only looks on ends no study.
                with suppress(Exception):
                    worst = max(self._losses_of_clients(test, net, run, batches), default=math.nan)
        ledger = counts.ledger
        return {
            **setting._asdict(),
            "share": job.share,
            "seed": job.seed,
            "loss": loss if math.isfinite(loss) else math.inf,
            "worst": worst,
            "params": ledger.average_params,
            "samples": ledger.samples,
            "flops": ledger.training_flops,
            "bytes": sent.total / max(1, sent.clients),
            "rounds": run.global_step,
            "seconds": time.monotonic() - begun,
            "executor": executor,
            "keeps": not all(map(_is_plain, run.optimizers)),
        }

    def _losses_of_clients(
        self, test: pl.Trainer, net: pl.LightningModule, run: pl.Trainer, batches: _BatchSize
    ) -> list[float]:
        loader = batches.loader
        if loader is None:
            return []
        found = list[float]()
        for client in range(self.partition.num_clients):
            held = Subset(loader.dataset, self.partition.client(client).tolist())
            if len(held):
                own = DataLoader(held, batch_size=256, collate_fn=loader.collate_fn)
                found.extend(losses_in(test.validate(net, dataloaders=own, verbose=False), self.loss))
        return found


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is SGD without momentum, which remembers nothing."""
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)


class _BatchSize(pl.Callback):
    """Makes the project train with batches of a size."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.loader: DataLoader[Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = TrainData(trainer, need_samples=False)
        if data.batch_size != self._size:
            data.set_batch_size(self._size)
        self.loader = data.loaders[0] if len(data.loaders) == 1 else None


class _Sent(pl.Callback):
    """Adds up what clients send and receive."""

    def __init__(self) -> None:
        self.total, self.clients = 0.0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        record: Any = trainer.strategy.last_round  # type: ignore[attr-defined]
        self.total += record.upload_bytes + record.download_bytes
        self.clients = max(self.clients, len(record.clients))
