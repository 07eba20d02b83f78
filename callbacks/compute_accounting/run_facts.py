"""Facts about a run's training on which a law depends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_fedscale.partitioners import FilePartitioner, Partition
from lightning_fedscale.partitioners.registry import name_of
from lightning_fedscale.scaling import Law
from lightning_fedscale.scaling.agreement import Agreement, agreement
from lightning_fedscale.scaling.made_for import MadeFor
from lightning_fedscale.scaling.partition_id import PartitionId
from lightning_fedscale.strategy import FederatedStrategy


def trained_as(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the facts that a law fitted to this run needs, by column of a sweep; unknown facts are left out.

    Example:
        >>> trained_as(pl.Trainer(accelerator="cpu", logger=False))
        {}
    """
    loader = trainer.train_dataloader
    facts: dict[str, Any] = {
        "batch": getattr(loader, "batch_size", None),
        "optimizer": " and ".join(dict.fromkeys(type(each).__name__ for each in trainer.optimizers)) or None,
    }
    strategy = trainer.strategy
    if isinstance(strategy, FederatedStrategy) and strategy.partition is not None:
        facts |= {
            "rules": json.dumps(strategy.method, sort_keys=True), "local_steps": strategy.local_steps,
            "partition_name": _partition_name(strategy), "fingerprint": strategy.partition.fingerprint,
        }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


def agreement_of(law: Law, trainer: pl.Trainer, samples: float) -> Agreement | None:
    """Compare a run with those a law was fitted to; None without a federation, or if the law describes no runs.

    Args:
        law: the law.
        trainer: Trainer of the run.
        samples: samples that all clients together trained on.
    """
    strategy = trainer.strategy
    if law.made_for == MadeFor() or not isinstance(strategy, FederatedStrategy) or strategy.partition is None:
        return None
    facts = trained_as(trainer)
    partition = PartitionId(facts.get("partition_name"), facts["fingerprint"], strategy.partition.num_clients)
    return agreement(
        law, method=strategy.method, partition=partition, batch_size=facts.get("batch"),
        local_steps=facts.get("local_steps"), passes=samples / strategy.partition.num_samples,
    )  # fmt: skip


def _partition_name(strategy: FederatedStrategy) -> str | None:
    given = strategy.partitioner
    if isinstance(given, Partition):
        return None
    return Path(given.path).name if isinstance(given, FilePartitioner) else name_of(given) or repr(given)
