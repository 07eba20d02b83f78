"""The third law for every method: it equals a plain loop written from its paper, with either executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fedscale import FederatedStrategy, Partition
from lightning_fedscale.aggregators import centered_clipping, geometric_median, norm_clipped
from lightning_fedscale.attacks import attacked, sign_flip
from lightning_fedscale.compressors import adaptive, error_feedback, power_sgd, qsgd, random_k, sign, top_k
from lightning_fedscale.local_rules import Ditto, fed_dyn, fed_nova, fed_prox, scaffold
from lightning_fedscale.local_rules.schedules import post_local
from lightning_fedscale.privacy import AdaptiveClipping, dp_fed_avg
from lightning_fedscale.samplers import poisson, power_of_choice
from lightning_fedscale.server import fed_adam, fed_avgm
from lightning_fedscale.server.asynchrony import AsyncSimulation, FedBuff
from lightning_fedscale.utils import randomness
from tests.laws import by_paper, reference

ROUNDS = 5
executors = pytest.mark.parametrize("executor", ["sequential", "vectorized"])


def clients() -> Partition:
    """Seven, of 1, 2, 4, ... samples."""
    return reference.unequal_clients(127)


def world(epochs: int = 2) -> by_paper.World:
    return by_paper.World(reference.dataset(dtype=torch.float64), clients(), 4, epochs)


def trained(
    executor: str,
    momentum: float = 0.0,
    *,
    rounds: int = ROUNDS,
    save: Path | None = None,
    ckpt_path: Path | None = None,
    **strategy: Any,
) -> tuple[dict[str, Tensor], FederatedStrategy]:
    module = by_paper.Net(momentum=momentum)
    options = {"clients_per_round": 4, "local_epochs": 2, **strategy}
    every = options.pop("accumulate_grad_batches", 1)
    made = FederatedStrategy(partitioner=clients(), executor=executor, **options)  # type: ignore[arg-type]
    trainer = reference.quiet_trainer(max_epochs=rounds, strategy=made, accumulate_grad_batches=every)
    data = reference.loader(reference.dataset(dtype=torch.float64), by_paper.BATCH)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    if save is not None:
        trainer.save_checkpoint(save)
    assert made._federation is not None
    assert made._federation.fit.executor.kind == executor
    return module.state_dict(), made


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return reference.difference(left, right) < 1e-10


@executors
def test_layers_that_stay_with_the_clients(executor: str) -> None:
    expected, own = by_paper.fed_per(world(), ROUNDS, "head")
    got, strategy = trained(executor, personal=["head.*"])
    assert same(got, expected)
    assert strategy._federation is not None
    states = strategy._federation.fit.clients.store.states
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
    simulation = AsyncSimulation(0, 7, 3, 4, lambda client, version: seconds[client])
    rounds = [simulation.of_round(round) for round in range(ROUNDS)]
    assert any((buffered.versions < round).any() for round, buffered in enumerate(rounds))
    of_world = by_paper.World(reference.dataset(dtype=torch.float64), clients(), 3, 2)
    pairs = [(buffered.clients.tolist(), buffered.versions.tolist()) for buffered in rounds]
    assert same(got, by_paper.buffered(of_world, pairs, lambda late: float((1 + late) ** -0.5)))
    record = strategy.last_round
    assert record is not None
    assert record.simulated is not None
    assert record.simulated.total == rounds[-1].time
    assert record.staleness is not None
    assert record.staleness.tolist() == (ROUNDS - 1 - rounds[-1].versions).tolist()


@executors
def test_personal_models_of_ditto(executor: str) -> None:
    expected, own = by_paper.ditto(world(), ROUNDS, 0.5)
    got, strategy = trained(executor, personal=Ditto(0.5))
    assert same(got, expected)
    assert strategy._federation is not None
    states = strategy._federation.fit.clients.store.states
    assert sorted(states.clients("ditto")) == sorted(own)
    for client, values in own.items():
        flat = torch.cat([value.flatten() for value in values.values()])
        kept = states.get(client, "ditto")
        assert kept is not None
        assert float((kept - flat).abs().max()) < 1e-10


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
def test_scaffold_counts_optimizer_steps_not_batches(executor: str) -> None:
    got, _ = trained(executor, local_rule=scaffold(), aggregator="uniform", accumulate_grad_batches=3)
    assert same(got, by_paper.scaffold(world(), ROUNDS, "II", accumulate=3))


@executors
def test_the_server_of_fed_dyn_sees_what_was_sent_and_no_more(executor: str) -> None:
    got, strategy = trained(executor, local_rule=fed_dyn(0.1), aggregator="uniform", compressor=top_k(k=20))
    assert same(got, by_paper.fed_dyn(world(), ROUNDS, 0.1, lambda moved: by_paper.largest(moved, 20)))
    assert strategy.last_round is not None
    assert strategy.last_round.upload_bytes == 4 * 100  # 20 (32 bits + 8 of an index below 140)


@executors
def test_fed_dyn(executor: str) -> None:
    got, _ = trained(executor, local_rule=fed_dyn(0.1), aggregator="uniform")
    assert same(got, by_paper.fed_dyn(world(), ROUNDS, 0.1))


@executors
@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.5)])
def test_fed_nova(executor: str, momentum: float, mu: float) -> None:
    got, _ = trained(executor, momentum, local_rule=fed_nova(mu))
    assert same(got, by_paper.fed_nova(world(), ROUNDS, momentum, mu))


@executors
@pytest.mark.parametrize("iterations", [1, 3])
def test_centered_clipping(executor: str, iterations: int) -> None:
    got, strategy = trained(executor, aggregator=centered_clipping(0.05, iterations))
    assert same(got, by_paper.centered_clipping(world(), ROUNDS, 0.05, iterations))
    assert strategy._federation is not None
    assert float(strategy._federation.fit.server.states["aggregator"].norm()) > 0


@executors
def test_top_k_with_error_feedback(executor: str) -> None:
    got, strategy = trained(executor, compressor=error_feedback(top_k(k=14)))
    assert same(got, by_paper.top_k_with_feedback(world(), ROUNDS, 14))
    assert strategy.last_round is not None
    assert strategy.last_round.upload_bytes == 4 * 70  # 14 (32 bits + 8 of an index below 140)
    assert strategy.last_round.download_bytes == 4 * 140 * 8


@executors
def test_both_ways_compressed_the_clients_move_as_the_server_does(executor: str) -> None:
    got, strategy = trained(executor, compressor=qsgd(4), downlink_compressor=error_feedback(top_k(0.1)))
    record = strategy.last_round
    assert record is not None
    assert record.upload_bytes == 4 * -(-(32 + 140 * 4) // 8)
    assert record.download_bytes == 4 * 70
    # All clients start from what they have decoded: one round moved 14 elements of the global model, no more.
    again, _ = trained(executor, compressor=qsgd(4), downlink_compressor=error_feedback(top_k(0.1)))
    assert reference.difference(got, again) == 0.0
    before = by_paper.Net().state_dict()
    assert sum(int((got[name] != before[name]).sum()) for name in got) <= 14 * ROUNDS


COMBINED: dict[str, Callable[[], dict[str, Any]]] = {
    "everything": lambda: {
        "local_rule": fed_prox(0.1),
        "compressor": error_feedback(top_k(0.2)),
        "downlink_compressor": qsgd(16),
        "server_optimizer": fed_adam(0.05),
        "personal": ["head.bias"],
    },
    "scaffold": lambda: {"local_rule": scaffold(), "compressor": error_feedback(sign()), "aggregator": "uniform"},
    "scaffold by gradients": lambda: {"local_rule": scaffold("I"), "server_optimizer": "fed_exp"},
    "fed_dyn": lambda: {"local_rule": fed_dyn(0.1), "aggregator": "uniform", "compressor": power_sgd(2)},
    "fed_nova": lambda: {"local_rule": fed_nova(), "server_optimizer": fed_avgm(0.5), "compressor": random_k(0.5)},
    "ditto": lambda: {"personal": Ditto(0.5), "server_optimizer": "fed_avgm"},
    "async": lambda: {
        "mode": FedBuff(seconds=[3.0, 1.0, 2.5, 7.0, 1.5, 4.0, 2.0]),
        "compressor": adaptive(window=2),
        "clients_per_round": 3,
    },
    "private": lambda: {
        "privacy": dp_fed_avg(
            clip_norm=0.3, noise_multiplier=1.0, delta=1e-3, adaptive=AdaptiveClipping(count_noise=2.0)
        ),
        "sampler": "poisson",
        "local_rule": fed_prox(0.1),
    },
    "hostile": lambda: {"aggregator": attacked(geometric_median(), sign_flip(2.0), attackers=[1])},
    "centered": lambda: {
        "aggregator": centered_clipping(0.1, iterations=2),
        "local_rule": scaffold(),
        "server_optimizer": "fed_avgm",
    },
    "centered and hostile": lambda: {
        "aggregator": norm_clipped(0.5, attacked(centered_clipping(0.1), sign_flip(2.0), attackers=[1]))
    },
    "hardest first": lambda: {"sampler": power_of_choice(candidates=6), "server_optimizer": "fed_yogi"},
    "post-local": lambda: {"local_steps": post_local(3, 4), "local_epochs": None, "local_rule": fed_prox(0.1)},
}


@pytest.mark.parametrize("name", COMBINED)
def test_interruption_does_not_matter(name: str, tmp_path: Path) -> None:
    whole, _ = trained("sequential", **COMBINED[name]())
    first, _ = trained("sequential", rounds=2, save=tmp_path / "at.ckpt", **COMBINED[name]())
    assert reference.difference(first, whole) > 0
    resumed, _ = trained("sequential", ckpt_path=tmp_path / "at.ckpt", **COMBINED[name]())
    assert reference.difference(resumed, whole) == 0.0


@pytest.mark.parametrize("name", COMBINED)
def test_the_executor_does_not_matter(name: str) -> None:
    one, first = trained("sequential", **COMBINED[name]())
    other, second = trained("vectorized", **COMBINED[name]())
    assert reference.difference(one, other) < 1e-7
    assert first.last_round is not None
    assert second.last_round is not None
    assert first.last_round.upload_bytes == second.last_round.upload_bytes
    np.testing.assert_allclose(first.last_round.delta_norms, second.last_round.delta_norms, rtol=1e-6)


@executors
def test_private_rounds(executor: str) -> None:
    """Poisson samples (some of them empty), clipping that bites, noise, a fixed denominator."""
    private = dp_fed_avg(clip_norm=0.3, noise_multiplier=0.5, delta=1e-3)
    got, strategy = trained(executor, privacy=private, sampler="poisson", clients_per_round=2, seed=0)
    cohorts = [poisson(seed=0, round=round, num_clients=7, clients_per_round=2).tolist() for round in range(ROUNDS)]
    assert len({len(cohort) for cohort in cohorts}) > 1

    def noise(round: int, length: int) -> Tensor:
        draws = randomness.generator(0, randomness.PRIVACY, round).normal(0.0, 0.5 * 0.3, length)
        return torch.from_numpy(draws)

    expected = by_paper.dp_fed_avg(world(), cohorts, 0.3, expected=2 / 7 * 7, noise=noise)
    assert same(got, expected)
    record = strategy.last_round
    assert record is not None
    assert record.epsilon == pytest.approx(private.calibrated(2 / 7, 2).epsilon(ROUNDS, 2 / 7))
    assert record.metrics()["round/epsilon"] == record.epsilon


def test_a_budget_ends_training_before_it_is_exceeded(tmp_path: Path) -> None:
    ready = dp_fed_avg(clip_norm=0.3, noise_multiplier=1.0, delta=1e-3).calibrated(2 / 7, 2)
    budget = (ready.epsilon(3, 2 / 7) + ready.epsilon(4, 2 / 7)) / 2
    private = dp_fed_avg(clip_norm=0.3, noise_multiplier=1.0, delta=1e-3, max_epsilon=budget)
    options: dict[str, Any] = {"privacy": private, "sampler": "poisson", "clients_per_round": 2}
    _, strategy = trained("sequential", save=tmp_path / "spent.ckpt", **options)
    assert strategy.last_round is not None
    assert strategy.last_round.round == 2
    assert strategy.last_round.epsilon is not None
    assert strategy.last_round.epsilon <= budget
    with pytest.raises(ValueError, match=r"privacy: epsilon is .* after 3 round\(s\).* above max_epsilon"):
        trained("sequential", ckpt_path=tmp_path / "spent.ckpt", **options)


def test_a_clipped_update_is_no_longer_than_it_may_be_in_its_own_precision() -> None:
    norms: list[float] = []
    mean_of = FederatedStrategy(num_clients=4, privacy=dp_fed_avg(0.01, 0.0, delta=1e-3))
    trainer = reference.quiet_trainer(max_epochs=4, strategy=mean_of)
    seen = mean_of._options.aggregator

    def accumulate(total: Tensor, update: Any, weight: float, cohort: Any) -> Tensor:
        norms.append(float(update.delta[: cohort.trainable].norm()))
        return seen.accumulate(total, update, weight, cohort)

    mean_of._options = replace(mean_of._options, aggregator=seen._replace(accumulate=accumulate))
    trainer.fit(reference.make_module(), reference.loader(reference.dataset()))
    assert len(norms) == 16
    assert 0.0099 < min(norms) <= max(norms) <= 0.01


@pytest.mark.parametrize(
    "other", [{"local_rule": fed_dyn(0.1)}, {"local_rule": scaffold(), "compressor": error_feedback(sign())}, {}]
)
def test_another_rule_is_not_resumed_with(other: dict[str, Any], tmp_path: Path) -> None:
    trained("sequential", rounds=2, save=tmp_path / "at.ckpt", local_rule=scaffold())
    with pytest.raises(ValueError, match=r"(local_rule|compressor)=.* differs from .* in the checkpoint: resume with"):
        trained("sequential", ckpt_path=tmp_path / "at.ckpt", **other)


class _Inside(pl.Callback):
    """Saves while a client trains, or fails there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def on_client_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: Any) -> None:
        if trainer.global_step == 1:
            if self._path is None:
                raise LookupError("on purpose")
            trainer.save_checkpoint(self._path)


@executors
def test_what_stays_with_a_client_never_passes_for_the_global_model(executor: str, tmp_path: Path) -> None:
    def fit(callback: pl.Callback) -> by_paper.Net:
        module = by_paper.Net()
        made = FederatedStrategy(
            partitioner=clients(),
            clients_per_round=4,
            executor=executor,  # type: ignore[arg-type]
            personal=["head.*"],
        )
        trainer = reference.quiet_trainer(max_epochs=3, strategy=made, callbacks=[callback])
        try:
            trainer.fit(module, reference.loader(reference.dataset(dtype=torch.float64), by_paper.BATCH))
        except LookupError:
            assert callback._path is None  # type: ignore[attr-defined]
        return module

    start = by_paper.Net().state_dict()
    failed = fit(_Inside(None)).state_dict()
    fit(_Inside(tmp_path / "inside.ckpt"))
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    for state in (failed, saved):
        assert torch.equal(state["head.weight"], start["head.weight"])
        assert torch.equal(state["head.bias"], start["head.bias"])
        assert not torch.equal(state["body.weight"], start["body.weight"])


def test_privacy_refuses_what_it_cannot_account_for() -> None:
    private = dp_fed_avg(clip_norm=1.0, noise_multiplier=1.0, delta=1e-3)
    for arguments, message in (
        ({"clients_per_round": 1}, "privacy with sampler=uniform and clients_per_round=1: "),
        ({"clients_per_round": 2}, "privacy with sampler=uniform and clients_per_round=2: "),
        ({"local_rule": "scaffold"}, "privacy with local_rule='scaffold'"),
        ({"aggregator": "median"}, "aggregator='median' with privacy"),
        ({"mode": "async"}, "privacy with mode='async'"),
    ):
        with pytest.raises(ValueError, match=message):
            FederatedStrategy(num_clients=7, privacy=private, **arguments)
    module = reference.make_module(batch_norm=True)
    strategy = FederatedStrategy(num_clients=4, privacy=private)
    with pytest.raises(ValueError, match=r"running statistics of 'net.1' .*personal=\['net.1.\*'\]"):
        reference.quiet_trainer(max_epochs=1, strategy=strategy).fit(module, reference.loader(reference.dataset()))
