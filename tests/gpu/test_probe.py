"""The memory model and the probe on a GPU: never above the truth, and close below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

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
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(BUDGET / total)
    try:
        probe = MaxBatchProbe(budget=BUDGET, headroom=0.02, apply=False)
        trainer = pl.Trainer(
            accelerator="cuda", devices=1, max_steps=1, precision=precision, logger=False, callbacks=[probe],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Classifier(make()), loader(batch_of))
        assert probe.result is not None
        assert probe.model is not None
        assert probe.result.real_steps <= 2
        found = probe.result.max_batch
        assert fits(probe.model.real_step(found))
        # Within 5 % below the truth.
        assert not fits(probe.model.real_step(int(found / 0.95) + 1))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
