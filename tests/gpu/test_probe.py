"""The memory model and the probe on a GPU: never above the truth, and close below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import MaxBatchProbe
from tests.networks import KINDS, Classifier

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SAMPLES = 2**22
BUDGET = 2 * 2**30


def loader(batch_of: Callable[[int], Any]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*(t[:1].expand(SAMPLES, *t.shape[1:]) for t in batch_of(1))), 2)


def fits(step: Callable[[], None]) -> bool:
    try:
        step()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_close_below_the_truth(kind: str, precision: Literal["32-true", "bf16-mixed"]) -> None:
    make, batch_of = KINDS[kind]
    # The probe is not limited: the module itself stays in memory beside the copy that it measures.
    probe = MaxBatchProbe(budget=BUDGET, headroom=0.02, apply=False)
    trainer = pl.Trainer(
        accelerator="cuda", devices=1, max_steps=1, precision=precision, logger=False, callbacks=[probe],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Classifier(make())
    trainer.fit(module, loader(batch_of))
    assert probe.result is not None
    assert probe.model is not None
    assert probe.result.real_steps <= 2
    found = probe.result.max_batch
    module.cuda()  # Lightning has moved it to the CPU, and real steps run where it is
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((BUDGET + torch.cuda.memory_allocated()) / total)
    try:
        assert fits(probe.model.real_step(found))
        # Within 5 % below the truth.
        assert not fits(probe.model.real_step(int(found / 0.95) + 1))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_the_found_batch_stays_within_the_budget(kind: str) -> None:
    """Of a federation, which keeps memory of its own that the probe's steps on a copy do not show."""
    make, batch_of = KINDS[kind]
    probe = MaxBatchProbe(budget=BUDGET, headroom=0.1, max_samples=2**16)
    trainer = pl.Trainer(
        accelerator="cuda", devices=1, max_steps=2, logger=False, callbacks=[probe], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        strategy=FederatedStrategy(num_clients=2, executor="sequential", local_steps=2, cache_dataset=False),
    )  # fmt: skip
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    module = Batched(make(), loader(batch_of).dataset)
    trainer.fit(module)
    assert probe.result is not None
    assert module.peak - before <= BUDGET


class Batched(Classifier):
    """Has a batch size, and reads its peak memory after the first round, which follows the probe."""

    peak = 0

    def __init__(self, network: nn.Module, data: Dataset[Any]) -> None:
        super().__init__(network)
        self.batch_size, self._data = 2, data

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._data, self.batch_size)

    def on_train_epoch_start(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def on_train_end(self) -> None:
        self.peak = torch.cuda.max_memory_allocated()
