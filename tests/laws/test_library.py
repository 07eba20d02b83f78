"""Law 3, the library does not matter: hand-written loops give the same weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.laws import reference
from tests.strategies import sequential


def federated(
    module: pl.LightningModule,
    data: object,
    *,
    rounds: int,
    trainer: dict[str, object] | None = None,
    **strategy: object,
) -> dict[str, Tensor]:
    run = reference.quiet_trainer(max_epochs=rounds, strategy=sequential(**strategy), **(trainer or {}))
    run.fit(module, data)
    return module.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epochs", [1, 2])
def test_equals_fed_avg_written_by_hand(dtype: torch.dtype, epochs: int) -> None:
    data, partition = reference.dataset(dtype=dtype), reference.unequal_clients()
    expected = reference.fed_avg(
        reference.make_module(dtype), data, partition, rounds=10, clients_per_round=4, local_epochs=epochs, clip=0.5
    )
    precision = {torch.float32: "32-true", torch.float64: "64-true"}[dtype]
    got = federated(
        reference.make_module(dtype),
        reference.loader(data),
        rounds=10,
        trainer={"gradient_clip_val": 0.5, "precision": precision},
        partitioner=partition,
        clients_per_round=4,
        local_epochs=epochs,
    )
    assert reference.difference(got, expected) == 0.0


def test_equals_fed_avg_with_accumulation_uniform_weights_and_batch_norm() -> None:
    data, partition = reference.dataset(272), reference.unequal_clients(272)
    # This many samples in 7 parts leave no tail batch of one sample, which BatchNorm could not take.
    assert all(size % 8 != 1 for size in partition.sizes)
    options: dict[str, Any] = {"batch_norm": True, "dropout": 0.0}
    expected = reference.fed_avg(
        reference.make_module(**options),
        data,
        partition,
        rounds=10,
        clients_per_round=3,
        accumulate=3,
        weigh=lambda n: 1.0,
    )
    got = federated(
        reference.make_module(**options),
        reference.loader(data),
        rounds=10,
        trainer={"accumulate_grad_batches": 3},
        partitioner=partition,
        clients_per_round=3,
        aggregator="uniform",
    )
    assert reference.difference(got, expected) == 0.0


@pytest.mark.parametrize("seed", [0, 5])
def test_seed_decides_cohorts_and_orders(seed: int) -> None:
    data, partition = reference.dataset(), reference.unequal_clients()
    expected = reference.fed_avg(reference.make_module(), data, partition, rounds=3, clients_per_round=2, seed=seed)
    got = federated(
        reference.make_module(), reference.loader(data), rounds=3, partitioner=partition, clients_per_round=2, seed=seed
    )
    assert reference.difference(got, expected) == 0.0
    other = federated(
        reference.make_module(),
        reference.loader(data),
        rounds=3,
        partitioner=partition,
        clients_per_round=2,
        seed=seed + 1,
    )
    assert reference.difference(got, other) > 1e-4


class Adam(reference.Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.0, batch_norm=True)

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}


def test_one_client_that_keeps_its_optimizer_is_the_plain_trainer() -> None:
    data = reference.dataset(200)
    results = []
    for strategy in ("auto", sequential(num_clients=1, client_optimizer="keep")):
        torch.manual_seed(0)
        module = Adam()
        run = reference.quiet_trainer(max_epochs=8, strategy=strategy, gradient_clip_val=1.0, accumulate_grad_batches=2)
        run.fit(module, reference.loader(data, shuffle=False))
        results.append({name: value.clone() for name, value in module.state_dict().items()})
    plain, kept = results
    for name in plain:
        assert torch.equal(plain[name], kept[name]), name


def test_a_client_that_resets_its_optimizer_is_not_the_plain_trainer() -> None:
    data = reference.dataset(200)
    results = []
    for strategy in ("auto", sequential(num_clients=1)):
        torch.manual_seed(0)
        module = Adam()
        reference.quiet_trainer(max_epochs=3, strategy=strategy).fit(module, reference.loader(data, shuffle=False))
        results.append(module.state_dict())
    assert reference.difference(*results) > 1e-4


def test_local_steps_continue_where_the_client_stopped() -> None:
    """One client, H batches a round: the batches of all rounds in a row are whole passes, one after the other."""
    seen: list[Tensor] = []

    class Spy(reference.Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            seen.append(batch[0][:, 0].clone())
            return super().training_step(batch, batch_idx)

    data = reference.dataset(20)
    module = Spy()
    run = reference.quiet_trainer(max_epochs=4, strategy=sequential(num_clients=1, local_steps=3))
    run.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    assert [len(batch) for batch in seen] == [8, 8, 4] * 4
    everything = data.tensors[0][:, 0].sort().values
    passes = [torch.cat(seen[i : i + 3]) for i in range(0, 12, 3)]
    for one in passes:
        assert torch.equal(one.sort().values, everything)
    assert not torch.equal(passes[0], passes[1])
