"""The files of ``lightning_fedscale.conf``: one for every public factory, with its arguments at their defaults."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

import lightning_fedscale
from lightning_fedscale import (
    FederatedStrategy,
    aggregators,
    attacks,
    callbacks,
    compressors,
    devices,
    local_rules,
    partitioners,
    phases,
    privacy,
    samplers,
    scaling,
    schedules,
    server,
)

CONF = Path(lightning_fedscale.__file__).parent / "conf"

# What makes the options of a group: from where, and what it is that they make.
ROOMS: dict[str, tuple[ModuleType, str]] = {
    "strategy/server_optimizer": (server, "ServerOptimizer"),
    "strategy/aggregator": (aggregators, "Aggregator"),
    "strategy/aggregator/attack": (attacks, "Attack"),
    "strategy/compressor": (compressors, "Compressor"),
    "strategy/local_rule": (local_rules, "LocalRule"),
    "strategy/local_steps": (schedules, "Callable[[int], int]"),
    "strategy/privacy": (privacy, "Privacy"),
    "detector": (phases, "Detector"),
    "scale_rule": (phases, "ScaleRule"),
}
WITHOUT_FILE = {
    "aggregator_of",
    "by_name",
    "detector_by_name",  # of what has a file
    "per_parameter",
    "stacked",
    "weighted_sum",  # of functions that one writes
    "phase_driven",  # of another callback's object
}
BY_FIT = {
    "fitted_on",
    "fitted_rho",
    "refits",
    "problems",
    "made_for",
    "error",
}  # of its law
BY_TRAINER = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}

LIGHTNINGS = ("callbacks/default",)

# Values for what a file leaves to be given, and for what decides between ways to give it.
GIVEN: dict[str, Any] = {
    "alpha": 0.5,
    "attackers": [1],
    "batch": 64.0,
    "clip": 1.0,
    "clip_norm": 1.0,
    "delta": 1e-5,
    "factor": 0.5,
    "keep": 2,
    "limit": 2.0,
    "max_norm": 1.0,
    "mu": 0.1,
    "num_classes_per_partition": 2,
    "candidates": 4,
    "num_unique_labels_per_partition": 1,
    "partition_sizes": [3, 5],
    "period": 24,
    "probability": 0.1,
    "preassigned_num_samples_per_label": 1,
    "radius": 1.0,
    "reference": 8.0,
    "shares": {"phone": 0.5, "jetson": 0.5},
    "stages": {0: 1, 3: 2},
    "std": 1.0,
    "steps": 2,
    "strictness": 0.5,
    "trace": [[1, 0, 1], [1, 1, 0]],
    "trim": 0.2,
    "until": 3,
    "weights": [1.0, 2.0, 3.0],
    "path": str(Path(__file__).with_name("three_clients.json")),
    "partition_id_to_size_fn": {"_target_": "hydra.utils.get_method", "path": "math.sqrt"},
    "distribution_array": {"_target_": "numpy.ones", "shape": [2, 4]},
}
ALSO_GIVEN: dict[str, dict[str, Any]] = {
    "strategy/aggregator/krum": {"attackers": 1},
    "strategy/aggregator/multi_krum": {"attackers": 1},
    "strategy/privacy/dp_fed_avg": {"noise_multiplier": 1.0},
    "strategy/partitioner/shard": {"num_shards_per_partition": 2},
    "strategy/partitioner/grouped_natural_id": {"group_size": 2},
}


def options(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}


def parts() -> list[str]:
    """Every file that makes one object, by its path below conf; the link trainer/strategy is the same once more."""
    rooms = ("strategy/", "law/", "detector/", "scale_rule/", "callbacks/")
    names = [path.relative_to(CONF).with_suffix("").as_posix() for path in sorted(CONF.rglob("*.yaml"))]
    return [name for name in names if name.startswith(rooms) and name not in ("strategy/federated", *LIGHTNINGS)]


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("lightning_fedscale.conf", version_base="1.3"):
        yield


def node_of(name: str, *more: str) -> DictConfig:
    """The file's content, with ten clients around it."""
    group, _, option = name.rpartition("/")
    found: DictConfig = compose(overrides=[f"+{group}@part={option}", "+num_clients=10", *more])
    if group == "callbacks":
        OmegaConf.set_struct(found, False)
        found.part = found.part[option]
    return found


def complete(name: str) -> DictConfig:
    """The same, with what must be given."""
    whole = node_of(name)
    OmegaConf.set_struct(whole, False)
    _give(whole.part)
    whole.part.update(ALSO_GIVEN.get(name, {}))
    return whole


def _give(node: DictConfig) -> None:
    for key in list(node):
        if OmegaConf.is_missing(node, key):
            assert str(key) in GIVEN, f"{Path(__file__).name}: add a value for {key!r} to GIVEN, or to ALSO_GIVEN"
            node[key] = GIVEN[str(key)]
        elif isinstance(node._get_node(key), DictConfig):
            _give(node[key])


def factory_of(node: DictConfig) -> Callable[..., Any]:
    path = node.path if node._target_ == "hydra.utils.get_method" else node._target_
    found: Callable[..., Any] = get_object(path)
    return found


@pytest.mark.parametrize("group", ROOMS)
def test_every_factory_has_a_file(group: str) -> None:
    room, made = ROOMS[group]
    public = getattr(room, "__all__", vars(room))
    factories = {
        name
        for name in public
        if inspect.isfunction(function := getattr(room, name))
        and not name.startswith("_")
        and inspect.signature(function).return_annotation == made
    }
    elsewhere = {"attacked", "secure_mean"} if group == "strategy/aggregator" else set()
    missing = factories - WITHOUT_FILE - options(group)
    assert not missing, f"write lightning_fedscale/conf/{group}/{missing.pop()}.yaml"
    assert options(group) == factories - WITHOUT_FILE | elsewhere


def test_every_class_has_a_file() -> None:
    known = partitioners.registry.PARTITIONERS
    assert options("strategy/partitioner") == set(known)
    public = {name for name in partitioners.__all__ if name.endswith("Partitioner")} - {
        "Partitioner",
        "FinishedPartitioner",  # of a Partition, which no file can hold
    }
    assert {each.__name__ for each in known.values()} == public
    assert options("strategy/sampler") == set(samplers.FACTORIES)
    assert options("law") == set(scaling.LAWS)
    made = {
        compose(overrides=[f"+callbacks={name}"]).callbacks[name]._target_
        for name in options("callbacks") - {"default"}
        if name not in ("model_checkpoint",)
    }
    assert made == {f"lightning_fedscale.callbacks.{name}" for name in callbacks.__all__} - {
        "lightning_fedscale.callbacks.RoundEvents"  # the form of others
    }
    others = {
        "privacy/adaptive": privacy.AdaptiveClipping,
        "personal": local_rules.Ditto,
        "population": devices.Population,
        "mode": lightning_fedscale.FedBuff,
    }
    for group, each in others.items():
        (option,) = options(f"strategy/{group}")
        assert factory_of(node_of(f"strategy/{group}/{option}").part) is each


def test_every_argument_of_the_strategy_with_a_part_has_a_group() -> None:
    groups = {path.name for path in (CONF / "strategy").iterdir() if path.is_dir()}
    assert groups <= set(inspect.signature(FederatedStrategy).parameters)


@pytest.mark.parametrize("name", parts())
def test_each_shows_all_arguments_at_their_defaults(name: str) -> None:
    node = node_of(name).part
    factory = factory_of(node)
    parameters = inspect.signature(factory).parameters
    if node._target_ == "hydra.utils.get_method":
        assert "round" in parameters, "a sampler as it is"
        return
    variadic = [each for each in parameters.values() if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    named = {each: value for each, value in parameters.items() if value not in variadic}
    own = set(map(str, node)) - {"_target_", "_convert_"}
    assert set(named) - BY_FIT - own == set(), "the file leaves arguments out"
    assert variadic or own <= set(named), "the file has arguments that there are not"
    for argument, parameter in named.items():
        if argument in own:
            _check_default(name, node, argument, parameter.default)


def _check_default(name: str, node: DictConfig, argument: str, default: Any) -> None:
    if OmegaConf.is_missing(node, argument):
        if default is not inspect.Parameter.empty:  # None in the signature, and refused
            whole = complete(name)
            whole.part[argument] = None
            with pytest.raises(Exception, match=argument):
                instantiate(whole.part)
        return
    shown = node[argument]
    if default is inspect.Parameter.empty:  # a part that cannot be left out, or the strategy's number of clients
        assert isinstance(shown, DictConfig) or (argument, shown) == ("num_partitions", 10)
    elif name == "strategy/partitioner/dirichlet" and argument in ("alpha", "min_partition_size"):
        by_name = partitioners.by_name("dirichlet", 10)
        assert shown == getattr(by_name, argument, None) or f"{argument}={shown}" in repr(by_name)
    else:
        plain = OmegaConf.to_container(shown) if OmegaConf.is_config(shown) else shown
        assert plain == (list(default) if isinstance(default, tuple) else default)
        assert type(plain) is type(list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize("name", parts())
def test_each_makes_what_its_factory_makes(name: str) -> None:
    whole = complete(name)
    made = instantiate(whole.part)
    group = name.rpartition("/")[0]
    kinds: dict[str, Any] = {
        "strategy/server_optimizer": server.ServerOptimizer,
        "strategy/aggregator": aggregators.Aggregator,
        "strategy/compressor": compressors.Compressor,
        "strategy/local_rule": local_rules.LocalRule,
        "strategy/partitioner": partitioners.Partitioner,
        "strategy/privacy": privacy.Privacy,
        "detector": phases.Detector,
        "law": scaling.Law,
        "strategy/population": devices.Population,
    }
    if group in kinds:
        assert isinstance(made, kinds[group])
    else:
        assert callable(made) or isinstance(made, factory_of(whole.part))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in parts() if name.startswith("law/")])
def test_laws_are_those_of_their_names(name: str) -> None:
    found, law = instantiate(node_of(name).part), scaling.LAWS[name.removeprefix("law/")]()
    assert type(found) is type(law)
    for argument, value in vars(law).items():
        assert tuple_of(getattr(found, argument)) == value


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


STRATEGY = ["+strategy=federated"]


def strategy_of(*overrides: str, base: tuple[str, ...] = ("+strategy=federated",), at: str = "strategy") -> Any:
    return instantiate(OmegaConf.select(compose(overrides=[*base, *overrides]), at))


def test_the_strategy_shows_all_its_arguments_at_their_defaults() -> None:
    node = compose(overrides=STRATEGY).strategy
    parameters = inspect.signature(FederatedStrategy).parameters
    assert set(node) - {"_target_", "_convert_"} == set(parameters) - BY_TRAINER
    made, plain = instantiate(node), FederatedStrategy(num_clients=10)
    for argument, parameter in parameters.items():
        if argument in node and not isinstance(node[argument], DictConfig) and argument != "num_clients":
            assert node[argument] == (None if argument == "personal" else parameter.default)
    ours, theirs = made._options, plain._options
    assert repr(ours.partitioner) == repr(theirs.partitioner)
    assert ours.sampler is theirs.sampler
    assert instantiate(node.timeout) == parameters["timeout"].default
    same = {each.name for each in fields(ours)} - {"partitioner", "aggregator", "server_optimizer"}
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
    delta = {"weight": np.ones(2)}
    for each in (ours, theirs):
        step, _ = each.server_optimizer.update(delta, {}, delta)
        assert step["weight"].tolist() == [1.0, 1.0]
    weigh = theirs.aggregator.weigh
    assert isinstance(weigh, partial)
    assert ours.aggregator.weigh.keywords == weigh.keywords


@pytest.mark.parametrize(
    ("base", "at", "group"),
    [
        ("+strategy=federated", "strategy", "strategy"),
        ("+trainer/strategy=federated", "trainer.strategy", "trainer/strategy"),
    ],
)
def test_groups_and_arguments_from_the_command_line(base: str, at: str, group: str) -> None:
    made = strategy_of(
        f"{group}/partitioner=dirichlet",
        f"{at}.num_clients=16",
        f"{at}.partitioner.alpha=0.3",
        f"{group}/server_optimizer=fed_adam",
        f"{at}.server_optimizer.lr=0.5",
        f"{group}/local_rule=fed_prox",
        f"{at}.local_rule.mu=0.1",
        f"{group}/compressor=error_feedback",
        f"{group}/aggregator=norm_clipped",
        f"{at}.aggregator.max_norm=1.0",
        f"strategy/compressor@{at}.compressor.compressor=top_k",
        f"{at}.compressor.compressor.ratio=0.25",
        f"strategy/aggregator@{at}.aggregator.inner=median",
        base=(base,),
        at=at,
    )._options
    assert made.num_clients == 16
    assert repr(made.partitioner) == "DirichletPartitioner(num_partitions=16, alpha=0.3, min_partition_size=1)"
    assert made.algorithm.local_rule.name == "fed_prox"
    assert made.algorithm.compressor.name == "error_feedback(top_k(0.25))"
    assert made.algorithm.aggregator.sees_all


@pytest.mark.parametrize(
    ("overrides", "check"),
    [
        (
            ["strategy.local_rule=scaffold", "strategy.aggregator=uniform"],
            lambda made: made.algorithm.local_rule.name == "scaffold",
        ),
        (["strategy.partitioner=shard", "strategy.partitioner=iid"], lambda made: made.num_clients == 10),
        (
            ["strategy/local_steps=post_local", "strategy.local_steps.until=2", "strategy.local_steps.steps=4"],
            lambda made: [made.steps_in(round) for round in (0, 2)] == [1, 4] and made.local_epochs is None,
        ),
        (["strategy.local_steps=3"], lambda made: (made.local_steps, made.local_epochs) == (3, None)),
        (["strategy.personal=[head.*]"], lambda made: made.algorithm.personal == ("head.*",)),
        (["+strategy.buffers={queue*:client}"], lambda made: made.algorithm.own == ("queue*",)),
        (["strategy/personal=ditto"], lambda made: made.algorithm.ditto.strength == 0.1),
        (
            ["strategy/mode=fed_buff", "strategy.mode.seconds=[1,2,3]", "strategy.num_clients=3"],
            lambda made: made.asynchrony.seconds is not None,
        ),
        (
            [
                "strategy/sampler=poisson",
                "strategy/privacy=dp_fed_avg",
                "strategy.privacy.clip_norm=1",
                "strategy.privacy.noise_multiplier=1",
                "strategy.privacy.delta=1e-5",
                "strategy/privacy/adaptive=adaptive_clipping",
            ],
            lambda made: made.sampler is samplers.poisson and made.algorithm.privacy.adaptive.quantile == 0.5,
        ),
        (
            ["strategy/population=population", "strategy.population.shares={phone: 0.7, jetson: 0.3}"],
            lambda made: made.population is not None,
        ),
        (
            ["strategy/compressor@strategy.downlink_compressor=qsgd"],
            lambda made: "qsgd" in made.downlink_compressor.name,
        ),
        (["strategy/partitioner=natural_id", "strategy.num_clients=null"], lambda made: made.num_clients is None),
        (
            ["strategy/partitioner=size", "strategy.num_clients=null", "strategy.partitioner.partition_sizes=[3,4]"],
            lambda made: made.num_clients == 2,
        ),
        (
            [
                "strategy/sampler=drop_out",
                "strategy.sampler.probability=0.1",
                "strategy/sampler@strategy.sampler.sampler=round_robin",
            ],
            lambda made: callable(made.sampler),
        ),
        (
            [
                "strategy/aggregator=attacked",
                "strategy.aggregator.attackers=[1,2]",
                "strategy/aggregator/attack=gaussian",
                "strategy.aggregator.attack.std=2",
                "strategy/aggregator@strategy.aggregator.aggregator=median",
            ],
            lambda made: made.algorithm.aggregator.sees_all,
        ),
    ],
)
def test_parts_of_the_strategy(overrides: list[str], check: Callable[[Any], bool]) -> None:
    assert check(strategy_of(*overrides)._options)


def test_laws_detectors_and_scale_rules_of_callbacks() -> None:
    found = compose(
        overrides=[
            "+callbacks=[compute_accounting,critical_phase]",
            "law@callbacks.compute_accounting.law=Kaplan",
            "detector@callbacks.critical_phase.detector=page_hinkley",
            "scale_rule@callbacks.critical_phase.scale=capped",
            "scale_rule@callbacks.critical_phase.scale.rule=linear_ramp",
            "callbacks.critical_phase.scale.limit=1.5",
        ]
    ).callbacks
    assert instantiate(found.compute_accounting).law == scaling.Kaplan()
    assert instantiate(found.critical_phase) is not None
    assert found.critical_phase.scale.rule._target_.endswith("linear_ramp")
    assert not math.isnan(found.critical_phase.detector.false_alarms)
