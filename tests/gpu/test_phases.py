"""CriticalPhase on a GPU: unscaled gradients, learning rates left alone, and reads from the device only when due."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_fedscale.callbacks import CriticalPhase
from lightning_fedscale.phases import relative_change
from tests.laws import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Module(pl.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
        self.options = options

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, **self.options)


def run(accelerator: str, **options: Any) -> tuple[CriticalPhase, pl.Trainer]:
    adam = options.pop("adam", {})
    phase = CriticalPhase(relative_change(1e6, window=4), scale=2.0, noise_every=5)
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, max_steps=40, callbacks=[phase], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(Module(**adam), DataLoader(reference.dataset(400), 8, shuffle=False))
    return phase, trainer


@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_sees_what_the_cpu_sees(precision: str, adam: dict[str, Any]) -> None:
    phase, trainer = run("cuda", precision=precision, adam=adam)
    alone, _ = run("cpu")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    skipped = 40 - len(phase.record.rows)
    assert skipped <= 12  # while the gradient scaler looks for its scale
    if precision == "32-true":
        assert [row[1] for row in phase.record.rows] == pytest.approx([row[1] for row in alone.record.rows], rel=1e-3)
    assert all(0.01 < row[1] < 10 for row in phase.record.rows)
    assert math.isfinite(phase.noise_scale.square)


def test_reads_from_the_device_only_when_due() -> None:
    reads = []
    module, phase = Module(), CriticalPhase(relative_change(1e6, window=4), scale=2.0, noise_every=None)

    class Mode(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
            reads.append(len(phase.record.rows))

    trainer = pl.Trainer(
        accelerator="cuda", devices=1, max_steps=40, callbacks=[phase, Mode()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(reference.dataset(400), 8))
    assert sorted(set(reads)) == [0, 10, 20, 30, 40]
