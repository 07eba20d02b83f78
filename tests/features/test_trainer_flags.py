"""Every flag of the Trainer means what it meant, with a round for a step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fedscale
from lightning_fedscale import FederatedStrategy
from tests.clock import Clock, Minutes
from tests.features import reference_loop
from tests.laws import reference
from tests.strategies import sequential


class Validated(reference.Classifier):
    """Also validates, tests and predicts, and counts the batches."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.evaluated = 0

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluated += 1
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])


def make() -> Validated:
    torch.manual_seed(0)
    return Validated()


def fit(
    module: pl.LightningModule | None = None,
    *,
    rounds_per_epoch: int = 1,
    validate: bool = False,
    shuffle: bool = True,
    **options: object,
) -> tuple[pl.Trainer, pl.LightningModule]:
    module = module or make()
    strategy = sequential(partitioner=reference_loop.partition(), rounds_per_epoch=rounds_per_epoch)
    trainer = reference.quiet_trainer(strategy=strategy, **options)
    loader = reference.loader(reference_loop.data(), shuffle=shuffle)
    trainer.fit(module, loader, validation_loader() if validate else None)
    return trainer, module


def validation_loader() -> DataLoader[list[Tensor]]:
    return reference.loader(TensorDataset(*reference.dataset(90)[45:]), shuffle=False)


# ---- how long


@pytest.mark.parametrize(("flag", "rounds"), [(True, 1), (3, 3)])
def test_fast_dev_run_runs_that_many_rounds_and_validation_batches(flag: bool | int, rounds: int) -> None:
    trainer, module = fit(rounds_per_epoch=5, validate=True, fast_dev_run=flag)
    assert trainer.global_step == rounds
    assert module.evaluated == rounds
    assert reference_loop.same(module.state_dict(), reference_loop.models(rounds)[-1])


def test_limit_train_batches_as_a_number_counts_rounds_of_an_epoch() -> None:
    trainer, module = fit(rounds_per_epoch=5, limit_train_batches=2, max_epochs=2)
    assert trainer.global_step == 4
    assert reference_loop.same(module.state_dict(), reference_loop.models(4)[-1])


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_limit_train_batches_as_a_share_takes_it_of_each_clients_batches(share: float) -> None:
    clients = reference_loop.partition()
    whole = reference_loop.passes(clients)

    def limited(client: int, number: int) -> list[list[int]]:
        batches = whole(client, number)
        return batches[: max(1, math.floor(share * len(batches)))]

    assert any(len(limited(client, 0)) < len(whole(client, 0)) for client in range(4))
    trainer, module = fit(limit_train_batches=share, max_epochs=3)
    assert trainer.global_step == 3
    assert reference_loop.same(module.state_dict(), reference_loop.models(3, batches=limited)[-1])


def test_limit_train_batches_zero_trains_nothing() -> None:
    trainer, module = fit(limit_train_batches=0, max_epochs=2)
    assert trainer.global_step == 0
    assert reference_loop.same(module.state_dict(), reference_loop.models(0)[0])


def test_max_steps_counts_rounds() -> None:
    trainer, module = fit(rounds_per_epoch=2, max_steps=3, max_epochs=-1)
    assert trainer.global_step == 3
    assert reference_loop.same(module.state_dict(), reference_loop.models(3)[-1])


@pytest.mark.parametrize(("options", "rounds"), [({}, 3), ({"min_epochs": 5}, 5), ({"min_steps": 4}, 4)])
def test_max_time_stops_between_rounds_but_not_before_the_minimum(
    clock: Clock, options: dict[str, Any], rounds: int
) -> None:
    trainer, module = fit(max_time=timedelta(minutes=2.5), max_epochs=10, callbacks=[Minutes(clock)], **options)
    assert trainer.global_step == rounds
    assert reference_loop.same(module.state_dict(), reference_loop.models(rounds)[-1])


def test_min_epochs_holds_against_early_stopping() -> None:
    stop = EarlyStopping("round/loss", mode="max", patience=1, check_on_train_epoch_end=True, min_delta=1e9)
    trainer, _ = fit(min_epochs=4, max_epochs=9, callbacks=[stop])
    assert trainer.global_step == 4


# ---- validation


@pytest.mark.parametrize(
    ("rounds_per_epoch", "options", "when"),
    [
        (1, {"max_epochs": 6}, [1, 2, 3, 4, 5, 6]),
        (1, {"max_epochs": 7, "check_val_every_n_epoch": 3}, [3, 6]),
        (1, {"max_epochs": 7, "check_val_every_n_epoch": None, "val_check_interval": 2}, [2, 4, 6]),
        (4, {"max_epochs": 2, "val_check_interval": 0.5}, [2, 4, 6, 8]),
        (4, {"max_epochs": 2, "val_check_interval": 3}, [3, 7]),
        (4, {"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 3}, [3, 6]),
    ],
)
def test_validation_after_these_rounds_sees_the_global_model(
    rounds_per_epoch: int, options: dict[str, Any], when: list[int]
) -> None:
    snapshots = reference_loop.Snapshots()
    fit(rounds_per_epoch=rounds_per_epoch, validate=True, callbacks=[snapshots], **options)
    expected = reference_loop.models(8)
    assert [round for round, _ in snapshots.validated] == when
    assert all(reference_loop.same(state, expected[round]) for round, state in snapshots.validated)


def test_sanity_check_runs_before_the_first_round_on_the_initial_model() -> None:
    snapshots = reference_loop.Snapshots()
    _, module = fit(validate=True, callbacks=[snapshots], num_sanity_val_steps=2, max_epochs=2, limit_val_batches=3)
    expected = reference_loop.models(2)
    assert len(snapshots.sane) == 1
    assert reference_loop.same(snapshots.sane[0], expected[0])
    assert module.evaluated == 2 + 2 * 3
    assert reference_loop.same(module.state_dict(), expected[2])


# ---- data


@pytest.mark.parametrize(("overfit", "share"), [(2, 2.0), (0.5, 0.5), (0.1, 0.0)])
def test_overfit_batches_keeps_each_clients_first_batches_unshuffled(overfit: float | int, share: float) -> None:
    clients = reference_loop.partition()
    whole = reference_loop.passes(clients, shuffle=False)

    def first(client: int, number: int) -> list[list[int]]:
        batches = whole(client, number)
        return batches[: int(share) if share >= 1 else max(1, math.floor(share * len(batches)))]

    trainer, module = fit(overfit_batches=overfit, max_epochs=3)
    assert trainer.global_step == 3
    assert reference_loop.same(module.state_dict(), reference_loop.models(3, batches=first)[-1])


def test_reload_dataloaders_brings_new_loaders_between_epochs() -> None:
    class Growing(pl.LightningDataModule):
        """Doubles its batch size whenever it is asked."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes = [2, 4, 8]

        def train_dataloader(self) -> DataLoader[list[Tensor]]:
            return reference.loader(reference_loop.data(), batch_size=self.sizes.pop(0))

    clients = reference_loop.partition()
    module = reference.make_module()
    trainer = reference.quiet_trainer(
        strategy=sequential(partitioner=clients), max_epochs=6, reload_dataloaders_every_n_epochs=2
    )
    datamodule = Growing()
    trainer.fit(module, datamodule=datamodule)

    def growing(client: int, number: int) -> list[list[int]]:
        return reference_loop.passes(clients, batch_size=2 ** (1 + number // 2))(client, number)

    assert datamodule.sizes == []
    assert reference_loop.same(module.state_dict(), reference_loop.models(6, batches=growing)[-1])


# ---- evaluation without and around fit


def test_validate_test_and_predict_before_and_after_fit() -> None:
    module, loader = make(), validation_loader()
    trainer = reference.quiet_trainer(strategy=sequential(partitioner=reference_loop.partition()), max_epochs=2)
    plain = reference.quiet_trainer()
    inputs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    for when in ("before", "after"):
        if when == "after":
            trainer.fit(module, reference.loader(reference_loop.data()))
        module.eval()
        with torch.no_grad():
            logits = module.net(inputs)
        module.train()
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        assert trainer.validate(module, loader, verbose=False)[0]["val_loss"] == pytest.approx(expected, rel=1e-5)
        assert trainer.test(module, loader, verbose=False)[0]["test_loss"] == pytest.approx(expected, rel=1e-5)
        predicted, by_plain = (torch.cat(cast(list[Tensor], each.predict(module, loader))) for each in (trainer, plain))
        assert torch.equal(predicted, by_plain)
        assert torch.allclose(predicted, logits, atol=1e-6)
    assert reference_loop.same(module.state_dict(), reference_loop.models(2)[-1])


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode_is_the_users_choice(inference: bool) -> None:
    modes = []

    class Spy(Validated):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            modes.append(torch.is_inference_mode_enabled())

    torch.manual_seed(0)
    # While fitting Lightning itself never validates in inference mode.
    trainer, module = fit(Spy(), validate=True, inference_mode=inference, max_epochs=2, limit_val_batches=1)
    trainer.validate(module, validation_loader(), verbose=False)
    assert modes == [False, False, inference]
    assert reference_loop.same(module.state_dict(), reference_loop.models(2)[-1])


# ---- fit again


def test_a_second_fit_with_more_epochs_goes_on() -> None:
    module, loader = make(), reference.loader(reference_loop.data())
    trainer = reference.quiet_trainer(strategy=sequential(partitioner=reference_loop.partition()), max_epochs=2)
    trainer.fit(module, loader)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, loader)
    assert trainer.global_step == 5
    assert reference_loop.same(module.state_dict(), reference_loop.models(5)[-1])


def test_a_second_fit_with_another_dataset_divides_that_one() -> None:
    module = make()
    trainer = reference.quiet_trainer(strategy=sequential(num_clients=3), max_epochs=2)
    first, second = reference_loop.data(), reference.dataset(70)
    trainer.fit(module, reference.loader(first))
    held = trainer.strategy.partition  # type: ignore[attr-defined]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, reference.loader(second))
    others = trainer.strategy.partition  # type: ignore[attr-defined]
    assert sum(held.sizes) == 45
    assert sum(others.sizes) == 70

    expected = reference.make_module()
    run = reference_loop.fed_avg(expected, first, held, reference_loop.passes(held))
    next(run)
    expected.load_state_dict(next(run))
    run = reference_loop.fed_avg(expected, second, others, reference_loop.passes(others), first=2)
    next(run)
    assert reference_loop.same(module.state_dict(), next(run))


def test_a_fresh_trainer_goes_on_from_the_module_with_round_zero_again() -> None:
    module = make()
    for _ in range(2):
        fit(module, max_epochs=2)
    expected = reference.make_module()
    for _ in range(2):
        run = reference_loop.fed_avg(
            expected,
            reference_loop.data(),
            reference_loop.partition(),
            reference_loop.passes(reference_loop.partition()),
        )
        next(run)
        expected.load_state_dict(next(run))
    assert reference_loop.same(module.state_dict(), reference_loop.state_of(expected))


@pytest.mark.parametrize("fails", [False, True])
def test_trainer_and_module_are_left_as_a_plain_fit_leaves_them(fails: bool) -> None:
    class Hooked(Validated):
        calls = 0

        def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
            Hooked.calls += 1
            if fails and Hooked.calls == 4:
                raise RuntimeError("on purpose")

    flags = {"max_epochs": 2, "accumulate_grad_batches": 3, "limit_train_batches": 0.75, "log_every_n_steps": 7}
    left = []
    for strategy in ("auto", sequential(partitioner=reference_loop.partition())):
        Hooked.calls = 0
        torch.manual_seed(0)
        module = Hooked()
        trainer = reference.quiet_trainer(strategy=strategy, **flags)
        loop = trainer.fit_loop.epoch_loop
        loops = loop.automatic_optimization, loop.manual_optimization
        with pytest.raises(RuntimeError, match="on purpose") if fails else nullcontext():
            trainer.fit(module, reference.loader(reference_loop.data()))
        assert (loop.automatic_optimization, loop.manual_optimization) == loops
        assert {name: getattr(trainer, name) for name in flags if name != "max_epochs"} == {
            name: value for name, value in flags.items() if name != "max_epochs"
        }
        left.append((set(vars(module)), set(vars(trainer)), set(vars(trainer._data_connector))))
    plain, federated = left
    assert federated == plain
    if fails:
        assert reference_loop.same(module.state_dict(), reference_loop.models(0)[0])


@pytest.mark.parametrize("automatic", [True, False])
def test_a_checkpoints_counters_are_those_of_a_plain_run_of_as_many_steps(automatic: bool, tmp_path: Path) -> None:
    class Module(Validated):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if not automatic:
                optimizer = cast(LightningOptimizer, self.optimizers())
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    counters = []
    for strategy in ("auto", sequential(partitioner=reference_loop.partition(), rounds_per_epoch=3)):
        trainer = reference.quiet_trainer(strategy=strategy, max_epochs=2, limit_train_batches=3)
        trainer.fit(Module(), reference.loader(reference_loop.data()))
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        counters.append(torch.load(tmp_path / "saved.ckpt", weights_only=True)["loops"]["fit_loop"])
    assert counters[0] == counters[1]


def test_a_module_that_was_federated_trains_plainly_as_ever() -> None:
    module, loader = make(), reference.loader(reference_loop.data(), shuffle=False)
    fit(module, max_epochs=1)
    twin = make()
    twin.load_state_dict(module.state_dict())
    for one in (module, twin):
        torch.manual_seed(1)
        reference.quiet_trainer(max_epochs=1).fit(one, loader)
    assert reference_loop.same(module.state_dict(), twin.state_dict())
    assert not reference_loop.same(module.state_dict(), reference_loop.models(1)[-1])


# ---- the rest


def test_strategy_by_name() -> None:
    trainer = reference.quiet_trainer(strategy="federated", max_epochs=2)
    module = make()
    trainer.fit(module, reference.loader(reference_loop.data()))
    assert isinstance(trainer.strategy, FederatedStrategy)
    iid = lightning_fedscale.partitioners.IidPartitioner(10)
    iid.dataset = reference_loop.data()
    run = reference_loop.fed_avg(
        reference.make_module(), reference_loop.data(), iid.partition, reference_loop.passes(iid.partition)
    )
    next(run)
    # From the second round on clients may be vectorized, which rounds differently.
    assert reference.difference(module.state_dict(), next(run)) < 1e-6


@pytest.mark.parametrize(
    "job", [{}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}]
)
def test_a_single_process_is_rank_0_of_1_whatever_the_job_says(
    job: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", **job}.items():
        monkeypatch.setenv(name, value)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            seen.append((trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size))

    _, module = fit(max_epochs=2, plugins=[SLURMEnvironment(auto_requeue=False)], callbacks=[Watch()])
    assert seen == [(0, 0, 0, 1)] * 2
    assert reference_loop.same(module.state_dict(), reference_loop.models(2)[-1])


def test_deterministic_detect_anomaly_and_profiler_change_no_number() -> None:
    profiler = SimpleProfiler()
    try:
        _, module = fit(deterministic=True, detect_anomaly=True, profiler=profiler, max_epochs=2)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
    assert reference_loop.same(module.state_dict(), reference_loop.models(2)[-1])
    batches = sum(len(reference_loop.passes(reference_loop.partition())(client, 0)) for client in range(4))
    assert len(profiler.recorded_durations["[Strategy]FederatedStrategy.training_step"]) == 2 * batches
    assert len(profiler.recorded_durations["run_training_batch"]) == 2


def test_profiler_by_name() -> None:
    trainer, _ = fit(profiler="simple", max_epochs=1)
    profiler = trainer.profiler  # type: ignore[attr-defined]
    assert isinstance(profiler, SimpleProfiler)
    assert len(profiler.recorded_durations["run_training_batch"]) == 1


def test_detect_anomaly_reaches_the_client() -> None:
    class Rotten(reference.Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            # The gradient of a root at zero is infinite, and times zero it is NaN.
            return (self.net(batch[0]) * 0).sum().sqrt() * 0

    with pytest.raises(RuntimeError, match="returned nan values"):
        fit(Rotten(), detect_anomaly=True, max_epochs=1)


def test_barebones_gives_the_same_model() -> None:
    module = make()
    trainer = pl.Trainer(
        barebones=True,
        accelerator="cpu",
        devices=1,
        strategy=sequential(partitioner=reference_loop.partition()),
        max_epochs=2,
    )
    trainer.fit(module, reference.loader(reference_loop.data()))
    assert reference_loop.same(module.state_dict(), reference_loop.models(2)[-1])


# ---- validation by time


class Validations(Minutes):
    """After which rounds there were some."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.after: list[int] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after.append(trainer.global_step)


@pytest.mark.parametrize("every", ["00:00:03:00", timedelta(minutes=3), {"minutes": 3}])
@pytest.mark.parametrize(
    ("rounds_per_epoch", "options"), [(1, {}), (4, {}), (4, {"check_val_every_n_epoch": None}), (3, {"max_steps": 7})]
)
def test_validation_by_time_is_after_the_rounds_in_which_it_is_time(
    every: object, rounds_per_epoch: int, options: dict[str, Any], clock: Clock
) -> None:
    """After those steps after which a plain Trainer has it, with as many batches in an epoch."""
    options = {"max_epochs": 8 // rounds_per_epoch, "val_check_interval": every, **options}
    plain, federated = Validations(clock), Validations(clock)
    trainer = reference.quiet_trainer(limit_train_batches=rounds_per_epoch, callbacks=[plain], **options)
    trainer.fit(make(), reference.loader(reference_loop.data()), validation_loader())
    assert plain.after[:2] == [3, 6]
    fit(rounds_per_epoch=rounds_per_epoch, validate=True, callbacks=[federated], **options)
    assert federated.after == plain.after
