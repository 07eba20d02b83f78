"""The third law for every method: it equals a plain loop written from its paper, with either executor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fedscale import FederatedStrategy
from lightning_fedscale.asynchrony import Arrivals, FedBuff
from lightning_fedscale.local_rules import Ditto, fed_dyn, fed_nova, fed_prox, scaffold
from tests.laws import by_paper, reference

ROUNDS = 6
executors = pytest.mark.parametrize("executor", ["sequential", "vectorized"])


def world(epochs: int = 2) -> by_paper.World:
    return by_paper.World(reference.dataset(dtype=torch.float64), reference.unequal_clients(), 4, epochs)


def trained(executor: str, momentum: float = 0.0, **strategy: Any) -> tuple[dict[str, Tensor], FederatedStrategy]:
    module = by_paper.Net(momentum=momentum)
    options = {"clients_per_round": 4, "local_epochs": 2, **strategy}
    made = FederatedStrategy(partitioner=reference.unequal_clients(), executor=executor, **options)  # type: ignore[arg-type]
    trainer = reference.quiet_trainer(max_epochs=ROUNDS, strategy=made)
    trainer.fit(module, reference.loader(reference.dataset(dtype=torch.float64), by_paper.BATCH))
    assert made._federation is not None
    assert made._federation._executor.kind == executor
    return module.state_dict(), made


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return reference.difference(left, right) < 1e-10


@executors
def test_layers_that_stay_with_the_clients(executor: str) -> None:
    expected, own = by_paper.fed_per(world(), ROUNDS, "head")
    got, strategy = trained(executor, personal=["head.*"])
    assert same(got, expected)
    assert strategy._federation is not None
    states = strategy._federation._store.states
    assert sorted(states.clients("personal")) == sorted(own)
    for client, values in own.items():
        assert same(states.get(client, "personal"), values)  # type: ignore[arg-type]
    assert strategy.last_round is not None
    assert strategy.last_round.upload_bytes == 4 * (12 * 8 + 8) * 8


@executors
def test_a_buffer_of_updates_from_older_models(executor: str) -> None:
    seconds = [3.0, 1.0, 2.5, 7.0, 1.5, 4.0, 2.0]
    mode = FedBuff(concurrency=4, seconds=seconds)
    got, strategy = trained(executor, mode=mode, clients_per_round=3)
    arrivals = Arrivals(0, 7, 3, 4, lambda client, version: seconds[client])
    flushes = [arrivals.of_round(round) for round in range(ROUNDS)]
    assert any((flush.versions < round).any() for round, flush in enumerate(flushes))
    of_world = by_paper.World(reference.dataset(dtype=torch.float64), reference.unequal_clients(), 3, 2)
    pairs = [(flush.clients.tolist(), flush.versions.tolist()) for flush in flushes]
    assert same(got, by_paper.buffered(of_world, pairs, lambda late: float((1 + late) ** -0.5)))
    record = strategy.last_round
    assert record is not None
    assert record.simulated is not None
    assert record.simulated.total == flushes[-1].time
    assert record.staleness is not None
    assert record.staleness.tolist() == (ROUNDS - 1 - flushes[-1].versions).tolist()


@executors
def test_personal_models_of_ditto(executor: str) -> None:
    expected, own = by_paper.ditto(world(), ROUNDS, 0.5)
    got, strategy = trained(executor, personal=Ditto(0.5))
    assert same(got, expected)
    assert strategy._federation is not None
    states = strategy._federation._store.states
    assert sorted(states.clients("ditto")) == sorted(own)
    for client, values in own.items():
        flat = torch.cat([value.flatten() for value in values.values()])
        assert float((states.get(client, "ditto") - flat).abs().max()) < 1e-10


@executors
@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_fed_prox(executor: str, mu: float) -> None:
    assert same(trained(executor, local_rule=fed_prox(mu))[0], by_paper.fed_prox(world(), ROUNDS, mu))


@executors
@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold(executor: str, option: str) -> None:
    got, strategy = trained(executor, local_rule=scaffold(option), aggregator="uniform")
    assert same(got, by_paper.scaffold(world(), ROUNDS, option))
    assert strategy.last_round is not None
    assert strategy.last_round.upload_bytes == strategy.last_round.download_bytes == 4 * 2 * 140 * 8


@executors
def test_fed_dyn(executor: str) -> None:
    got, _ = trained(executor, local_rule=fed_dyn(0.1), aggregator="uniform")
    assert same(got, by_paper.fed_dyn(world(), ROUNDS, 0.1))


@executors
@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.5)])
def test_fed_nova(executor: str, momentum: float, mu: float) -> None:
    got, _ = trained(executor, momentum, local_rule=fed_nova(mu))
    assert same(got, by_paper.fed_nova(world(), ROUNDS, momentum, mu))
