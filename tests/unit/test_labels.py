"""Labels of every kind of dataset, and what is said where there are none."""

from __future__ import annotations

import subprocess
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset, random_split

from lightning_fedscale.partitioners import NaturalIdPartitioner, find_labels, num_samples
from lightning_fedscale.partitioners.encoding import encode, encode_classes
from lightning_fedscale.partitioners.labels import class_names

property_test = settings(max_examples=40, deadline=None)


class Samples(Dataset[Any]):
    """Samples that can only be read one by one, and are counted."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        self.num_reads += 1
        return self.samples[i]


def tensors(labels: list[int]) -> TensorDataset:
    return TensorDataset(torch.zeros(len(labels), 2), torch.tensor(labels))


@pytest.mark.parametrize(
    "labels", [[2, 0, 1], (2, 0, 1), np.array([2, 0, 1]), torch.tensor([2, 0, 1]), range(2, -1, -1), ["c", "a", "b"]]
)
def test_label_arrays(labels: Any) -> None:
    expected = ["c", "a", "b"] if labels[0] == "c" else [2, 0, 1]
    if isinstance(labels, range):
        expected = [2, 1, 0]
    found = find_labels(labels)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == expected
    assert num_samples(labels) == 3


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_attribute_without_reading(name: str, make: Any) -> None:
    dataset = Samples([("x", 0)] * 3)
    setattr(dataset, name, make([5, 6, 7]))
    assert find_labels(dataset).tolist() == [5, 6, 7]
    assert find_labels(dataset, partition_by=name).tolist() == [5, 6, 7]
    assert dataset.num_reads == 0


def test_attribute_of_another_length_is_another_thing() -> None:
    dataset = Samples([("x", 4), ("x", 5)])
    dataset.targets = [0] * 10  # type: ignore[attr-defined]
    assert find_labels(dataset).tolist() == [4, 5]


def test_nested_subsets_and_concatenations() -> None:
    inner: ConcatDataset[tuple[torch.Tensor, ...]] = ConcatDataset(
        [tensors([0, 1, 2]), Subset(tensors([10, 11, 12, 13]), [3, 1])]
    )
    outer: ConcatDataset[tuple[torch.Tensor, ...]] = ConcatDataset([Subset(inner, [4, 0, 3]), tensors([7])])
    assert find_labels(inner).tolist() == [0, 1, 2, 13, 11]
    assert find_labels(outer).tolist() == [11, 0, 13, 7]


@property_test
@given(labels=st.lists(st.integers(0, 9), min_size=2, max_size=30), seed=st.integers(0, 9))
def test_random_split_agrees_with_reading(labels: list[int], seed: int) -> None:
    parts = random_split(tensors(labels), [0.5, 0.5], generator=torch.Generator().manual_seed(seed))
    for part in parts:
        if len(part):
            assert find_labels(part).tolist() == [int(part[i][-1]) for i in range(len(part))]


def test_a_subset_reads_only_its_own_samples() -> None:
    dataset = Samples([("x", i) for i in range(100)])
    assert find_labels(Subset(dataset, [7, 3])).tolist() == [7, 3]
    assert dataset.num_reads == 2
    half_known: ConcatDataset[Any] = ConcatDataset([tensors([1]), Samples([(0, torch.tensor(2))])])
    assert find_labels(half_known).tolist() == [1, 2]


@pytest.mark.parametrize("key", ["label", "labels", "target", "targets", "y"])
def test_dict_samples(key: str) -> None:
    dataset = Samples([{"x": 0, key: np.int64(3)}, {"x": 0, key: torch.tensor(4)}])
    assert find_labels(dataset).tolist() == [3, 4]
    assert find_labels(dataset, partition_by="x").tolist() == [0, 0]


def test_lists_of_samples_and_strings() -> None:
    assert find_labels([("image", 1), ("image", 0)]).tolist() == [1, 0]
    assert find_labels([{"y": "cat"}, {"y": "dog"}]).tolist() == ["cat", "dog"]
    assert find_labels(Samples([["x", "a"], ["x", "b"]])).tolist() == ["a", "b"]


class Pair(NamedTuple):
    y: Any
    user: str = "ann"


@dataclass
class Record:
    y: Any
    user: str = "ann"


class Slotted:
    __slots__ = ("user", "y")

    def __init__(self, y: Any, user: str = "ann") -> None:
        self.y, self.user = y, user


class Graph:
    """As graphs are in torch_geometric: named contents in a store, a length that counts them, None for what is not."""

    def __init__(self, **store: Any) -> None:
        self.store = store

    def keys(self) -> list[str]:
        return list(self.store)

    def __len__(self) -> int:
        return len(self.store)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "store":
            raise AttributeError(name)
        return self.store.get(name)

    def __getitem__(self, name: str) -> Any:
        return self.store[name]


class ByItem:
    """Names are items only, and none of them is listed."""

    def __init__(self, **store: Any) -> None:
        self._store = store

    def __getitem__(self, name: str) -> Any:
        return self._store[name]


KINDS: dict[str, Callable[..., Any]] = {
    "dict": lambda y: {"y": y, "user": "ann"},
    "user dict": lambda y: UserDict({"y": y, "user": "ann"}),
    "named tuple": Pair,
    "dataclass": Record,
    "namespace": lambda y: SimpleNamespace(y=y, user="ann"),
    "slots": Slotted,
    "graph": lambda y: Graph(x=np.zeros((5, 2)), y=y, user="ann"),
    "by item": lambda y: ByItem(y=y, user="ann"),
    "module": lambda y: SimpleNamespace(y=y, user="ann", forward=print),
}
VALUES: dict[str, Callable[[int], Any]] = {
    "int": int,
    "scalar tensor": torch.tensor,
    "tensor of one element": lambda y: torch.tensor([y]),
    "1 x 1 tensor": lambda y: torch.tensor([[y]]),
    "array of one element": lambda y: np.array([y]),
    "numpy scalar": np.int16,
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hold", [list, tuple, Samples])
def test_samples_with_that_item_or_attribute(kind: str, value: str, hold: Callable[[list[Any]], Any]) -> None:
    labels = [4, 0, 2, 0]
    dataset = hold([KINDS[kind](VALUES[value](y)) for y in labels])
    assert find_labels(dataset, "y").tolist() == labels
    assert find_labels(dataset, "user").tolist() == ["ann"] * 4
    assert find_labels(Subset(dataset, [2, 0]), "y").tolist() == [2, 4]
    by_label = NaturalIdPartitioner(partition_by="y")
    by_label.dataset = dataset
    assert [client.tolist() for client in map(by_label.load_partition, range(3))] == [[1, 3], [2], [0]]
    if kind != "named tuple":  # whose last entry is its label
        assert find_labels(dataset).tolist() == labels
    for key in ("writer", "keys" if kind != "dict" else "pop"):  # a method is no label
        with pytest.raises(ValueError, match=rf"partition_by='{key}'.*(one of its columns|an array of labels)"):
            find_labels(dataset, key)


def test_what_a_sample_lists_goes_before_what_its_kind_has() -> None:
    records = np.array([(7, 1.5), (8, 2.5)], dtype=[("size", "i8"), ("y", "f8")])
    assert find_labels(records, "size").tolist() == find_labels(Samples(list(records)), "size").tolist() == [7, 8]
    assert find_labels(records).tolist() == [1.5, 2.5]
    assert find_labels(Samples([Graph(user=None, y=1), Graph(user="bob", y=2)])).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"partition_by='user'.*sample 0.*one of \['user', 'y'\]"):
        find_labels(Samples([Graph(user=None, y=1), Graph(user="bob", y=2)]), "user")
    with pytest.raises(ValueError, match=r"label of sample 0 is a Tensor of shape \(2,\)"):
        find_labels(Samples([Graph(y=torch.zeros(2))]), "y")


def test_values_in_a_list_are_labels_whatever_attributes_they_have() -> None:
    days = [date(2024, 1, 1), date(2025, 1, 1)]
    for labels, key in ((days, "year"), ([1, 2], "real"), (["a", "b"], "upper"), ([UUID(int=1), UUID(int=2)], "hex")):
        assert find_labels(labels, key).tolist() == labels


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1)])
def test_columns_and_attributes_of_one_element_each(shape: tuple[int, ...]) -> None:
    targets = torch.tensor([5, 6, 7]).reshape(shape)
    dataset = Samples([("x", 0)] * 3)
    dataset.y = targets  # type: ignore[attr-defined]
    assert find_labels(dataset, "y").tolist() == [5, 6, 7]
    assert dataset.num_reads == 0
    assert find_labels(TensorDataset(torch.zeros(3, 2), targets)).tolist() == [5, 6, 7]


IDS, LABELS = ["eve", "bob", "eve", "ann"], [4, 0, 2, 0]
WITH_POSITIONS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: TensorDataset(torch.zeros(4, 2), torch.tensor([3, 1, 3, 0]), torch.tensor(LABELS)),
    "a column": lambda: TensorDataset(torch.zeros(4, 2), torch.tensor([[3], [1], [3], [0]]), torch.tensor(LABELS)),
    "list": lambda: [(0.5, name, label) for name, label in zip(IDS, LABELS, strict=True)],
    "tuples": lambda: Samples([(0.5, name, label) for name, label in zip(IDS, LABELS, strict=True)]),
    "lists": lambda: Samples([[0.5, torch.tensor(id), label] for id, label in zip([3, 1, 3, 0], LABELS, strict=True)]),
}


@pytest.mark.parametrize("kind", WITH_POSITIONS)
def test_entries_of_tuples_go_by_their_position(kind: str) -> None:
    dataset = WITH_POSITIONS[kind]()
    assert find_labels(dataset, "2").tolist() == find_labels(dataset, "-1").tolist() == LABELS
    ids = find_labels(dataset, "1").tolist()
    assert ids in (IDS, [3, 1, 3, 0])
    assert find_labels(Subset(dataset, [3, 0]), "-2").tolist() == [ids[3], ids[0]]
    assert find_labels(ConcatDataset([dataset, dataset]), "1").tolist() == ids * 2
    by_id = NaturalIdPartitioner("1")
    by_id.dataset = dataset
    assert [by_id.load_partition(client).tolist() for client in range(3)] == [[3], [1], [0, 2]]
    for beyond in ("3", "-4"):
        with pytest.raises(ValueError, match=rf"partition_by='{beyond}'.*pass the position .*'0' to '2'"):
            find_labels(dataset, beyond)


def test_a_column_of_that_name_goes_before_a_position() -> None:
    dataset = TensorDataset(torch.zeros(2), torch.tensor([8, 9]))
    setattr(dataset, "0", [1, 2])
    assert find_labels(dataset, "0").tolist() == [1, 2]
    assert find_labels(Samples([{"1": 5, "y": 6}]), "1").tolist() == [5]


def test_hugging_face_dataset() -> None:
    hf = pytest.importorskip("datasets")
    features = hf.Features({"text": hf.Value("string"), "label": hf.ClassLabel(names=["no", "yes", "maybe"])})
    dataset = hf.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    assert find_labels(dataset).tolist() == [1, 0, 1]
    assert find_labels(dataset, "text").tolist() == ["a", "b", "c"]
    assert find_labels(dataset.select([2, 1])).tolist() == [1, 0]
    assert find_labels(dataset.with_format("torch")).tolist() == [1, 0, 1]
    assert find_labels(Subset(dataset, [1])).tolist() == [0]
    assert class_names(dataset) == class_names(Subset(dataset, [1]), "label") == ["no", "yes", "maybe"]
    assert class_names(dataset, "text") is None
    with pytest.raises(ValueError, match=r"partition_by='user': .*\['text', 'label'\]"):
        find_labels(dataset, "user")
    with pytest.raises(ValueError, match=r"partition_by=None: .*no column label, labels"):
        find_labels(dataset.remove_columns("label"))
    with pytest.raises(TypeError, match=r"IterableDataset.*map-style"):
        find_labels(dataset.to_iterable_dataset())


def test_data_frame() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"x": [0.5, 1.5], "y": ["a", "b"]}, index=[7, 8])
    assert find_labels(frame).tolist() == ["a", "b"]
    assert find_labels(frame, "x").tolist() == [0.5, 1.5]


class Stream(IterableDataset[int]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter([0, 1, 2])


@pytest.mark.parametrize(
    ("dataset", "partition_by", "error", "message"),
    [
        (Stream(), None, TypeError, "Stream, .*__len__ or __getitem__: pass a map-style"),
        (iter([1, 2]), None, TypeError, "map-style"),
        (None, None, TypeError, "NoneType"),
        ({"x": [1], "y": [2]}, None, TypeError, "dataset is a dict"),
        ("cifar10", None, TypeError, "dataset is a str"),
        ([], None, ValueError, "list without samples"),
        (np.eye(3), None, ValueError, r"shape \(3, 3\) for 3 samples.*argmax\(axis=1\)"),
        (torch.zeros(3, 1), None, ValueError, r"shape \(3, 1\).*1-D array"),
        (TensorDataset(torch.zeros(3, 2)), None, ValueError, "sample 0, a tuple"),
        (TensorDataset(torch.zeros(3), torch.zeros(3, 5)), None, ValueError, r"shape \(3, 5\)"),
        (Samples([torch.zeros(2)]), None, ValueError, "partition_by=None: .*sample 0, a Tensor"),
        (Samples([(0, 1), (0, torch.zeros(2))]), None, ValueError, r"label of sample 1 is a Tensor of shape \(2,\)"),
        (Samples([(0, [1, 2])]), None, ValueError, "label of sample 0 is a list"),
        (Samples([(0, 1)]), "user", ValueError, "partition_by='user'.*a tuple, has no value"),
        (Samples([{"a": 1, "b": 2}]), "user", ValueError, r"partition_by='user': .*\['a', 'b'\]"),
        (Samples([{"a": 1, "b": 2}]), None, ValueError, r"partition_by=None: .*\['a', 'b'\]"),
        ([[1, 2], [3]], None, ValueError, "sample 1, a list"),
        ([0, 1], 7, TypeError, "partition_by=7: pass the name of a column"),
    ],
)
def test_errors_name_the_remedy(dataset: Any, partition_by: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_labels(dataset, partition_by)


def test_class_names_of_torchvision_like_datasets() -> None:
    dataset = Samples([("x", 0), ("x", 1)])
    dataset.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    assert class_names(ConcatDataset([Subset(dataset, [0])])) == ["cat", "dog"]
    assert class_names(dataset, "writer") is None


values = st.one_of(
    st.lists(st.integers(-5, 5), min_size=1),
    st.lists(st.integers(-(2**62), 2**62), min_size=1),
    st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=3), min_size=1),
    st.lists(st.booleans(), min_size=1),
    st.lists(st.floats(allow_nan=False), min_size=1),
)


@property_test
@given(values=values)
def test_encode_is_invertible_and_sorted(values: list[Any]) -> None:
    array = np.asarray(values)
    distinct, codes = encode(array)
    assert (distinct[codes] == array).all()
    assert distinct.tolist() == sorted(set(array.tolist()))
    assert distinct.dtype == array.dtype
    assert codes.dtype == np.int64


def test_encode_objects() -> None:
    ids = np.fromiter([("b", 1), "x", ("a", 2), 3, "x"], dtype=object)
    distinct, codes = encode(ids)
    assert distinct.tolist() == [3, "x", ("a", 2), ("b", 1)]
    assert codes.tolist() == [3, 1, 2, 0, 1]


def test_encode_unsigned_and_narrow_integers() -> None:
    assert encode(np.array([200, 0, 255], dtype=np.uint8))[1].tolist() == [1, 0, 2]
    assert encode(np.array([-128, 127] * 100, dtype=np.int8))[1].tolist() == [0, 1] * 100
    assert encode(np.array([2**64 - 1, 2**64 - 2], dtype=np.uint64))[1].tolist() == [1, 0]


def test_encode_refuses_what_is_no_class() -> None:
    with pytest.raises(ValueError, match="dtype float64, and this needs classes"):
        encode_classes(np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="sample 1 is missing"):
        encode(np.array([0.5, np.nan]))
    with pytest.raises(ValueError, match="sample 0 is missing"):
        encode(np.array([None, "a"], dtype=object))


def test_import_is_light() -> None:
    """The room needs NumPy only; the front door, which may import more, is replaced by an empty module here."""
    import lightning_fedscale.partitioners

    package = Path(lightning_fedscale.partitioners.__file__).parents[1]
    code = f"""
import sys, types
front_door = types.ModuleType("lightning_fedscale")
front_door.__path__ = [{str(package)!r}]
sys.modules["lightning_fedscale"] = front_door
import lightning_fedscale.partitioners as room
room.find_labels([0, 1])
print([name for name in ("torch", "pandas", "matplotlib", "datasets", "scipy", "lightning") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
