"""Clients that are only registered cost two arrays, and a round costs what its cohort costs."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import samplers
from lightning_fedscale.core.plan import plan_round
from lightning_fedscale.core.round.client_data import ClientData
from lightning_fedscale.core.round.federation import Federation
from tests.laws import reference
from tests.strategies import sequential

MANY, FEW, COHORT, ROUNDS = 300_000, 3_000, 40, 3


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Census(pl.Callback):
    """What Python and numpy hold before the first round and after the last one, and who took part."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.objects: list[int] = []
        self.took_part: set[int] = set()

    def count(self) -> None:
        gc.collect()
        self.bytes.append(tracemalloc.get_traced_memory()[0])
        self.objects.append(len(gc.get_objects()))

    def on_round_start(self, trainer: pl.Trainer, module: Any, round: int, cohort: Any) -> None:
        self.took_part |= set(cohort.tolist())
        if round == 0:
            self.count()

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.count()


def run(clients: int, **strategy: Any) -> tuple[Census, pl.Trainer]:
    """Every client holds one sample; counted from before the strategy is there."""
    data = TensorDataset(torch.ones(clients, 1), torch.zeros(clients, dtype=torch.int64))
    census = Census()
    gc.freeze()  # what was there before is not looked through each time
    tracemalloc.start()
    census.count()
    trainer = reference.quiet_trainer(
        strategy=sequential(clients, COHORT, **strategy), max_epochs=ROUNDS, callbacks=[census]
    )
    trainer.fit(Tiny(), DataLoader(data, batch_size=4, shuffle=True))
    tracemalloc.stop()
    return census, trainer


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What the first round of a process imports is no client's."""
    run(FEW)


KEEP = {"client_optimizer": "keep", "local_steps": 1}


def test_clients_that_never_took_part_are_two_numbers_in_arrays() -> None:
    few, _ = run(FEW, **KEEP)
    many, trainer = run(MANY, **KEEP)
    assert len(many.took_part) > 2 * COHORT
    # An index and an offset of 8 bytes each. A Python number alone would take 28 more.
    per_client = (many.bytes[2] - many.bytes[0] - (few.bytes[2] - few.bytes[0])) / (MANY - FEW)
    assert 15.5 < per_client < 16.5
    # Objects that the garbage collector knows; what the clients of three rounds left behind does not depend on others.
    assert many.objects[2] - many.objects[0] == pytest.approx(few.objects[2] - few.objects[0], rel=0.05)
    store = trainer.strategy._federation.fit.clients.store  # type: ignore[attr-defined]
    assert set(store.keepers()) == set(store._cursors) == many.took_part


STEPS_OF_A_ROUND = "open_round", "run_round", "end_round"


@pytest.fixture(scope="module")
def found() -> dict[str, list[int]]:
    """By step of a round, one after the other: its peaks in rounds among few clients, and then among many."""
    with pytest.MonkeyPatch.context() as patch:
        found = {name: peaks(patch, Federation, name) for name in STEPS_OF_A_ROUND}
        run(FEW)
        run(MANY)
    return found


def peaks(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """Bytes that each call of a method takes at its peak, beyond what was there before."""
    found: list[int] = []
    original: Callable[..., Any] = getattr(owner, name)

    def traced(*args: Any, **kwargs: Any) -> Any:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        answer = original(*args, **kwargs)
        found.append(tracemalloc.get_traced_memory()[1] - before)
        return answer

    monkeypatch.setattr(owner, name, traced)
    return found


@pytest.mark.parametrize("name", STEPS_OF_A_ROUND)
def test_a_round_takes_no_memory_for_clients_outside_its_cohort(name: str, found: dict[str, list[int]]) -> None:
    taken = found[name]
    assert len(taken) == 2 * ROUNDS
    # An array over all clients would take a byte for each at least.
    assert all(many - few < 100_000 for few, many in zip(taken[:ROUNDS], taken[ROUNDS:], strict=True))
    assert taken[-1] < 500_000


class Counting:
    """An array that tells how many of its elements were read."""

    def __init__(self, array: Any) -> None:
        self.array, self.read = array, 0

    def __getitem__(self, key: Any) -> Any:
        part = self.array[key]
        self.read += np.size(part)
        return part

    def __len__(self) -> int:
        return len(self.array)


def test_planning_reads_the_cohort_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    plan = ClientData.plan

    def counted(self: ClientData, round: int, losses: Any) -> Any:
        partition = self.partition
        offsets, indices = Counting(partition.offsets), Counting(partition.indices)
        with monkeypatch.context() as inside:
            inside.setitem(partition.__dict__, "offsets", offsets)
            inside.setitem(partition.__dict__, "indices", indices)
            answer = plan(self, round, losses)
        read.append((offsets.read, indices.read))
        return answer

    monkeypatch.setattr(ClientData, "plan", counted)
    run(FEW)
    assert read == [(2 * COHORT, 0)] * ROUNDS


def test_the_sampler_takes_memory_for_its_cohort() -> None:
    def peak(clients: int) -> int:
        tracemalloc.start()
        plan_round(
            3,
            seed=0,
            sampler=samplers.uniform,
            num_clients=clients,
            clients_per_round=COHORT,
            cost=lambda cohort: cohort,
            world_size=2,
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(MANY)
    assert peak(10**9) < 1.2 * peak(MANY) < 200_000
