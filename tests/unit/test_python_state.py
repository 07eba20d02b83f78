"""What a module keeps in Python is compared and put back at any depth, or said to be incomplete."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import random
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_fedscale.core.user_code import values
from lightning_fedscale.core.user_code.outside import places_of
from lightning_fedscale.core.user_code.state import PythonState
from lightning_fedscale.core.user_code.variables import Place


@dataclasses.dataclass
class Config:
    beta: float = 0.5
    inner: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    table: list[int]


class Slotted:
    __slots__ = ("__hidden", "count")

    def __init__(self) -> None:
        self.count, self.__hidden = 0, [1]

    def hide(self) -> None:
        self.__hidden.append(2)


class Named(collections.namedtuple("Named", "weights")):
    pass


class Attributed(dict[str, Any]):
    note = 1


def scaled(factor: list[float]) -> Callable[[Tensor], Tensor]:
    return lambda loss: loss * factor[0]


def counting() -> Callable[[], int]:
    number = 0

    def count() -> int:
        nonlocal number
        number += 1
        return number

    return count


def defaulted(x: int, kept: list[int] = []) -> None:  # noqa: B006
    kept.append(x)


class Everything(pl.LightningModule):
    shared: list[int] = []  # noqa: RUF012
    rate = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Dropout(0.1))
        self.cfg = OmegaConf.create({"loss": {"kl": {"beta": 0.0}}})
        self.config = Config(inner=Frozen([1]))
        self.space = types.SimpleNamespace(a=types.SimpleNamespace(b=[{"c": 1.0}]))
        self.slotted = Slotted()
        self.named = Named([1])
        self.queue = collections.deque([1, 2], maxlen=3)
        self.group = {3, "a"}
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.lists = collections.defaultdict(list, a=[1])
        self.attributed = Attributed(a=1)
        self.partial = functools.partial(torch.add, alpha=[1])
        self.method = self.slotted.hide
        self.append = self.named.weights.append
        self.loss = scaled([1.0])
        self.count = counting()
        self.tensor = torch.zeros(3)
        self.tensors = [{"a": torch.zeros(2)}]
        self.array = np.zeros(2)
        self.scalar = np.float64(1.0)
        self.text = bytearray(b"a")
        self.generator, self.python, self.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.legacy = np.random.RandomState(0)
        self.unregistered = [nn.Linear(2, 2)]
        self.itself = self
        self.cycle: list[Any] = [1]
        self.cycle.append({"cycle": self.cycle})
        self.deep: list[Any] = []
        bottom(self).append([])
        for _ in range(50):
            bottom(self).append([])
        self.save_hyperparameters({"alpha": [1]})

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


def bottom(module: Everything) -> list[Any]:
    found = module.deep
    while found:
        found = found[0]
    return found


def write(array: Any, value: float) -> None:
    array[...] = value


# Path of the difference: what is done.
CHANGES: dict[str, list[Callable[[Everything], object]]] = {
    "cfg.loss.kl.beta": [
        lambda m: setattr(m.cfg.loss.kl, "beta", 1.0), lambda m: OmegaConf.update(m.cfg, "loss.kl.beta", 2),
    ],
    "config.beta": [lambda m: setattr(m.config, "beta", 1.0), lambda m: setattr(m.config, "beta", True)],
    "config.inner.table[0]": [lambda m: m.config.inner.table.__setitem__(0, 2)],
    "config.inner.table[1]": [lambda m: m.config.inner.table.append(1)],
    "space.a.b[0].c": [lambda m: m.space.a.b[0].update(c=1), lambda m: m.space.a.b[0].update(c=float("nan"))],
    "slotted.count": [lambda m: setattr(m.slotted, "count", 1), lambda m: delattr(m.slotted, "count")],
    "slotted.__hidden[1]": [lambda m: m.slotted.hide(), lambda m: m.method()],
    "named[0][1]": [lambda m: m.named.weights.append(1), lambda m: m.append(2)],
    "queue[0]": [lambda m: m.queue.extend([3, 4])],
    "group": [lambda m: m.group.add(4), lambda m: m.group.discard("a")],
    "ordered.b": [lambda m: m.ordered.update(b=3)],
    "ordered.key 0": [lambda m: m.ordered.move_to_end("a")],
    "lists.a[1]": [lambda m: m.lists["a"].append(2)],
    "attributed.a": [lambda m: m.attributed.update(a=2)],
    "attributed.more": [lambda m: setattr(m.attributed, "more", 2)],
    "partial[2].alpha[0]": [lambda m: m.partial.keywords["alpha"].__setitem__(0, 2)],
    "loss.factor[0]": [lambda m: m.loss.__closure__[0].cell_contents.__setitem__(0, 2.0)],  # type: ignore[index]
    "count.number": [lambda m: m.count()],
    "tensor": [
        lambda m: setattr(m, "tensor", torch.zeros(3)), lambda m: m.tensor.add_(1), lambda m: m.tensor.data.fill_(1),
        lambda m: write(m.tensor.numpy(), 1), lambda m: setattr(m.tensor, "data", torch.ones(3)),
        lambda m: m.tensor.data.fill_(-0.0),
    ],
    "tensors[0].a": [lambda m: m.tensors[0]["a"].data.fill_(1)],
    "array": [lambda m: write(m.array, 1), lambda m: setattr(m, "array", np.ones(2))],
    "scalar": [lambda m: setattr(m, "scalar", np.float64(2.0)), lambda m: setattr(m, "scalar", 1.0)],
    "text": [lambda m: m.text.append(1)],
    "generator": [lambda m: torch.rand(1, generator=m.generator)],
    "python": [lambda m: m.python.random()],
    "numpy[0]": [lambda m: m.numpy.random()],
    "legacy": [lambda m: m.legacy.rand()],
    "unregistered[0].weight": [lambda m: m.unregistered[0].weight.data.fill_(1)],
    "cycle[0]": [lambda m: m.cycle.__setitem__(0, 2)],
    "deep" + "[0]" * 52: [lambda m: bottom(m).append(1)],
    "net.1.eps": [lambda m: setattr(m.net[1], "eps", 1.0)],
    "net.2.p": [lambda m: setattr(m.net[2], "p", 0.5)],
    "net.training": [lambda m: m.net.eval()],
    "net.0.factor": [lambda m: setattr(m.net[0], "factor", 3)],
    "net.3": [lambda m: m.net.append(nn.ReLU())],
    "other": [lambda m: setattr(m, "other", None)],
    "config": [lambda m: delattr(m, "config"), lambda m: setattr(m, "config", 1)],
    "forward": [lambda m: setattr(m, "forward", lambda x: x)],
    "shared[0]": [lambda m: m.shared.append(1)],
    "rate": [lambda m: setattr(type(m), "rate", 1.0)],
    "extra": [lambda m: setattr(type(m), "extra", 1.0)],
    "training_step": [lambda m: setattr(type(m), "training_step", lambda *_: None)],
    "_hparams.alpha[1]": [lambda m: m.hparams["alpha"].append(2)],
    "requires_grad or the hooks of a parameter": [lambda m: m.net[0].weight.requires_grad_(False)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "number"), [(path, i) for path, changes in CHANGES.items() for i in range(len(changes))]
)
@pytest.mark.parametrize("exact", [False, True])
def test_a_change_is_noticed_named_and_undone(path: str, number: int, exact: bool) -> None:
    module = Everything()
    before = PythonState(module, exact=exact)
    assert before.complete
    assert before == PythonState(module, exact=exact)
    assert before.difference(before) is None
    assert before.still_holds()
    assert before.again() is before
    CHANGES[path][number](module)
    after = PythonState(module, exact=exact)
    try:
        assert not before.still_holds()
        assert before != after
        assert before.difference(after) == path
    finally:
        before.restore()
    assert before.difference(PythonState(module, exact=exact)) is None
    after.restore()  # and forward again
    assert after.difference(PythonState(module, exact=exact)) is None
    before.restore()
    assert before == PythonState(module, exact=exact)


def test_numbers_count_by_type_and_value() -> None:
    module: Any = nn.Module()
    values = [1, True, 1.0, 0.0, -0.0, False, None, float("nan"), 1j, "1", b"1", np.float64(1.0), np.int64(1)]
    states = []
    for value in values:
        module.value = [value]
        states.append(PythonState(module))
    for i, one in enumerate(states):
        for j, two in enumerate(states):
            assert (one == two) == (i == j)
    module.value = [float("nan")]
    assert PythonState(module) == states[7]


def test_reading_changes_nothing() -> None:
    module = Everything()
    before = PythonState(module)
    assert module.cfg.loss.kl.beta == 0.0
    module.hparams.alpha, module.net(torch.zeros(1, 2)), next(iter(module.parameters()))  # type: ignore[attr-defined]
    assert before.difference(PythonState(module)) is None


def iterator() -> Any:
    yield from range(3)


def interpolated() -> Any:
    return OmegaConf.create({"home": "${oc.env:HOME}", "deep": [{"also": 1}]})


UNKNOWN: dict[str, Callable[[], Any]] = {
    "iterator": lambda: itertools.cycle([1]),
    "generator": iterator,
    "lock": threading.Lock,
    "file": lambda: Path(__file__).open(),  # noqa: SIM115
    "cached": lambda: functools.cache(lambda: 1),
    "large": lambda: list(range(20_000)),
    "many": lambda: [{"a": i} for i in range(20_000)],
    "array": lambda: np.zeros(1 << 20),
    "resolver": interpolated,
    "trainer": lambda: pl.callbacks.EarlyStopping("loss"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_cannot_be_opened_is_said(kind: str) -> None:
    module = nn.Module()
    module.value = UNKNOWN[kind]()
    before = PythonState(module)
    assert not before.complete
    assert before == PythonState(module)
    module.value = UNKNOWN[kind]()
    path = before.difference(PythonState(module))
    assert path is not None
    assert path.startswith("value")
    before.restore()
    assert before == PythonState(module)


def test_what_cannot_be_put_back_is_named_with_its_place() -> None:
    module: Any = nn.Module()
    module.cfg = {"feed": [3, (i for i in range(2))]}
    place = Place({"__name__": "mine", "stream": map(abs, ())}, "stream")
    assert PythonState(module, [place]).iterators == ["generator (cfg.feed[1])", "map (mine.stream)"]
    module.cfg = {"feed": [3, 4]}
    assert PythonState(module).iterators == []


@pytest.mark.parametrize("kind", ["large", "many", "array"])
def test_what_is_large_is_opened_for_a_proof(kind: str) -> None:
    module: Any = nn.Module()
    module.value = UNKNOWN[kind]()
    before = PythonState(module, exact=True)
    assert before.complete
    module.value[7] = 8.0
    assert before != PythonState(module, exact=True)
    before.restore()
    assert before == PythonState(module, exact=True)


def test_a_large_tensor_is_copied_once() -> None:
    module = nn.Module()
    module.table = torch.zeros(1 << 20)
    before, again = PythonState(module), PythonState(module)
    assert before == again
    copies = {id(state._nodes[1].held[0][1]._copy) for state in (before, again, PythonState(module, exact=True))}
    assert len(copies) == 1
    module.table[3] = 1.0
    assert before.difference(PythonState(module)) == "table"
    before.restore()
    assert module.table[3] == 0.0
    before = PythonState(module, exact=True)
    module.table.data[3] = 1.0
    assert before.difference(PythonState(module, exact=True)) == "table"
    before.restore()
    assert before == PythonState(module, exact=True)


@pytest.mark.parametrize("kind", ["parameter", "buffer", "submodule", "hook"])
def test_what_is_registered_is_put_back(kind: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    before, seen = PythonState(module), [name for name, _ in module.named_parameters()]
    match kind:
        case "parameter":
            module.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        case "buffer":
            module.register_buffer("extra", torch.zeros(1))
        case "submodule":
            module[0] = nn.Linear(2, 2)
        case "hook":
            module[0].register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    assert before != PythonState(module)
    before.restore()
    assert before == PythonState(module)
    assert seen == [name for name, _ in module.named_parameters()]
    assert not list(module.buffers())


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_count(hook: str) -> None:
    module = nn.Linear(2, 2)
    before = PythonState(module)
    getattr(module.weight, hook)(lambda gradient: None)
    one = before.again()
    assert before != one
    getattr(module.weight, hook)(lambda gradient: None)
    assert one != one.again()


def test_large_data_in_a_global_variable_is_watched_but_not_copied() -> None:
    data, small = torch.zeros(1 << 23), torch.zeros(1 << 15)
    variables = {"__name__": "mine", "data": data, "small": small, "count": 1}
    places = [Place(variables, name) for name in ("data", "small", "count", "later")]
    for exact in (False, True):
        state = PythonState(nn.Linear(1, 1), places, exact=exact)
        assert state == state.again()
        assert data not in values._copies
        for name, change in {
            "data": lambda: data.add_(1),
            "small": lambda: small.add_(1),
            "count": lambda: variables.update(count=2),
            "later": lambda: variables.update(later=[]),
        }.items():
            assert state.still_holds()
            change()
            assert state != state.again()
            assert state.difference(state.again()) == f"mine.{name}"
            state.restore()
            assert small.sum() == 0
            state = state.again()  # version counters do not go back
    assert variables.keys() == {"__name__", "data", "small", "count"}


DATA = torch.zeros(1 << 15)


def activation(x: Tensor) -> Tensor:
    return torch.relu(x)


class Reading(nn.Module):
    """Its methods name data, and call a function that names more."""

    def data(self) -> Tensor:
        return DATA

    def forward(self, x: Tensor) -> Tensor:
        return activation(x)


def test_variables_are_found_through_calls_and_nothing_large_is_copied_for_it() -> None:
    places = {place.name: place for place in places_of(Reading())}
    assert {"DATA", "activation", "torch"} <= places.keys()
    assert places["DATA"].value is DATA
    assert DATA not in values._copies


class Naming(nn.Module):
    """Names what installed packages have thousands of variables behind."""

    def forward(self, x: Tensor) -> Any:
        return activation(x), pd.DataFrame({"x": x}).groupby("x").mean(), sklearn.metrics.accuracy_score(x, x)


def test_what_installed_packages_call_is_left_out() -> None:
    """Seconds before the first wave, and two hundred milliseconds in every round, were spent on it."""
    module = Naming()
    places = places_of(module)
    assert {"activation", "pd", "sklearn", "DataFrame", "accuracy_score"} <= {place.name for place in places}
    assert len(places) < 12
    state = PythonState(module, places)
    assert state.complete
    assert len(state._outside._nodes) < 12
    assert state.again() is state


@pytest.mark.parametrize(("before", "after"), [(torch.relu, torch.sigmoid), (nn.ReLU, nn.GELU), (math, torch)])
def test_a_variable_that_refers_to_another_part_of_a_library_is_noticed_and_put_back(before: Any, after: Any) -> None:
    variables = {"__name__": "mine", "chosen": before}
    state = PythonState(nn.Linear(1, 1), [Place(variables, "chosen")])
    variables["chosen"] = after
    assert state != state.again()
    assert state.difference(state.again()) == "mine.chosen"
    state.restore()
    assert variables["chosen"] is before
    assert state == state.again()


def test_states_of_other_variables_differ() -> None:
    module, variables = nn.Linear(1, 1), {"__name__": "mine", "one": math, "two": math}
    assert PythonState(module, [Place(variables, "one")]) != PythonState(
        module, [Place(variables, n) for n in variables]
    )
