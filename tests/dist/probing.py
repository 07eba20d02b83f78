"""Ranks with unequal memory: ``python probing.py STRATEGY BUDGET_0 BUDGET_1 APPLY FOLDER`` saves what each finds."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import MaxBatchProbe
from tests.networks import Classifier, mlp, vectors


class Watched(Classifier):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*vectors(400)), 4)


def main(kind: str, budgets: list[str], apply: bool, folder: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))  # Lightning sets it for the processes that it starts
    strategy = FederatedStrategy(num_clients=2, executor="sequential") if kind == "federated" else kind
    probe, module = MaxBatchProbe(budget=int(budgets[rank]), headroom=0.0, apply=apply), Watched()
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=2, max_epochs=1, callbacks=[probe], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    found: dict[str, Any] = {}
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.fit(module)
    except Exception as error:
        found["error"] = str(error)
    else:
        found = {"sizes": module.sizes, "told": [str(each.message) for each in told]}
        if probe.result is not None:
            found |= {"max_batch": probe.result.max_batch, "limited_by": probe.result.limited_by}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:4], sys.argv[4] == "apply", Path(sys.argv[5]))
