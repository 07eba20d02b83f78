"""One strategy, several Trainers: by a registered name, or the same object for one after the other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning as twin_pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from pytorch_lightning.demos.boring_classes import BoringModel as TwinBoringModel
from pytorch_lightning.strategies import StrategyRegistry as TwinRegistry
from torch import Tensor, nn

from lightning_fedscale import FedBuff, FederatedStrategy, Partition, local_rules, partitioners
from lightning_fedscale import pytorch_lightning as twin
from lightning_fedscale.core.lightning.checkpoint import AtomicCheckpointIO
from lightning_fedscale.devices import Population
from tests.laws import reference
from tests.strategies import sequential
from tests.unit.test_contracts import METHODS, example

State = dict[str, Tensor]


class Evaluated(reference.Classifier):
    """Has all steps, and another width if wanted."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 4))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])


def make(width: int = 16) -> Evaluated:
    torch.manual_seed(width)
    return Evaluated(width)


def loader(samples: int = 40, dtype: torch.dtype = torch.float32) -> Any:
    return reference.loader(reference.dataset(samples, dtype), batch_size=4, shuffle=False)


def fit(strategy: Any, *, width: int = 16, samples: int = 40, **options: Any) -> State:
    """Two rounds of a new module in a new Trainer."""
    module = make(width)
    reference.quiet_trainer(**{"strategy": strategy, "max_epochs": 2, **options}).fit(module, loader(samples))
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- by name


@pytest.fixture
def unregistered() -> Iterator[None]:
    before = dict(StrategyRegistry), dict(TwinRegistry)
    yield
    for registry, was in zip((StrategyRegistry, TwinRegistry), before, strict=True):
        registry.clear()
        registry.update(was)


SIDES: dict[str, tuple[Any, Any, Any]] = {
    "lightning": (pl, FederatedStrategy, BoringModel),
    "pytorch_lightning": (twin_pl, twin.FederatedStrategy, TwinBoringModel),
}


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("side", SIDES)
def test_a_registered_name_builds_a_new_strategy_for_each_trainer(side: str) -> None:
    package, strategy, module = SIDES[side]
    other = next(registry for name, registry in registries().items() if name != side)
    strategy.register("Six", num_clients=6, clients_per_round=2, executor="sequential")
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainers = [package.Trainer(strategy=name, max_epochs=1, **settings) for name in ("six", "Six")]
    for trainer in trainers:
        trainer.fit(module())
        assert type(trainer.strategy) is strategy
        assert trainer.strategy.num_clients == 6
        assert len(trainer.strategy.last_round.clients) == 2
    assert trainers[0].strategy is not trainers[1].strategy
    assert "six" in registries()[side]
    assert "six" not in other


def registries() -> dict[str, Any]:
    return {"lightning": StrategyRegistry, "pytorch_lightning": TwinRegistry}


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"clients_per_rond": 3},
            TypeError,
            r"register\('five'\): .* 'clients_per_rond'. Did you mean 'clients_per_round'",
        ),
        ({"wings": 2}, TypeError, r"no argument 'wings'\. It has num_clients, "),
        ({"num_clients": 5, "clients_per_round": 7}, ValueError, "clients_per_round=7 is more than num_clients=5"),
        ({"num_clients": "five"}, TypeError, "num_clients='five'"),
        ({"start_method": "telepathy"}, ValueError, "start_method='telepathy'"),
    ],
)
def test_wrong_arguments_are_refused_when_the_name_is_given(
    side: str, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        SIDES[side][1].register("five", **arguments)
    assert "five" not in registries()[side]


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("name", ["auto", "ddp", "Federated"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"name={name.lower()!r} "):
        FederatedStrategy.register(name, num_clients=5)


@pytest.mark.usefixtures("unregistered")
def test_a_name_can_be_given_anew_if_that_is_meant() -> None:
    for _ in range(2):  # as a notebook's cell does
        FederatedStrategy.register("mine", num_clients=5)
    with pytest.raises(ValueError, match="pass override=True"):
        FederatedStrategy.register("mine", num_clients=6)
    FederatedStrategy.register("mine", override=True, num_clients=6)
    assert pl.Trainer(strategy="mine", accelerator="cpu", logger=False).strategy.num_clients == 6  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="name='auto'"):
        FederatedStrategy.register("auto", override=True)
    for name in ("", "  ", 3, None):
        with pytest.raises(TypeError, match="name="):
            FederatedStrategy.register(name)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unregistered")
def test_strategies_of_one_name_do_not_share_data() -> None:
    """The partitioner that the name was given is the same object for all of them."""
    partitioner = partitioners.DirichletPartitioner(4, alpha=1.0)
    FederatedStrategy.register("dirichlet4", partitioner=partitioner, executor="sequential")
    trainers = [reference.quiet_trainer(strategy="dirichlet4", max_epochs=1) for _ in range(2)]
    for trainer, samples in zip(trainers, (200, 120), strict=True):
        trainer.fit(make(), loader(samples))
    first, second = (trainer.strategy for trainer in trainers)
    assert isinstance(first, FederatedStrategy)
    assert isinstance(second, FederatedStrategy)
    assert first.partition is not None
    assert int(first.partition.sizes.sum()) == 200
    validation = reference.dataset(60)
    alike = [strategy.divide_alike(validation).fingerprint for strategy in (first, second)]
    alone = reference.quiet_trainer(strategy="dirichlet4", max_epochs=1)
    alone.fit(make(), loader(200))
    assert alike[0] == alone.strategy.divide_alike(validation).fingerprint != alike[1]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no dataset"):
        _ = partitioner.dataset


# ---- one object, what the Trainer sets in it


DEVICES = [torch.device("cpu")]
TRAINER_SIDE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"accelerator": "cpu"}, {"accelerator": "cpu"}),
    ({"accelerator": "auto"}, {"accelerator": "cpu"}),
    ({"accelerator": CPUAccelerator()}, {"accelerator": "cpu"}),
    ({"plugins": [TorchCheckpointIO()]}, {}),
    ({}, {"plugins": [TorchCheckpointIO()]}),
    ({"plugins": [TorchCheckpointIO()]}, {"plugins": [AsyncCheckpointIO()]}),
    ({"precision": "bf16-mixed"}, {"precision": "64-true"}),
    ({"precision": "bf16-mixed"}, {"plugins": [HalfPrecision("bf16-true")]}),
    ({"plugins": [HalfPrecision("bf16-true")]}, {}),
    ({"plugins": [LightningEnvironment()]}, {"plugins": [LightningEnvironment()]}),
    ({"devices": 2}, {"devices": 1}),
    ({"devices": 1}, {"devices": 3, "num_nodes": 2}),
]


@pytest.mark.parametrize(("first", "second"), TRAINER_SIDE)
def test_what_a_trainer_set_is_let_go_of(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The second Trainer is as if it were the first."""
    used, fresh = FederatedStrategy(num_clients=5), FederatedStrategy(num_clients=5)
    one = reference.quiet_trainer(strategy=used, **first)
    if one.num_devices == 1:
        one.fit_loop.max_epochs = 1
        one.fit(BoringModel())
    trainers = [reference.quiet_trainer(strategy=strategy, **second) for strategy in (used, fresh)]
    for name in ("accelerator", "precision_plugin", "checkpoint_io", "cluster_environment", "launcher"):
        after, new = (getattr(trainer.strategy, name) for trainer in trainers)
        assert type(after) is type(new), name
    for name in (
        "parallel_devices",
        "num_nodes",
        "num_processes",
        "world_size",
        "global_rank",
        "process_group_backend",
    ):
        after, new = (getattr(trainer.strategy, name) for trainer in trainers)
        assert after == new, name
    for plugin in second.get("plugins", []):
        strategy: Any = trainers[0].strategy
        assert plugin in (strategy.checkpoint_io, strategy.precision_plugin, strategy.cluster_environment)


GIVEN: dict[str, Callable[[], Any]] = {
    "accelerator": CPUAccelerator,
    "checkpoint_io": TorchCheckpointIO,
    "precision_plugin": lambda: MixedPrecision("bf16-mixed", "cpu"),
    "cluster_environment": LightningEnvironment,
    "parallel_devices": lambda: list(DEVICES),
    "process_group_backend": lambda: "gloo",
}


@pytest.mark.parametrize(
    ("name", "later"),
    [*((name, False) for name in GIVEN), *((name, True) for name in GIVEN if name != "process_group_backend")],
)
def test_what_the_user_gave_stays(name: str, later: bool) -> None:
    """Also what is set after the first Trainer."""
    given = GIVEN[name]()
    strategy = sequential(num_clients=5, **({} if later else {name: given}))
    for number in range(3):
        if later and number == 1:
            setattr(strategy, name, given)
        trainer = reference.quiet_trainer(strategy=strategy, max_epochs=1, accelerator="auto")
        if number >= later:
            assert getattr(trainer.strategy, name) is given
        trainer.fit(BoringModel())


def test_what_is_given_twice_is_still_refused() -> None:
    """By Lightning, for the second Trainer as for the first."""
    strategy = FederatedStrategy(num_clients=5, checkpoint_io=TorchCheckpointIO())
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match="checkpoint_io set through both"):
            reference.quiet_trainer(strategy=strategy, plugins=[TorchCheckpointIO()])
    assert isinstance(reference.quiet_trainer(strategy=strategy).strategy.checkpoint_io, TorchCheckpointIO)
    plain = FederatedStrategy(num_clients=5)
    assert isinstance(reference.quiet_trainer(strategy=plain).strategy.checkpoint_io, AtomicCheckpointIO)
    assert type(reference.quiet_trainer(strategy=plain).precision_plugin) is Precision


# ---- one object, fit after fit


OF_ROOM = {
    "server": "server_optimizer",
    "local_rules": "local_rule",
    "aggregators": "aggregator",
    "compressors": "compressor",
    "samplers": "sampler",
    "privacy": "privacy",
}
OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "keep": lambda: {"client_optimizer": "keep"},
    "steps": lambda: {"local_steps": 2},
    "personal": lambda: {"personal": ["net.3.*"]},
    "ditto": lambda: {"personal": local_rules.Ditto(0.1)},
    "async": lambda: {"mode": FedBuff(seconds=[1.0, 2.0, 3.0, 4.0])},
    "population": lambda: {"population": Population({"phone": 0.5, "jetson": 0.5})},
    "vectorized": lambda: {"executor": "vectorized"},
    "downlink": lambda: {"downlink_compressor": "sign"},
    "dirichlet": lambda: {"partitioner": partitioners.DirichletPartitioner(4, alpha=1.0, min_partition_size=2)},
    "partition": lambda: {"partitioner": Partition.from_lists([range(i, 40, 4) for i in range(4)])},
}


def of_method(room: str, name: str) -> dict[str, Any]:
    several = {"num_clients": 6, "clients_per_round": 6} if room == "aggregators" else {}
    return {OF_ROOM[room]: example(room, name), **several}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"{room}.{name}": lambda room=room, name=name: of_method(room, name) for room, name in METHODS},  # type: ignore[misc]
    **OTHERS,
}


def strategy_of(case: str) -> FederatedStrategy:
    options = CASES[case]()
    partitioner = options.get("partitioner", "iid")
    return sequential(
        **{"clients_per_round": 3, **({"num_clients": 4} if isinstance(partitioner, str) else {}), **options}
    )


@pytest.mark.parametrize("case", CASES)
def test_every_fit_starts_afresh(case: str) -> None:
    """Nothing of the first is left, whatever it was and however it ended; nor in a copy, made before or after."""
    expected = fit(strategy_of(case))
    strategy = strategy_of(case)
    before = pickle.loads(pickle.dumps(strategy))
    fit(strategy, width=9, samples=40 if case == "partition" else 30)
    after = copy.deepcopy(strategy)
    for each in (strategy, before, after):
        assert same(fit(each), expected)


class Stops(pl.Callback):
    def __init__(self, error: BaseException, where: str) -> None:
        self.error, self.where = error, where

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "where"):
            return self._stop
        return super().__getattribute__(name)

    def _stop(self, *_: Any, **__: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("enough"), KeyboardInterrupt("enough")], ids=["error", "interrupt"])
@pytest.mark.parametrize(
    "where", ["setup", "on_fit_start", "on_train_start", "on_client_end", "on_before_server_step", "on_train_batch_end"]
)
def test_a_fit_that_failed_leaves_nothing_behind(error: BaseException, where: str) -> None:
    expected = fit(strategy_of("keep"))
    strategy = strategy_of("keep")
    with pytest.raises((ValueError, SystemExit)):
        fit(strategy, width=9, callbacks=[Stops(error, where)])
    assert same(fit(strategy), expected)


def test_evaluation_between_fits_sees_the_module_that_it_is_given() -> None:
    strategy, module = sequential(num_clients=6), make()
    expected = fit(sequential(num_clients=6))

    def trainer(**options: Any) -> pl.Trainer:
        return reference.quiet_trainer(strategy=strategy, **options)

    (before,) = trainer().validate(module, loader(), verbose=False)
    fitting = trainer(max_epochs=2)
    fitting.fit(module, loader())
    assert same(module.state_dict(), expected)
    record = strategy.last_round
    assert record is not None
    (after,) = trainer().test(module, loader(), verbose=False)
    assert after["loss"] < before["loss"]
    outputs: Any = trainer().predict(module, loader())
    with torch.no_grad():
        assert torch.equal(torch.cat(outputs), module.eval().net(reference.dataset(40).tensors[0]))
    assert strategy.last_round is record
    assert same(fit(strategy), expected)
    other = make(9)
    trainer().predict(other, loader())
    (again,) = fitting.test(module, loader(), verbose=False)  # the first Trainer once more
    assert again == after


def test_a_checkpoint_of_the_next_trainer_has_nothing_of_the_first(tmp_path: Any) -> None:
    strategy = sequential(num_clients=6, client_optimizer="keep")
    fit(strategy)
    module = make(9)
    trainer = reference.quiet_trainer(strategy=strategy)
    trainer.predict(module, loader())
    trainer.save_checkpoint(tmp_path / "next.ckpt")
    checkpoint = torch.load(tmp_path / "next.ckpt", weights_only=True)
    assert "federated" not in checkpoint
    assert checkpoint["optimizer_states"] == []
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()


def test_an_object_resumes_the_checkpoint_of_its_own_earlier_trainer(tmp_path: Any) -> None:
    strategy = sequential(num_clients=6, client_optimizer="keep")
    expected = fit(sequential(num_clients=6, client_optimizer="keep"), max_epochs=4)
    first = reference.quiet_trainer(strategy=strategy, max_epochs=2)
    first.fit(make(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    module = make(16)
    second = reference.quiet_trainer(strategy=strategy, max_epochs=4)
    second.fit(module, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(module.state_dict(), expected)


# ---- one object, two Trainers at once


class Meddles(pl.Callback):
    """Lets another Trainer have the strategy in the middle of a fit, and takes what comes of it."""

    def __init__(self, meddle: Callable[[pl.Trainer], object]) -> None:
        self.meddle = meddle
        self.errors: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        with pytest.raises(RuntimeError) as caught:
            self.meddle(trainer)
        self.errors.append(str(caught.value))


def test_a_running_object_refuses_to_be_built_into_another_trainer() -> None:
    strategy = sequential(num_clients=6)
    meddles = Meddles(lambda trainer: reference.quiet_trainer(strategy=trainer.strategy))
    assert same(fit(strategy, callbacks=[meddles]), fit(sequential(num_clients=6)))
    assert len(meddles.errors) == 2
    assert all("strategy: another Trainer is running with this FederatedStrategy" in error for error in meddles.errors)


@pytest.mark.parametrize("own_module", [False, True])
def test_a_running_object_refuses_another_trainer_that_was_built_before(own_module: bool) -> None:
    strategy = sequential(num_clients=6)
    other, module = reference.quiet_trainer(strategy=strategy), make(9)
    meddles = Meddles(
        lambda trainer: other.validate(trainer.lightning_module if own_module else module, loader(), verbose=False)
    )
    assert same(fit(strategy, callbacks=[meddles]), fit(sequential(num_clients=6)))
    assert len(meddles.errors) == 2
    assert all("strategy: another Trainer is running with this FederatedStrategy" in error for error in meddles.errors)
    assert other.validate(module, loader(), verbose=False)  # now it may


def test_trainers_that_are_built_together_and_run_one_after_the_other() -> None:
    strategy, module = sequential(num_clients=6), make()
    one, two = (reference.quiet_trainer(strategy=strategy, max_epochs=2, precision=p) for p in ("64-true", "32-true"))
    one.fit(module.double(), loader(dtype=torch.float64))
    assert one.precision == "64-true"
    two.predict(module.float(), loader())
    assert same(fit(sequential(num_clients=6)), fit(strategy))


def test_a_trainer_whose_processes_the_object_no_longer_has_says_so() -> None:
    strategy = FederatedStrategy(num_clients=6)
    one = reference.quiet_trainer(strategy=strategy)
    reference.quiet_trainer(strategy=strategy, devices=2)
    strategy._launcher = None  # which would start the other process
    with pytest.raises(RuntimeError, match=r"with 2 process\(es\), and this one has 1"):
        one.validate(make(), loader(), verbose=False)
