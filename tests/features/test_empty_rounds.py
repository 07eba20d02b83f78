"""Rounds of nobody, and clients that have nothing to train on: legal everywhere, and nothing of them stays behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_fedscale import RoundRecord, aggregators, callbacks, local_rules, privacy, server
from lightning_fedscale.devices import DeviceClass, Population
from lightning_fedscale.local_rules import Ditto
from lightning_fedscale.samplers import reads_losses
from lightning_fedscale.types import IntArray
from tests.laws import reference
from tests.strategies import sequential
from tests.unit.test_contracts import METHODS, example

CLIENTS, SAMPLES = 8, 8
EMPTY = 1  # the round of nobody


class EmptyAt:
    """A sampler that finds nobody in some rounds, and whom another one finds in all others."""

    def __init__(self, *rounds: int, inner: Any = None) -> None:
        self._rounds, self._inner = rounds, inner
        self.reads_losses = inner is not None and reads_losses(inner)

    def __call__(self, *, round: int, num_clients: int, **others: Any) -> IntArray:
        if round in self._rounds:
            return np.zeros(0, dtype=np.int64)
        if self._inner is None:
            return np.arange(num_clients)
        drawn: IntArray = self._inner(round=round, num_clients=num_clients, **others)
        return drawn


class Course(pl.Callback):
    """Notes the global model and the record of every round, and saves a checkpoint of it if it has a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.weights: list[dict[str, Tensor]] = []
        self.records: list[RoundRecord] = []
        self.states: list[dict[str, Any]] = []
        self.trainable: list[list[bool]] = []

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        self.records.append(record)
        self.trainable.append([parameter.requires_grad for parameter in pl_module.parameters()])
        strategy: Any = trainer.strategy
        self.states.append(dict(strategy._federation.fit.server.states))
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{record.round}.ckpt")


class Module(reference.Classifier):
    """With a mask of minus infinity, which buffers may hold, and a frozen layer."""

    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__(dropout=0.1, batch_norm=True)
        self.momentum = momentum
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.net[0].bias.requires_grad_(False)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=self.momentum)


def run(
    *extra: pl.Callback, rounds: int = 3, momentum: float = 0.0, folder: Path | None = None, ckpt: Any = None,
    loader: Any = None, val: Any = None, options: dict[str, Any] | None = None, **strategy: Any,
) -> Course:  # fmt: skip
    torch.manual_seed(0)
    course, module = Course(folder), Module(momentum)
    given = {"partitioner": reference.equal_clients(CLIENTS, SAMPLES), "sampler": EmptyAt(EMPTY), **strategy}
    trainer = reference.quiet_trainer(
        strategy=sequential(**given), max_steps=rounds, callbacks=[course, *extra], **(options or {})
    )
    loader = reference.loader(reference.dataset(CLIENTS * SAMPLES), 4) if loader is None else loader
    trainer.fit(module, loader, None if val is None else reference.loader(val, 8, shuffle=False), ckpt_path=ckpt)
    assert trainer.global_step == rounds
    return course


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def strategy_with(room: str, name: str) -> dict[str, Any]:
    made = example(room, name)
    if room == "samplers":
        return {"sampler": EmptyAt(EMPTY, inner=made), "partitioner": reference.equal_clients(4, 2 * SAMPLES)}
    argument = {"server": "server_optimizer", "local_rules": "local_rule", "aggregators": "aggregator"}
    return {argument.get(room, "compressor"): made}


# ---- every method of every room


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_each_method_bears_a_round_of_nobody(room: str, name: str) -> None:
    strategy = strategy_with(room, name)
    course = run(**strategy)
    before, empty, after = course.records
    assert before.round == 0
    assert (len(empty.clients), empty.empty, after.empty) == (0, True, False)
    assert course.trainable[0] == course.trainable[1] == course.trainable[2]
    assert not same(course.weights[1], course.weights[2])
    expected = course.weights[0]
    if room == "server":  # the optimizer's own step for a delta of zero
        rule = strategy["server_optimizer"]
        params = {name: expected[name].double() for name, p in Module().named_parameters() if p.requires_grad}
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        step, _ = rule.update(zeros, course.states[0]["optimizer"], params, *([0.0] if rule.reads_norms else []))
        expected = {**expected, **{name: (params[name] - step[name]).float() for name in params}}
    assert same(course.weights[1], expected)
    values = empty.metrics()
    assert np.isfinite(list(values.values())).all()
    assert "round/loss" not in values
    assert values["round/clients"] == values["round/samples"] == values["round/upload_bytes"] == 0.0


@pytest.mark.parametrize("adaptive", [None, privacy.AdaptiveClipping(count_noise=1.0)])
@pytest.mark.parametrize("noise", ["server", "client"])
def test_privacy_adds_its_noise_and_counts_the_round(noise: Any, adaptive: Any) -> None:
    rule = privacy.dp_fed_avg(0.5, 1.0, delta=1e-3, noise=noise, adaptive=adaptive)
    course = run(privacy=rule, personal=["net.1.*"])
    before, empty, _ = course.weights
    for name, parameter in Module().named_parameters():
        noisy = parameter.requires_grad and not name.startswith("net.1.")
        assert torch.equal(before[name], empty[name]) != noisy, name
    assert torch.equal(empty["mask"], torch.tensor([0.0, float("-inf")]))
    assert course.states[1]["privacy"]["rounds"] == 2
    spent = [record.epsilon for record in course.records]
    assert spent == sorted(spent)  # type: ignore[type-var]
    assert spent[0] < spent[1] < spent[2]  # type: ignore[operator]
    assert course.records[1].delta_norm > 0


# ---- everything else that a round may meet

WITH: dict[str, dict[str, Any]] = {
    "vectorized": {"executor": "vectorized"},
    "auto": {"executor": "auto", "sampler": EmptyAt(0)},
    "kept optimizers": {"client_optimizer": "keep", "local_steps": 2, "momentum": 0.9},
    "personal layers": {"personal": ["net.4.*"]},
    "a model of each client's own": {"personal": Ditto(0.5)},
    "a compressed downlink": {"downlink_compressor": "sign"},
    "secure aggregation": {"aggregator": privacy.secure_mean(clip=1.0)},
    "robust rules in each other": {"aggregator": aggregators.norm_clipped(1.0, aggregators.krum(1))},
    "all of it": {
        "local_rule": local_rules.scaffold(), "compressor": "sign", "server_optimizer": server.fed_adam(0.1),
        "personal": ["net.4.*"], "sampler": EmptyAt(0, 2),
    },
    "simulated hardware": {"population": Population({DeviceClass("phone", 2 * 10**9, 1e9, 1e9, 1e6, 1e6): 1.0})},
    "rounds in an epoch": {"rounds_per_epoch": 3, "options": {"log_every_n_steps": 1}},
    "accumulated gradients": {"options": {"accumulate_grad_batches": 2}},
    "mixed precision": {"options": {"precision": "bf16-mixed"}},
}  # fmt: skip


@pytest.mark.parametrize("name", WITH)
def test_a_run_with_a_round_of_nobody_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Both from before the empty round and from after it."""
    whole = run(rounds=4, folder=tmp_path, **WITH[name])
    empty = [record.round for record in whole.records if record.empty]
    assert empty in ([EMPTY], [0], [0, 2])
    assert all(flags == whole.trainable[0] for flags in whole.trainable)
    assert not same(whole.weights[2], whole.weights[3])
    if whole.records[0].simulated is not None:
        assert whole.records[EMPTY].metrics()["round/simulated_seconds"] == 0.0
    for number in (0, 1):
        rest = run(rounds=4, ckpt=tmp_path / f"{number}.ckpt", **WITH[name])
        assert [record.round for record in rest.records] == list(range(number + 1, 4))
        assert same(rest.weights[-1], whole.weights[-1])


def test_an_empty_round_is_one_for_schedules_and_loggers() -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.net[4].parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    trainer = reference.quiet_trainer(strategy=sequential(num_clients=4, sampler=EmptyAt(1, 2)), max_epochs=4)
    trainer.fit(Scheduled(), reference.loader(reference.dataset(40)))
    assert trainer.global_step == 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 16)


def test_watchers_of_a_loss_keep_the_last_one_that_is_known(tmp_path: Path) -> None:
    class Noted(EarlyStopping):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append([float(trainer.callback_metrics[name]) for name in ("round/loss", "train_loss")])
            super().on_train_epoch_end(trainer, pl_module)

    seen: list[list[float]] = []
    watchers = [
        Noted("round/loss", check_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path, monitor="train_loss", save_on_train_epoch_end=True),
    ]
    run(*watchers, options={"enable_checkpointing": True})
    assert seen[0] == seen[EMPTY] != seen[2]


@pytest.mark.parametrize("empty", [(0,), (0, 1), (2,)], ids=str)
def test_who_watches_a_loss_waits_for_the_first_one_and_resumes_with_the_last(
    empty: tuple[int, ...], tmp_path: Path
) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.net[4].parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}

    def fit(monitor: str = "train_loss", ckpt: Path | None = None) -> tuple[pl.Trainer, EarlyStopping]:
        stopping = EarlyStopping(monitor, patience=10, min_delta=10.0, check_on_train_epoch_end=True)
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = reference.quiet_trainer(
            strategy=sequential(num_clients=4, sampler=EmptyAt(*empty)), max_epochs=4,
            callbacks=[stopping, keep], enable_checkpointing=True,
        )  # fmt: skip
        trainer.fit(Scheduled(), reference.loader(reference.dataset(40)), ckpt_path=ckpt)
        return trainer, stopping

    whole, stopping = fit()
    waited = 0 if empty == (2,) else len(empty)
    assert stopping.strict
    assert stopping.wait_count == 3 - waited
    # By a threshold of 10 no loss is ever better.
    assert whole.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5 ** (4 - waited)
    for number in range(3):
        _, again = fit(ckpt=tmp_path / f"epoch={number}.ckpt")
        assert again.wait_count == stopping.wait_count
    with pytest.raises(RuntimeError, match="train_lost"):
        fit("train_lost")


# ---- callbacks

CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "ClientMetrics": callbacks.ClientMetrics,
    "ComputeAccounting": callbacks.ComputeAccounting,
    "CriticalPhase": lambda: callbacks.CriticalPhase(noise_every=1, every_n_steps=1),
    "MaxBatchProbe": lambda: callbacks.MaxBatchProbe(budget="1GiB", verify=False),
    "RoundEvents": callbacks.RoundEvents,
    "ServerEMA": lambda: callbacks.ServerEMA(0.5, reference_clients=4),
    "CriticalPhase of local steps": lambda: callbacks.CriticalPhase(level="step", noise_every=None, every_n_steps=1),
    "CriticalPhase with noise": lambda: callbacks.CriticalPhase(
        action="noise", target_batch=12, noise_every=None, every_n_steps=1
    ),
}


def test_every_callback_is_tried() -> None:
    assert set(callbacks.__all__) <= set(CALLBACKS)


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("empty", [(1,), (0, 2)], ids=str)
def test_callbacks_bear_a_round_of_nobody(name: str, empty: tuple[int, ...]) -> None:
    data = reference.dataset(CLIENTS * SAMPLES)
    course = run(
        CALLBACKS[name](), rounds=4, sampler=EmptyAt(*empty), loader=reference.loader(data, 4), val=data,
        options={"limit_val_batches": 2, "check_val_every_n_epoch": 2},
    )  # fmt: skip
    assert [record.round for record in course.records if record.empty] == list(empty)
    for round in set(range(1, 4)) - set(empty):
        assert not same(course.weights[round], course.weights[round - 1])
    for round in set(empty) - {0}:
        assert same(course.weights[round], course.weights[round - 1])


# ---- clients that have nothing to train on


def spoilt(*clients: int) -> DataLoader[Any]:
    """A loader whose batches are None as far as they are these clients'."""

    def collate(samples: list[Any]) -> Any:
        owner = int(samples[0][2]) // SAMPLES
        return None if owner in clients else default_collate([sample[:2] for sample in samples])

    data = reference.dataset(CLIENTS * SAMPLES)
    return DataLoader([(*data[i], i) for i in range(len(data))], 4, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]


class Others:
    """Everybody but one client."""

    def __init__(self, *left_out: int) -> None:
        self.left_out = left_out

    def __call__(self, *, num_clients: int, **_: Any) -> IntArray:
        return np.delete(np.arange(num_clients), list(self.left_out))


NOTHING_TO_TRAIN: dict[str, dict[str, Any]] = {
    "sequential": {},
    "vectorized": {"executor": "vectorized"},
    "auto": {"executor": "auto"},
    "workers": {},
    "kept": {"client_optimizer": "keep", "momentum": 0.9, "local_steps": 3},
    "rules": {"local_rule": local_rules.scaffold("I"), "compressor": "sign"},
    "ditto": {"personal": Ditto(0.5)},
    "krum": {"aggregator": aggregators.krum(1)},
}


@pytest.mark.parametrize("name", NOTHING_TO_TRAIN)
@pytest.mark.parametrize("absent", [(0,), (3, 7)], ids=str)
def test_clients_without_a_batch_are_left_out_and_named(absent: tuple[int, ...], name: str) -> None:
    """The others train as if these had not been asked."""
    options, loader = dict(NOTHING_TO_TRAIN[name]), spoilt(*absent)
    if name == "workers":
        loader = DataLoader(loader.dataset, 4, shuffle=True, collate_fn=loader.collate_fn, num_workers=1)
    with pytest.warns(UserWarning, match=rf"round 1: left out {len(absent)} client.* None .*: {absent[0]}"):
        course = run(sampler=Others(), loader=loader, rounds=2, **options)
    expected = run(sampler=Others(*absent), loader=spoilt(), rounds=2, **options)
    for found, wanted in zip(course.records, expected.records, strict=True):
        assert found.rejected == absent
        gone = np.isin(found.clients, absent)
        assert found.weights[~gone].tolist() == wanted.weights.tolist()
        assert found.local_steps[gone].tolist() == found.samples[gone].tolist() == [0] * len(absent)
        assert found.upload_bytes == wanted.upload_bytes
        assert found.loss == pytest.approx(wanted.loss)
    if name != "auto":
        assert same(course.weights[-1], expected.weights[-1])


def test_a_round_of_such_clients_is_an_empty_one() -> None:
    with pytest.warns(UserWarning, match=rf"round 1: left out {CLIENTS} client.* None .*: 0, 1, 2"):
        course = run(loader=spoilt(*range(CLIENTS)), sampler=Others(), server_optimizer=server.fed_avgm())
    assert [len(record.rejected) for record in course.records] == [CLIENTS] * 3
    assert all(record.empty for record in course.records)
    assert same(course.weights[0], course.weights[2])
    assert all(all(flags) == all(course.trainable[0]) for flags in course.trainable)


def test_nan_is_still_the_end_where_nobody_else_is_left() -> None:
    class Diverged(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    trainer = reference.quiet_trainer(
        strategy=sequential(partitioner=reference.equal_clients(CLIENTS, SAMPLES)), max_epochs=1
    )
    with pytest.raises(RuntimeError, match=f"round 0: the updates of all {CLIENTS - 1} clients have NaN"):
        trainer.fit(Diverged(), spoilt(2))


# ---- cohorts that are too small for a rule


class Sizes:
    """Cohorts of these sizes, round after round."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def __call__(self, *, round: int, **_: Any) -> IntArray:
        return np.arange(self.sizes[round % len(self.sizes)])


NEEDY = [(room, name) for room, name in METHODS if room == "aggregators" and example(room, name).needs > 1]


@pytest.mark.parametrize("name", [name for _, name in NEEDY])
def test_where_fewer_are_sampled_than_a_rule_needs_nobody_trains(name: str) -> None:
    rule = example("aggregators", name)
    needs = rule.needs
    with pytest.warns(
        UserWarning, match=rf"round 1: aggregator={name}.*needs at least {needs} .* {needs - 1} can take"
    ):
        course = run(aggregator=rule, sampler=Sizes(needs, needs - 1, needs))
    assert [len(record.clients) for record in course.records] == [needs, 0, needs]
    assert same(course.weights[0], course.weights[1])
    assert not same(course.weights[1], course.weights[2])


def test_some_rules_need_a_number_of_clients() -> None:
    assert {"krum", "multi_krum"} <= {name for _, name in NEEDY}
    assert privacy.secure_mean(clip=1.0).needs == 2


def test_a_rule_that_never_gets_enough_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"krum\(attackers=1\): .*at least 5 clients in a round, .* round 2 has 4"):
        run(aggregator=aggregators.krum(1), sampler=Sizes(2, 3, 4))
