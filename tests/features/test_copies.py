"""What users give to a Trainer can be pickled and deep-copied: before, during and after a fit.

Lists of what there is are read from the package, so that what is added is tested as well.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only

from lightning_fedscale import FedBuff, attacks, callbacks, local_rules, partitioners, phases, privacy, schedules
from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.compressors import WRAPPERS, by_name
from lightning_fedscale.devices import Population
from lightning_fedscale.partitioners.registry import PARTITIONERS
from lightning_fedscale.phases import Detector, Observation, Phase
from tests.laws import reference
from tests.strategies import sequential

WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
}
both = pytest.mark.parametrize("way", WAYS)


# ---- options that no strategy has trained with in test_several_trainers.py

ARGUMENTS: dict[str, Any] = {
    "batch": 64.0,
    "factor": 2.0,
    "length": 10,
    "limit": 1.5,
    "reference": 16.0,
    "rule": phases.linear_ramp(4.0),
    "stages": {0: 1, 3: 4},
    "steps": 4,
    "until": 2,
    "std": 0.1,
    "num_partitions": 4,
    "partition_sizes": [10, 20, 30, 40],
    "alpha": 0.5,
    "num_classes_per_partition": 2,
    "num_shards_per_partition": 2,
    "distribution_array": torch.full((2, 4), 0.25).numpy(),
    "num_unique_labels_per_partition": 2,
    "preassigned_num_samples_per_label": 5,
    "strictness": 0.5,
    "partition_id_to_size_fn": abs,
    "partition_by": "speaker",
    "group_size": 2,
    "path": str(Path(__file__).with_name("three_clients.json")),
}
"""By the name of the parameter."""
OPTIONAL = {name for name in ARGUMENTS if name.startswith("num_") or name in ("alpha", "strictness", "group_size")}
OPTIONAL |= {"partition_by", "preassigned_num_samples_per_label"}


def made(factory: Callable[..., Any]) -> Any:
    """What a factory makes of the arguments above."""
    parameters = inspect.signature(factory).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty or p.name in OPTIONAL]
    return factory(**{name: ARGUMENTS[name] for name in wanted})


def factories(module: Any, kind: str) -> dict[str, Any]:
    """Public functions of a module that return a ``kind``."""
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and name[0] != "_"
        and not name.endswith("by_name")
        and value.__module__.startswith(module.__name__)
        and value.__annotations__.get("return") == kind
    }


OPTIONS: dict[str, Callable[[], Any]] = {
    **{name: lambda value=value: made(value) for name, value in factories(phases, "Detector").items()},  # type: ignore[misc]
    **{name: lambda value=value: made(value) for name, value in factories(phases, "ScaleRule").items()},  # type: ignore[misc]
    **{name: lambda value=value: made(value) for name, value in factories(attacks, "Attack").items()},  # type: ignore[misc]
    **{
        name: lambda value=value: made(value)  # type: ignore[misc]
        for name, value in factories(schedules, "Callable[[int], int]").items()
    },
    **{f"partitioners.{name}": lambda kind=kind: made(kind) for name, kind in PARTITIONERS.items()},  # type: ignore[misc]
    "privacy": lambda: privacy.dp_fed_avg(1.0, 1.0, delta=1e-5),
    "privacy, adaptive": lambda: privacy.dp_fed_avg(1.0, 1.0, delta=1e-5, adaptive=privacy.AdaptiveClipping()),
    "attacked": lambda: attacks.attacked("mean", attacks.sign_flip(), [0]),
    "phase_driven": lambda: WRAPPERS["phase_driven"](callbacks.CriticalPhase(), by_name("top_k"), by_name("sign")),
    "error_feedback": lambda: WRAPPERS["error_feedback"](by_name("top_k")),
    "FedBuff": lambda: FedBuff(seconds=[1.0, 2.0]),
    "Population": lambda: Population({"phone": 0.7, "jetson": 0.3}),
    "Ditto": lambda: local_rules.Ditto(0.1),
}


def test_the_lists_are_not_empty() -> None:
    assert {f"phases.{name}" for name in phases.DETECTORS} <= OPTIONS.keys()
    assert {"phases.step", "phases.capped", "attacks.gaussian", "schedules.in_stages"} <= OPTIONS.keys()
    assert {"error_feedback", "phase_driven"} == WRAPPERS.keys()


@both
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_can_be_copied(name: str, way: str) -> None:
    value = OPTIONS[name]()
    copied = WAYS[way](value)
    assert type(copied) is type(value)
    for answer in answers(value):
        assert answer(copied) == answer(value)


def answers(value: Any) -> Iterator[Callable[[Any], Any]]:
    """What a copy has to do as the original does."""
    if isinstance(value, Detector):
        yield observed
    elif isinstance(value, partitioners.Partitioner | Population | FedBuff):
        yield repr
    elif isinstance(value, Aggregator):
        yield lambda rule: rule.call
    elif callable(value) and "phase" in inspect.signature(value).parameters:
        yield lambda rule: [rule(Phase(False, quiet, 128.0)) for quiet in (1, 5, 50)]
    elif callable(value) and "round" in inspect.signature(value).parameters:
        yield lambda schedule: [schedule(round) for round in range(5)]


def observed(detector: Detector) -> list[str]:
    state, found = detector.init(), []
    for number in range(60):
        decision, state = detector.update(
            state, Observation([1.0 + number % 7], 2.0 + number % 5, 3.0 + number % 3, 0.1)
        )
        found.append(repr(decision))
    return found


# ---- callbacks and the strategy, at any moment of a fit

NEEDED: dict[str, dict[str, Any]] = {"MaxBatchProbe": {"budget": "1GiB"}}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "CriticalPhase": [
        {},
        {"level": "step"},
        {"action": "noise", "target_batch": 4},
        {"action": "noise", "target_batch": 4, "noise": "diagonal"},
        {"detector": "accordion", "noise_every": 1},
    ]
}
CALLBACKS = [
    pytest.param(name, {**NEEDED.get(name, {}), **variant}, id=f"{name}{number or ''}")
    for name in callbacks.__all__
    for number, variant in enumerate(VARIANTS.get(name, [{}]))
]


def build(name: str, options: dict[str, Any]) -> Any:
    return getattr(callbacks, name)(**options)


class Copies(pl.Callback):
    """Copies others at every hook, and counts."""

    def __init__(self, *subjects: Any) -> None:
        self.subjects = subjects
        self.moments: set[str] = set()

    def copy(self, moment: str, *subjects: Any) -> None:
        self.moments.add(moment)
        for subject in (*self.subjects, *subjects):
            for way in WAYS.values():
                copied = way(subject)
                assert type(copied) is type(subject)
                assert not trainers_in(copied)


def trainers_in(value: Any) -> int:
    """A copy must not drag a Trainer along, and with it the data."""
    found = []

    class Finder(pickle.Pickler):
        def persistent_id(self, part: Any) -> None:
            if isinstance(part, pl.Trainer):
                found.append(part)

    Finder(io.BytesIO()).dump(value)
    return len(found)


def _at(moment: str) -> Callable[..., None]:
    def hook(self: Copies, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.copy(moment, trainer.strategy)

    return hook


MOMENTS = ("on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_end", "on_train_end", "on_fit_end")
ROUND_MOMENTS = ("on_round_start", "on_client_start", "on_client_end", "on_before_server_step", "on_round_end")
for each in (*MOMENTS, *ROUND_MOMENTS):
    setattr(Copies, each, _at(each))


def trainer_of(strategy: Any, *given: Any) -> pl.Trainer:
    return reference.quiet_trainer(strategy=strategy, callbacks=list(given), max_epochs=2, limit_val_batches=1)


@pytest.mark.parametrize(("name", "options"), CALLBACKS)
def test_callbacks_and_strategy_can_be_copied_at_any_moment(name: str, options: dict[str, Any]) -> None:
    callback = build(name, options)
    strategy = sequential(num_clients=3, clients_per_round=2)
    copies = Copies(callback)
    copies.copy("before", strategy)
    trainer = trainer_of(strategy, callback, copies)
    copies.copy("built", strategy)
    trainer.fit(BoringModel())
    copies.copy("after", strategy)
    assert copies.moments == {"before", "built", "after", *MOMENTS, *ROUND_MOMENTS}


@pytest.mark.parametrize("error", [RuntimeError("enough"), KeyboardInterrupt("enough")], ids=["error", "interrupt"])
@pytest.mark.parametrize(("name", "options"), CALLBACKS)
def test_a_callback_serves_the_next_trainer_as_a_new_one_would(
    name: str, options: dict[str, Any], error: BaseException
) -> None:
    """Whatever became of the first; so does a copy of it."""

    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                raise error

    def fitted(callback: Any) -> dict[str, Any]:
        module = reference.make_module()
        module.validation_step = module.training_step  # type: ignore[method-assign]
        data = reference.loader(reference.dataset(40), shuffle=False)
        trainer_of(sequential(num_clients=3), callback).fit(module, data, data)
        state = {key: value for key, value in callback.state_dict().items() if key != "ledger"}
        return {**module.state_dict(), "state": re.sub(r"seconds': [\d.e-]+", "seconds'", repr(state))}

    expected = fitted(build(name, options))
    callback, first = build(name, options), BoringModel()
    trainer = trainer_of(sequential(num_clients=3), callback, Fails())
    before = list(trainer.callbacks)  # type: ignore[attr-defined]
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(first)
    assert trainer.callbacks == before  # type: ignore[attr-defined]
    for each in (copy.deepcopy(callback), callback):
        found = fitted(each)
        assert found["state"] == expected["state"]
        assert all(torch.equal(found[key], value) for key, value in expected.items() if key != "state")


# ---- what others see of the internals


@pytest.mark.parametrize("federated", [True, False])
@pytest.mark.parametrize(("name", "options"), CALLBACKS)
def test_a_checkpoint_asks_for_no_callback_that_is_internal(
    name: str, options: dict[str, Any], federated: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain Trainer resumes it, and asks at most for what the user had."""
    if not federated and name in ("ServerEMA", "ClientMetrics"):
        with pytest.raises(TypeError, match="FederatedStrategy"):
            trainer_of("auto", build(name, options)).fit(BoringModel())
        return
    given = build(name, options)
    trainer = trainer_of(sequential(num_clients=3) if federated else "auto", given)
    trainer.limit_train_batches = 4
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    assert saved.keys() <= {given.state_key}
    said: list[str] = []
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.checkpoint_connector.rank_zero_warn", said.append)
    plain = reference.quiet_trainer(max_epochs=3, limit_train_batches=4)
    plain.fit(BoringModel(), ckpt_path=tmp_path / "run.ckpt")
    assert [each for each in said if "callbacks" in each and given.state_key not in each] == []
    assert rank_zero_only.rank == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "options"), CALLBACKS)
def test_what_watches_rounds_is_not_among_the_trainers_callbacks(name: str, options: dict[str, Any]) -> None:
    """Others go through them: libraries, loggers, tests. What takes part in Lightning's own hooks has to be there."""
    if options.get("level") == "step":
        options = {**options, "level": "round"}
    seen: set[type] = set()

    class Sees(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.update(type(each) for each in trainer.callbacks)  # type: ignore[attr-defined]

    given = build(name, options)
    trainer_of(sequential(num_clients=3), given, Sees()).fit(BoringModel())
    ours = {each.__name__ for each in seen if each.__module__.startswith("lightning_fedscale")}
    assert ours == {type(given).__name__, "RunSettingsLogger", "RoundEnd", "Requeue"}
