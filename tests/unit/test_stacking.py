"""Batches of several clients as one: what can be opened comes back in its own type, what differs is never merged."""

from __future__ import annotations

import collections
import dataclasses
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_fedscale.core.executors.vectorized.stacking import NotVectorizable, opened, stacked


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Plain:
    x: Tensor
    name: str = "a"


@dataclasses.dataclass(frozen=True, slots=True)
class Sealed:
    x: Tensor
    count: int = 3


class Tokens(collections.UserDict[str, Any]):
    """Entries that can be read as attributes, as Hugging Face's tokenizers return them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Output(collections.OrderedDict[str, Any]):
    """Every entry is an attribute as well."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


class Rows(list[Any]):
    pass


class Graph:
    """Says its own name and counts what it is asked for; holds the same tensor twice."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.again = x, [x]

    def total(self) -> Tensor:
        return self.x.sum() + self.again[0].sum()


def output(x: Tensor) -> Output:
    made = Output()
    made["x"] = x
    return made


def by_default(x: Tensor) -> collections.defaultdict[str, list[Tensor]]:
    made: collections.defaultdict[str, list[Tensor]] = collections.defaultdict(list)
    made["x"].append(x)
    return made


KINDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda b: b),
    "tuple": (lambda x: (x, None), lambda b: b[0]),
    "named tuple": (lambda x: Pair(x, x), lambda b: b.x + 0 * b.y),
    "dict": (lambda x: {"a": {"x": x}, "id": "same"}, lambda b: b["a"]["x"]),
    "ordered dict": (lambda x: collections.OrderedDict(x=x), lambda b: b["x"]),
    "default dict": (by_default, lambda b: b["x"][0] + len(b["missing"])),
    "dict with attributes": (output, lambda b: b["x"] + 0 * b.x),
    "mapping": (lambda x: Tokens({"x": x}), lambda b: b.x + 0 * b["x"]),
    "proxy": (lambda x: types.MappingProxyType({"x": x}), lambda b: b["x"]),
    "list of its own kind": (lambda x: Rows([x]), lambda b: b[0]),
    "deque": (lambda x: collections.deque([x], maxlen=2), lambda b: b[0]),
    "dataclass": (Plain, lambda b: b.x),
    "frozen dataclass": (Sealed, lambda b: b.x),
    "namespace": (lambda x: types.SimpleNamespace(x=x), lambda b: b.x),
    "object": (Graph, lambda b: b.total() * b.x / (2 * b.x.sum())),
    "packed sequence": (lambda x: nn.utils.rnn.pack_sequence([x]), lambda b: b.data),
    "set of names": (lambda x: [x, {"a", "b"}], lambda b: b[0]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_client_finds_its_own_batch_in_its_own_type(kind: str) -> None:
    make, read = KINDS[kind]
    values = [torch.full((3,), float(client + 1)) for client in range(4)]
    batches = [make(value) for value in values]
    parts = [opened(batch) for batch in batches]
    assert len({part.signature for part in parts}) == 1
    whole = stacked(parts)
    for row, value in enumerate(values):
        batch = whole.close([tensor[row] for tensor in whole.tensors])
        assert type(batch) is type(batches[row])
        torch.testing.assert_close(read(batch), value)
    torch.testing.assert_close(read(batches[0]), values[0])  # what was opened is as it was


def test_what_appears_twice_appears_twice() -> None:
    batch = opened(Graph(torch.ones(2)))
    assert len(batch.tensors) == 1
    closed = batch.close([torch.zeros(2)])
    assert closed.again[0] is closed.x


def test_a_closed_batch_is_nobody_elses() -> None:
    whole = opened({"x": torch.ones(2), "list": [torch.ones(2)], "names": {"a"}})
    first = whole.close(whole.tensors)
    first.pop("x"), first["list"].clear(), first["names"].add("b")
    second = whole.close(whole.tensors)
    assert second.keys() == {"x", "list", "names"}
    assert len(second["list"]) == 1
    assert second["names"] == {"a"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2), (1, 1.0), (True, 1), ("a", "b"), (None, 0), (0.0, -0.0), ({"a"}, {"b"}), (Plain, Sealed),
        (torch.float32, torch.float64), (np.float32(1), np.float64(1)), (range(2), range(3)), (b"a", "a"),
    ],
)  # fmt: skip
def test_an_unequal_leaf_is_never_merged(one: object, other: object) -> None:
    batches = [opened({"x": torch.ones(2), "rest": [leaf]}) for leaf in (one, other)]
    if batches[0].signature == batches[1].signature:
        with pytest.raises(NotVectorizable, match=r"batch\['rest'\]\[0\] .* differs between clients"):
            stacked(batches)
    assert batches[0].guard() != batches[1].guard()


def test_not_a_number_is_itself() -> None:
    assert stacked([opened([torch.ones(1), float("nan")]) for _ in range(2)]).tensors[0].shape == (2, 1)


@pytest.mark.parametrize("other", [[torch.ones(3)], [torch.ones(2).double()], (torch.ones(2),), [torch.ones(2), 1]])
def test_other_shapes_types_and_lengths_are_another_form(other: Any) -> None:
    assert opened(other).signature != opened([torch.ones(2)]).signature


class Sub(Tensor):
    pass


def cyclic() -> list[Any]:
    batch: list[Any] = []
    batch.append(batch)
    return batch


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock, lambda: np.zeros(2), cyclic, lambda: nn.Linear(1, 1), lambda: torch.ones(2).to_sparse(),
        lambda: [].append, lambda: iter([1]), lambda: torch.ones(2).as_subclass(Sub),
        lambda: nn.Parameter(torch.ones(1)),
        lambda: torch.ones(1, requires_grad=True) * 2, lambda: {torch.ones(1)}, lambda: memoryview(b"a"), object,
    ],
)  # fmt: skip
def test_what_cannot_be_taken_apart_is_named(make: Callable[[], Any]) -> None:
    with pytest.raises(NotVectorizable, match=r"batch\['odd'\]"):
        opened({"x": torch.ones(2), "odd": make()})
