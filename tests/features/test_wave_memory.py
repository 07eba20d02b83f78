"""The memory of vectorized clients is free again as soon as clients train sequentially, and after the run."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy, Partition
from lightning_fedscale.core.executors import SequentialExecutor, auto
from lightning_fedscale.core.executors.vectorized import executor
from lightning_fedscale.core.executors.vectorized.wave import Wave

CLIENTS, BATCHES, ROOM = 6, 3, 4


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def vectorized(x: Tensor) -> int:
    """How many clients share this step; 0 in a sequential step."""
    return len(torch._C._functorch.get_unwrapped(x)) if torch._C._functorch.is_batchedtensor(x) else 0


class Unable(Module):
    """Cannot be vectorized, which only its third step shows."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx > 1 and vectorized(batch[0]):
            raise NotImplementedError
        return super().training_step(batch, batch_idx)


class Large(Module):
    """Has room for a dry run, but not for all clients at once."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if vectorized(batch[0]) > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory, or so it seems")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("case", ["slower", "unable", "vectorized", "halved"])
def test_no_wave_stays_that_is_not_needed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waves, widths, runs = list[weakref.ref[Tensor]](), list[int](), list[int]()
    begin, run = Wave.begin, SequentialExecutor.run
    gc.freeze()  # what was there before is not looked through each time

    def left() -> int:
        gc.collect()
        return sum(wave() is not None for wave in waves)

    def begun(self: Wave, *args: Any) -> None:
        begin(self, *args)
        waves.append(weakref.ref(self._memory[0]))
        widths.append(len(self._memory[0]))

    def observed(self: SequentialExecutor, *args: Any) -> Any:
        runs.append(left())
        yield from run(self, *args)

    monkeypatch.setattr(Wave, "begin", begun)
    monkeypatch.setattr(SequentialExecutor, "run", observed)
    if case == "slower":
        monkeypatch.setattr(auto, "_MARGIN", 1e9)
    data = TensorDataset(torch.randn(CLIENTS * BATCHES * 4, 8), torch.randint(3, (CLIENTS * BATCHES * 4,)))
    clients = Partition.from_lists([list(range(k, len(data), CLIENTS)) for k in range(CLIENTS)])
    strategy = FederatedStrategy(partitioner=clients, executor="auto" if case == "slower" else "vectorized")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit({"unable": Unable, "halved": Large}.get(case, Module)(), DataLoader(data, 4))
    assert waves
    assert runs == [0] * len(runs)
    assert len(runs) == (3 if case in ("slower", "unable") else 0)
    assert left() == 0
    if case == "halved":
        assert max(widths) == CLIENTS
        assert widths[-1] <= ROOM


def test_data_on_the_device_are_released_after_the_run() -> None:
    data = TensorDataset(torch.randn(CLIENTS * 4, 8), torch.randint(3, (CLIENTS * 4,)))
    strategy = FederatedStrategy(num_clients=CLIENTS, cache_dataset=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(data, 4))
    assert trainer.global_step == 1
    federation = strategy._federation
    assert federation is not None
    assert federation.fit.data is not None
    assert federation.fit.data.loader.cache is None


def widths(monkeypatch: pytest.MonkeyPatch, free: int, folder: Path, rounds: int, ckpt_path: str | None) -> list[int]:
    """How many clients share a wave, in a run on a machine with so much free memory."""
    found, begin = list[int](), Wave.begin

    def begun(self: Wave, shared: Any, states: Any, *args: Any) -> None:
        found.append(len(states))
        begin(self, shared, states, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Wave, "begin", begun)
        patch.setattr(executor, "free_memory", lambda device: free)
        data = TensorDataset(torch.randn(CLIENTS * 4, 8), torch.randint(3, (CLIENTS * 4,)))
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=rounds, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            strategy=FederatedStrategy(num_clients=CLIENTS, executor="vectorized"),
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(data, 4), ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / f"{rounds}.ckpt")
    return found[1:]  # after the dry run


def test_a_resumed_run_keeps_the_width_of_its_waves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The order of sums depends on it, and free memory on what else runs on the machine."""
    first, less, much = 7_000, 4_500, 10**9
    assert widths(monkeypatch, first, tmp_path, 2, None) == [3] * 4
    assert widths(monkeypatch, much, tmp_path, 3, str(tmp_path / "2.ckpt")) == [3] * 2
    assert widths(monkeypatch, less, tmp_path, 4, str(tmp_path / "3.ckpt")) == [3] * 2
    assert widths(monkeypatch, less, tmp_path / "other", 2, None) == [2] * 6
    assert widths(monkeypatch, much, tmp_path / "other", 3, None) == [CLIENTS] * 3
    # What certainly does not fit is not kept.
    assert widths(monkeypatch, less, tmp_path, 4, str(tmp_path / "other" / "3.ckpt")) == [2] * 3
