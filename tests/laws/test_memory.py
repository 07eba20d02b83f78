"""What a run allocates beyond the plain Trainer, in bytes of tensors."""

from __future__ import annotations

import weakref
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.devices.profiling.scratch import tensors_of
from tests.laws import reference

WIDTH, LAYERS = 512, 6
FROZEN = WIDTH * WIDTH * LAYERS


class AllocatedBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operators return inside the context, and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is there already does not count.
        given = {t.untyped_storage()._cdata for t in tensors_of(args, kwargs)}
        results = func(*args, **(kwargs or {}))
        for tensor in tensors_of(results):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self._now)
        return results

    def _freed(self, storage: int) -> None:
        self._now -= self._live.pop(storage, 0)


def test_the_count_is_that_of_live_memory() -> None:
    with AllocatedBytes() as counted:
        kept = torch.zeros(100)
        for _ in range(3):
            kept = kept + 1  # two at a time
    assert counted.peak == 800
    assert len(kept) == 100


class Adapters(pl.LightningModule):
    """Small trainable adapters next to large frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(WIDTH, 1, bias=False) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(1, WIDTH, bias=False) for _ in range(LAYERS))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        for layer, down, up in zip(self.layers, self.down, self.up, strict=True):
            x = torch.tanh(layer(x)) + up(down(x))
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def peak(strategy: Any) -> int:
    """Two rounds of four clients with two batches, or as many batches."""
    module, data = Adapters(), TensorDataset(torch.ones(32, WIDTH))
    trainer = reference.quiet_trainer(max_epochs=2, strategy=strategy)
    with AllocatedBytes() as counted:
        trainer.fit(module, DataLoader(data, batch_size=4))
    return counted.peak


class GivesUp(Adapters):
    """Is found not to be vectorizable in the second round, after the first one's waves."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.trainer.global_step == 0 else loss * float(loss.detach() < float("inf"))


@pytest.mark.parametrize("make", [Adapters, GivesUp])
def test_waves_are_released_after_fit_and_when_clients_train_sequentially(make: type[Adapters]) -> None:
    """The memory of the stacked models and of their optimizers' state."""
    held: list[bool] = []
    strategy = FederatedStrategy(4, executor="vectorized")

    def waves_hold() -> bool:
        executor = strategy._federation.fit.executor._vectorized._waves._wave  # type: ignore[union-attr]
        return bool(executor._memory or executor._stacks or executor._leaves or executor._optimizer._stacks)

    class Spy(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            held.append(waves_hold())

    data = DataLoader(TensorDataset(torch.ones(32, WIDTH)), batch_size=4)
    reference.quiet_trainer(max_epochs=2, strategy=strategy, callbacks=[Spy()]).fit(make(), data)
    assert held == [True, make is Adapters]
    assert not waves_hold()


@pytest.mark.parametrize("executor", ["sequential", "vectorized", "auto"])
def test_frozen_parameters_take_less_than_a_byte_each(executor: Any) -> None:
    """They took 24 bytes each: three float64 vectors of all tensors."""
    more = peak(FederatedStrategy(4, executor=executor, clients_per_wave=2)) - peak("auto")
    assert more < FROZEN
