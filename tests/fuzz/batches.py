"""The forms that a batch may have, and how a step reads them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Columns(NamedTuple):
    """The samples of a batch; ``factor`` is what the step multiplies its loss with."""

    inputs: Tensor
    tokens: Tensor
    labels: Tensor
    factor: Any = 1.0


Pair = namedtuple("Pair", ["inputs", "rest"])


@dataclasses.dataclass
class Example:
    inputs: Tensor
    tokens: Tensor
    labels: Tensor
    note: str = "an example"


class Encoding(UserDict):
    """As tokenizers of Hugging Face return it."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any, **options: Any) -> Encoding:
        self.data = {key: value.to(device, **options) for key, value in self.data.items()}
        return self


class ReadOnly(Mapping[str, Any]):
    """A Mapping that is no dict and has no `to`."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Graph:
    """A class of a project's own, with tensors, a string and None in attributes."""

    def __init__(self, inputs: Tensor, tokens: Tensor, labels: Tensor) -> None:
        self.inputs, self.tokens, self.labels = inputs, tokens, labels
        self.name, self.nothing = "graph", None

    def to(self, device: Any, **options: Any) -> Graph:
        return Graph(self.inputs.to(device), self.tokens.to(device), self.labels.to(device))


class Slotted:
    __slots__ = ("inputs", "labels", "tokens")

    def __init__(self, *columns: Tensor) -> None:
        self.inputs, self.tokens, self.labels = columns


class MyList(list):
    """A list of a project's own."""


class MyDict(dict):
    """A dict of a project's own, with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _named(columns: Columns) -> dict[str, Tensor]:
    return {"inputs": columns.inputs, "tokens": columns.tokens, "labels": columns.labels}


def _by_name(batch: Any) -> Columns:
    return Columns(batch["inputs"], batch["tokens"], batch["labels"])


def _by_attribute(batch: Any) -> Columns:
    return Columns(batch.inputs, batch.tokens, batch.labels)


def _packed(columns: Columns) -> Any:
    lengths = (columns.tokens[:, 0] % 4 + 1).cpu()
    packed = pack_padded_sequence(columns.tokens + 1, lengths, batch_first=True, enforce_sorted=False)
    return columns.inputs, packed, columns.labels


def _unpacked(batch: Any) -> Columns:
    inputs, packed, labels = batch
    return Columns(inputs, (pad_packed_sequence(packed, batch_first=True)[0] - 1).clamp(min=0), labels)


def _times(number: float) -> Callable[[float], float]:
    return lambda value: value * number


class Form(NamedTuple):
    """How a batch is made of its samples, and read again."""

    pack: Callable[[Columns], Any]
    read: Callable[[Any], Columns]


FORMS: dict[str, Form] = {
    "tuple": Form(lambda c: (c.inputs, c.tokens, c.labels), lambda b: Columns(*b)),
    "list": Form(lambda c: [c.inputs, c.tokens, c.labels], lambda b: Columns(*b)),
    "dict": Form(_named, _by_name),
    "popped": Form(_named, lambda b: Columns(b["inputs"], b["tokens"], b.pop("labels"))),
    "nested": Form(
        lambda c: {"x": [c.inputs, (c.tokens,)], "y": {"labels": c.labels}},
        lambda b: Columns(b["x"][0], b["x"][1][0], b["y"]["labels"]),
    ),
    "namedtuple": Form(lambda c: Pair(c.inputs, (c.tokens, c.labels)), lambda b: Columns(b.inputs, *b.rest)),
    "dataclass": Form(lambda c: Example(c.inputs, c.tokens, c.labels), _by_attribute),
    "ordered_dict": Form(lambda c: OrderedDict(_named(c)), _by_name),
    "user_dict": Form(lambda c: UserDict(_named(c)), _by_name),
    "encoding": Form(lambda c: Encoding(_named(c)), _by_attribute),
    "mapping": Form(lambda c: ReadOnly(_named(c)), _by_name),
    "my_list": Form(lambda c: MyList([c.inputs, c.tokens, c.labels]), lambda b: Columns(*b)),
    "my_dict": Form(lambda c: MyDict(_named(c)), _by_attribute),
    "object": Form(lambda c: Graph(c.inputs, c.tokens, c.labels), _by_attribute),
    "object_in_dict": Form(
        lambda c: {"graph": Graph(c.inputs, c.tokens, c.labels)}, lambda b: _by_attribute(b["graph"])
    ),
    "namespace": Form(lambda c: SimpleNamespace(**_named(c)), _by_attribute),
    "slots": Form(lambda c: Slotted(c.inputs, c.tokens, c.labels), _by_attribute),
    "packed_sequence": Form(_packed, _unpacked),
    "with_none": Form(lambda c: {**_named(c), "nothing": None, "name": "fixed"}, _by_name),
    "with_strings": Form(
        lambda c: {**_named(c), "names": [f"class {label}" for label in c.labels.tolist()]},
        lambda b: _by_name(b)._replace(factor=1.0 + 0.1 * (b["names"][0] == "class 0")),
    ),
    "with_integer": Form(
        lambda c: (c.inputs, c.tokens, c.labels, int(c.tokens.max())),
        lambda b: Columns(*b[:3])._replace(factor=1.0 + 0.1 * b[3]),
    ),
    "with_float": Form(
        lambda c: (c.inputs, c.tokens, c.labels, float(c.inputs.mean())),
        lambda b: Columns(*b[:3])._replace(factor=1.0 + b[3] ** 2),
    ),
    "with_constant": Form(
        lambda c: (c.inputs, c.tokens, c.labels, 0.5), lambda b: Columns(*b[:3])._replace(factor=b[3])
    ),
    "with_bool": Form(
        lambda c: (c.inputs, c.tokens, c.labels, bool(c.inputs.sum() > 0)),
        lambda b: Columns(*b[:3])._replace(factor=1.5 if b[3] else 1.0),
    ),
    "with_array": Form(
        lambda c: {**_named(c), "weights": np.asarray(c.tokens[:, 0] % 3, dtype=np.float64)},
        lambda b: _by_name(b)._replace(factor=1.0 + float(b["weights"].mean())),
    ),
    "with_number": Form(
        lambda c: (c.inputs, c.tokens, c.labels, c.tokens.sum()),
        lambda b: Columns(*b[:3])._replace(factor=1.0 + 0.01 * b[3]),
    ),
    "with_mask": Form(
        lambda c: (c.inputs, c.tokens, c.labels, c.tokens > 4),
        lambda b: Columns(b[0], b[1].masked_fill(b[3], 1), b[2]),
    ),
    "with_function": Form(
        lambda c: (c.inputs, c.tokens, c.labels, _times(1 + 0.01 * float(c.labels.sum()))),
        lambda b: Columns(*b[:3])._replace(factor=b[3](1.0)),
    ),
    "various_lengths": Form(
        lambda c: (c.inputs, c.tokens[:, : 2 + int(c.labels[0]) % 3], c.labels), lambda b: Columns(*b)
    ),
    "keys_that_differ": Form(
        lambda c: {**_named(c), **({"extra": c.inputs} if c.inputs[0, 0] > 0 else {})},
        lambda b: _by_name(b)._replace(factor=1.5 if "extra" in b else 1.0),
    ),
    "sparse": Form(
        lambda c: (c.inputs.to_sparse(), c.tokens, c.labels), lambda b: Columns(b[0].to_dense(), b[1], b[2])
    ),
    "list_of_samples": Form(
        lambda c: [dict(zip(("inputs", "tokens", "labels"), row, strict=True)) for row in zip(*c[:3], strict=True)],
        lambda b: Columns(*(torch.stack([row[key] for row in b]) for key in ("inputs", "tokens", "labels"))),
    ),
}
