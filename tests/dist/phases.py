"""CriticalPhase and ComputeAccounting under plain DDP.

``python phases.py RANKS FOLDER`` saves what each rank sees and ends with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_fedscale.callbacks import ComputeAccounting, CriticalPhase
from lightning_fedscale.phases import relative_change
from lightning_fedscale.scaling import Rosenfeld
from tests.laws import reference

BATCH = 16
RANK = int(os.environ.get("LOCAL_RANK", 0))  # Lightning sets it for the processes that it starts


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class TwoOptimizers(Module):
    """Each with a layer of its own; the second takes a step with every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        first, second = cast(list[Any], self.optimizers())
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self) -> Any:
        lower, _, upper = self.net
        return [torch.optim.SGD(lower.parameters(), lr=0.2), torch.optim.Adam(upper.parameters(), lr=0.02)]


def run_two_optimizers(ranks: int) -> dict[str, Any]:
    """As `run`, with two optimizers."""
    phase = CriticalPhase(relative_change(0.15, window=3), scale=1.5, every_n_steps=4)
    trainer = pl.Trainer(
        strategy="ddp" if ranks > 1 else "auto", accelerator="cpu", devices=ranks, max_epochs=1, callbacks=[phase],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    module, data = TwoOptimizers(), reference.dataset(480, torch.float64)
    sampler: DistributedSampler[int] = DistributedSampler(data, ranks, RANK, shuffle=False)
    trainer.fit(module, DataLoader(data, BATCH // ranks, sampler=sampler))
    return {
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]),
        "rows": torch.tensor(phase.record.rows).nan_to_num(),
        "spans": phase.record.spans,
    }


def run(ranks: int) -> dict[str, Any]:
    phase = CriticalPhase(relative_change(0.15, window=3), scale=1.5, noise_every=1, every_n_steps=3)
    accounting = ComputeAccounting(law=Rosenfeld(E=0.2, A=5.0, B=20.0, alpha=0.4, beta=0.4))
    trainer = pl.Trainer(
        strategy="ddp" if ranks > 1 else "auto", accelerator="cpu", devices=ranks, max_steps=30,
        callbacks=[phase, accounting], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5, use_distributed_sampler=False,
    )  # fmt: skip
    module, data = Module(), reference.dataset(480, torch.float64)
    # Lightning's own would shuffle.
    sampler: DistributedSampler[int] = DistributedSampler(data, ranks, RANK, shuffle=False)
    trainer.fit(module, DataLoader(data, BATCH // ranks, sampler=sampler))
    return {
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]),
        "rows": torch.tensor(phase.record.rows),
        "spans": phase.record.spans,
        "ledger": {**accounting.ledger.state_dict(), "seconds": 0.0, "energy": 0.0, "meters": 0.0},
        "position": accounting.position.advice(),  # type: ignore[union-attr]
        "noise": [phase.noise_scale.square, phase.noise_scale.fisher_trace, phase.noise_scale.estimates],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {**run(int(sys.argv[1])), "two": run_two_optimizers(int(sys.argv[1]))}
    torch.save(found, Path(sys.argv[2]) / f"{RANK}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
