"""Who adds a part is told here what is missing, and in which file: docs/how-to/add-a-method.md in assertions.

`missing` looks a part of a registry up in all places that name parts one by one. Nothing may be missing of those that
there are, and of a part that is only written, everything is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from lightning_fedscale import aggregators, compressors, local_rules, partitioners, phases, samplers, scaling, server
from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.utils.factory_repr import record_call
from tests.features import test_freezing, test_hydra_conf, test_robust
from tests.unit import test_contracts, test_robust_aggregation

ROOT = Path(__file__).parents[2]
CONF = "lightning_fedscale/conf"


class Registry(NamedTuple):
    """The parts of a room by name.

    Attributes:
        room: the public module.
        variables: what it is called in the room's ``registry.py``, in one or two parts.
        parts: what is in it.
        group: Hydra's group, with a file for each.
        records: whether what a part makes has a field ``arguments``, which `record_call` fills in.
        apart: public functions that make such a thing and are no parts of the registry.
    """

    room: str
    variables: str
    parts: Mapping[str, Callable[..., Any]]
    group: str
    records: bool = False
    apart: tuple[str, ...] = ()


REGISTRIES = [
    Registry(
        "aggregators", "FACTORIES", aggregators.FACTORIES, "strategy/aggregator", True,
        ("aggregator_of", "stacked", "weighted_sum"),
    ),
    Registry(
        "compressors", "FACTORIES or WRAPPERS",
        {**compressors.FACTORIES, **compressors.WRAPPERS}, "strategy/compressor", True,
    ),
    Registry("local_rules", "FACTORIES", local_rules.FACTORIES, "strategy/local_rule", True),
    Registry("samplers", "FACTORIES", samplers.FACTORIES, "strategy/sampler"),
    Registry(
        "server", "FACTORIES", server.FACTORIES, "strategy/server_optimizer", True,
        ("per_parameter", "scale", "scale_by_adagrad", "scale_by_adam", "scale_by_yogi", "trace"),
    ),
    Registry(
        "partitioners", "PARTITIONERS", partitioners.registry.PARTITIONERS,
        "strategy/partitioner",
    ),
    Registry("phases", "DETECTORS", phases.DETECTORS, "detector"),
    Registry("scaling", "LAWS", scaling.LAWS, "law"),
]  # fmt: skip
PARTS = [(registry, name) for registry in REGISTRIES for name in registry.parts]


def missing(registry: Registry, name: str, part: Callable[..., Any]) -> Iterator[str]:
    """What is still to be done for a part, each sentence beginning with the file."""
    room, own = registry.room, part.__name__
    if own not in import_module(f"lightning_fedscale.{room}").__all__:
        yield f"lightning_fedscale/{room}/__init__.py: import {own} and add it to __all__"
    if registry.records and not hasattr(part, "__wrapped__"):
        yield f"lightning_fedscale/{room}: put @record_call (utils/factory_repr.py) above {own}, for logs"
    if f"| [`{own}`](" not in (ROOT / f"docs/reference/{room}.md").read_text("utf8"):
        yield f"docs/reference/{room}.md: run python docs/fill.py, which adds the row of {own}"
    yield from _missing_in_conf(registry.group, name)
    if room in test_contracts.ROOMS:
        if ">>>" not in (part.__doc__ or ""):
            yield f"lightning_fedscale/{room}: the docstring of {own} needs an example that is executed"
        yield from _missing_example(room, name)


def _missing_in_conf(group: str, name: str) -> Iterator[str]:
    file = ROOT / CONF / group / f"{name}.yaml"
    if name in test_hydra_conf.WITHOUT_FILE:
        return
    if not file.is_file():
        yield f"{CONF}/{group}/{name}.yaml: write it, with all arguments at their defaults and ??? where there is none"
        return
    given = {*test_hydra_conf.GIVEN, *test_hydra_conf.ALSO_GIVEN.get(f"{group}/{name}", {})}
    for argument in re.findall(r"^(\w+): \?\?\?$", file.read_text("utf8"), re.M):
        if argument not in given:
            yield (
                f"tests/features/test_hydra_conf.py: add a value for {argument!r} to GIVEN, or to ALSO_GIVEN if other"
                " parts have an argument of that name with other values"
            )


def _missing_example(room: str, name: str) -> Iterator[str]:
    if next(test_contracts.expressions(room, name), None) is None:
        yield f"{test_contracts.PLACE}: add a row with the expression {room}.{name}(...) and its reference test"
        if room == "aggregators":
            yield f"tests/unit/test_robust_aggregation.py: add {name!r} to RULES"
        return
    if room == "aggregators":
        yield from _missing_of_rule(name, test_contracts.example(room, name))


def _missing_of_rule(name: str, rule: Aggregator) -> Iterator[str]:
    if name not in test_robust_aggregation.RULES:
        yield f"tests/unit/test_robust_aggregation.py: add {name!r} to RULES"
    if rule.sees_all and name not in test_robust.ROBUST:
        yield f"tests/features/test_robust.py: add {name!r} to ROBUST, since it sees all updates to bear hostile ones"
    if rule.needs > test_freezing.CLIENTS and name not in test_freezing.GIVEN:
        few = f"arguments that do for {test_freezing.CLIENTS} clients"
        yield f"tests/features/test_freezing.py: add {name!r} to GIVEN, with {few}"


@pytest.mark.parametrize(("registry", "name"), PARTS, ids=lambda each: getattr(each, "room", each))
def test_nothing_is_missing_of(registry: Registry, name: str) -> None:
    todo = list(missing(registry, name, registry.parts[name]))
    assert not todo, "\n".join([f"{registry.room}.{name} is not complete:", *todo])


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda each: each.room)
def test_no_public_factory_is_forgotten(registry: Registry) -> None:
    module = import_module(f"lightning_fedscale.{registry.room}")
    made = {inspect.signature(part).return_annotation for part in registry.parts.values() if inspect.isfunction(part)}
    for name in module.__all__:
        function = getattr(module, name)
        makes = inspect.isfunction(function) and inspect.signature(function).return_annotation in made
        if makes and not name.endswith("by_name") and name not in registry.apart:
            assert name in registry.parts, (
                f"lightning_fedscale/{registry.room}/registry.py: add {name!r} to {registry.variables}"
            )


@pytest.mark.parametrize(
    ("registry", "name"),
    [(registry, name) for registry, name in PARTS if registry.records],
    ids=lambda each: getattr(each, "room", each),
)
def test_a_part_has_the_arguments_that_made_it(registry: Registry, name: str) -> None:
    if name == "phase_driven":  # the table of papers shows no phase
        made = compressors.phase_driven(SimpleNamespace(critical=True), compressors.sign(), compressors.qsgd())
    else:
        made = test_contracts.example(registry.room, name)
    parameters = inspect.signature(registry.parts[name]).parameters
    named = {each for each, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    assert named <= set(made.arguments)
    assert getattr(made, "call", made.name if isinstance(made, compressors.Compressor) else "").startswith(f"{name}(")
    assert {made: name}[made] == name, "a part can no longer be a key"


@pytest.mark.parametrize("page", ["add-a-method", "add-a-callback-argument"])
def test_the_pages_name_files_and_variables_that_there_are(page: str) -> None:
    text = (ROOT / f"docs/how-to/{page}.md").read_text("utf8")
    named = re.findall(
        r"(?:`(\w+)`(?: and a test)? in )?`?((?:tests|docs|callbacks|lightning_fedscale)/[\w/.-]+)", text
    )
    assert len(named) > 10
    for variable, path in named:
        if not re.search("ROOM|GROUP|NAME", path):
            assert (ROOT / path).is_file(), f"docs/how-to/{page}.md: there is no {path}"
            assert not variable or re.search(rf"^{variable}\b", (ROOT / path).read_text("utf8"), re.M), variable


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda each: each.room)
def test_every_registry_is_where_the_page_says(registry: Registry) -> None:
    module = import_module(f"lightning_fedscale.{registry.room}.registry")
    parts = {key: part for name in registry.variables.split(" or ") for key, part in getattr(module, name).items()}
    assert parts == registry.parts


# ---- what a part is told that is only written


def newest(reach: float) -> Aggregator:
    """A rule without an example."""
    return aggregators.median()


def complaints(part: Callable[..., Any], name: str = "newest") -> set[str]:
    """The files that are named."""
    return {each.partition(":")[0] for each in missing(REGISTRIES[0], name, part)}


def test_a_part_that_is_only_written_is_told_every_file() -> None:
    assert complaints(newest) == {
        "lightning_fedscale/aggregators/__init__.py",
        "lightning_fedscale/aggregators",
        "lightning_fedscale/conf/strategy/aggregator/newest.yaml",
        "docs/reference/aggregators.md",
        "tests/unit/test_robust_aggregation.py",
        "docs/papers.md",
    }
    assert sum("lightning_fedscale/aggregators: " in each for each in missing(REGISTRIES[0], "newest", newest)) == 2


def test_a_forgotten_record_of_the_call_is_noticed() -> None:
    assert any("@record_call" in each for each in missing(REGISTRIES[0], "newest", newest))
    assert not any("@record_call" in each for each in missing(REGISTRIES[0], "newest", record_call(newest)))


def test_a_forgotten_value_is_noticed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(test_hydra_conf.GIVEN, "radius")
    (todo,) = missing(REGISTRIES[0], "centered_clipping", aggregators.centered_clipping)
    assert todo.startswith("tests/features/test_hydra_conf.py: add a value for 'radius' to GIVEN")


@pytest.mark.parametrize(
    ("table", "name", "file"),
    [
        (test_robust.ROBUST, "median", "tests/features/test_robust.py"),
        (test_robust_aggregation.RULES, "median", "tests/unit/test_robust_aggregation.py"),
        (test_freezing.GIVEN, "krum", "tests/features/test_freezing.py"),
    ],
)
def test_a_forgotten_list_is_noticed(
    table: dict[str, Any], name: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(table, name)
    assert complaints(aggregators.FACTORIES[name], name) == {file}
