"""Find the label of every sample of a dataset; the samples themselves are read only as the last resort."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from enum import Enum
from numbers import Number
from typing import Any, TypeAlias
from uuid import UUID

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners import checks
from lightning_fedscale.utils.foreign import attribute_of

Labels: TypeAlias = npt.NDArray[Any]

_ATTRIBUTES = ("targets", "labels")
_KEYS = ("label", "labels", "target", "targets", "y")
_VALUES = (str, bytes, Number, np.generic, date, Enum, UUID, type(None))
"""Types that are labels themselves, whatever attributes they have."""


def find_labels(dataset: Any, partition_by: str | None = None) -> Labels:
    """Return the labels of a dataset, one per sample, in the order of the samples.

    The first of these rules that applies is used:

    1. the dataset is itself a 1-D array, tensor or list of labels (then ``partition_by`` has no meaning);
    2. it has columns (Hugging Face ``datasets.Dataset``, a pandas DataFrame, a structured array): the column
       ``partition_by``;
    3. it is a torch ``Subset`` or ``ConcatDataset``: the labels of the datasets inside, at any depth;
    4. it has an attribute ``partition_by``, or ``targets``, ``labels``, or it is a ``TensorDataset``: the tensor at the
       position ``partition_by``, such as "2", or the last one if it is None;
    5. otherwise every sample is read once, with a progress bar: the item or attribute ``partition_by`` of a dict, named
       tuple, dataclass or graph; the entry of a tuple at that position, or the last one if it is None.

    Without ``partition_by``, the columns, items or attributes "label", "labels", "target", "targets", "y" are tried. A
    tensor or array of one element counts as its value.

    Args:
        dataset: labels, or a map-style dataset.
        partition_by: name of the column, item or attribute, or position in a tuple as a string: "0", "1", "-1".

    Raises:
        TypeError: the dataset is a stream (without a length), or not a dataset.
        ValueError: it is empty, it has no such labels, or a label is not a single value.

    Example:
        >>> find_labels([("image a", 7), ("image b", 3)])
        array([7, 3])
        >>> find_labels([("image a", "Ann", 7), ("image b", "Bob", 3)], partition_by="1").tolist()
        ['Ann', 'Bob']
        >>> from types import SimpleNamespace
        >>> find_labels([SimpleNamespace(x=0.5, y=np.array([7])), SimpleNamespace(x=0.1, y=np.array([3]))], "y")
        array([7, 3])
        >>> find_labels(["cat", "dog"]).tolist()
        ['cat', 'dog']
    """
    checks.column(partition_by)
    size = num_samples(dataset)
    labels = _look_up(dataset, partition_by)
    if labels is None:
        labels = _read(dataset, partition_by)
    if labels.ndim == 2 and labels.shape[1] > 1:
        remedy = "pass one label per sample, for one-hot rows labels.argmax(axis=1)."
    else:
        remedy = "pass one label per sample, a 1-D array."
    if labels.shape != (size,):
        raise ValueError(f"labels have shape {labels.shape} for {size} samples: {remedy}")
    return labels


def known_labels(dataset: Any, partition_by: str | None = None) -> Labels | None:
    """Return the labels if `find_labels` finds them without reading samples, else None.

    Example:
        >>> known_labels([("image a", 7), ("image b", 3)]) is None
        True
        >>> known_labels(["cat", "dog"]).tolist()
        ['cat', 'dog']
    """
    try:
        labels = _look_up(dataset, partition_by)
    except (TypeError, ValueError):
        return None
    return labels if labels is not None and labels.shape == (len(dataset),) else None


def num_samples(dataset: Any) -> int:
    """Return the length of a dataset.

    Raises:
        TypeError: it has no length, or its length does not count samples.
        ValueError: it is empty.

    Example:
        >>> num_samples([("image a", 7), ("image b", 3)])
        2
    """
    name = type(dataset).__name__
    if isinstance(dataset, (str, bytes, Mapping)):
        raise TypeError(f"dataset is a {name}: pass a map-style dataset, or a 1-D array of labels.")
    if _is_torch(dataset, "IterableDataset") or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"dataset is a {name}, which lacks __len__ or __getitem__: pass a map-style dataset, or a 1-D array of"
            " labels. Load a stream into one of these first."
        )
    size = len(dataset)
    if size == 0:
        raise ValueError(f"dataset is a {name} without samples: pass a dataset with at least one.")
    return size


def class_names(dataset: Any, partition_by: str | None = None) -> list[str] | None:
    """Return the names of the classes ``0, 1, 2, ...`` if the dataset has them.

    They come from a Hugging Face ``ClassLabel`` or from the attribute ``classes`` of torchvision's datasets.

    Example:
        >>> class_names([0, 1]) is None
        True
    """
    while _is_torch(dataset, "Subset"):
        dataset = dataset.dataset
    if _is_torch(dataset, "ConcatDataset"):
        return class_names(dataset.datasets[0], partition_by)
    features = attribute_of(dataset, "features")
    if isinstance(features, Mapping):
        key = partition_by or next((key for key in _KEYS if key in features), None)
        names = getattr(features.get(key), "names", None)
    else:
        names = attribute_of(dataset, "classes") if partition_by in (None, *_ATTRIBUTES) else None
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else None


def is_array(dataset: Any) -> bool:
    """Return whether this is an array, tensor or list (of labels or samples) rather than a dataset.

    Example:
        >>> is_array(["eve", "bob"])
        True
    """
    return isinstance(dataset, (np.ndarray, list, tuple, range)) or type(dataset).__module__ == "torch"


def _is_torch(dataset: Any, name: str) -> bool:
    # Torch datasets exist only after torch was imported, so this module need not import it.
    data = sys.modules.get("torch.utils.data")
    return data is not None and isinstance(dataset, getattr(data, name))


def _look_up(dataset: Any, key: str | None) -> Labels | None:
    """Find labels without reading samples; return None if this is impossible."""
    if (isinstance(dataset, np.ndarray) and not dataset.dtype.names) or type(dataset).__module__ == "torch":
        return _as_array(dataset)
    if isinstance(dataset, (list, tuple, range)):
        return None if _is_sample(dataset[0], key) else _as_array(dataset)
    names = _columns(dataset)
    if names is not None:
        return _column(dataset, _choose(key, names))
    if _is_torch(dataset, "Subset"):
        inner = _look_up(dataset.dataset, key)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    if _is_torch(dataset, "ConcatDataset"):
        parts = [_look_up(part, key) for part in dataset.datasets]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if len(found) == len(parts) else None
    return _attribute(dataset, key)


def _attribute(dataset: Any, key: str | None) -> Labels | None:
    for name in _ATTRIBUTES if key is None else (key,):
        value = attribute_of(dataset, name)
        # An attribute of another length is not the labels, or those of a dataset of which this one is a part.
        if value is not None and hasattr(value, "__len__") and len(value) == len(dataset):
            return _flat(_as_array(value))
    if _is_torch(dataset, "TensorDataset"):
        place = -1 if key is None and len(dataset.tensors) > 1 else _position(key, dataset.tensors)
        return None if place is None else _flat(_as_array(dataset.tensors[place]))
    return None


def _position(key: str | None, entries: Sequence[Any]) -> int | None:
    """Return the position that a name such as "1" denotes; None if it is not a valid position."""
    place = int(key) if key is not None and key.removeprefix("-").isdecimal() else len(entries)
    return place if -len(entries) <= place < len(entries) else None


def _columns(dataset: Any) -> list[str] | None:
    names = dataset.dtype.names if isinstance(dataset, np.ndarray) else attribute_of(dataset, "column_names")
    if names is None and attribute_of(dataset, "iloc") is not None:
        names = list(dataset.columns)
    return list(names) if isinstance(names, Sequence) else None


def _column(dataset: Any, name: str) -> Labels:
    if attribute_of(dataset, "with_format") is not None:
        # Whatever format (torch, images, ...) the user set, reading one column as NumPy decodes nothing else.
        dataset = dataset.select_columns([name]).with_format("numpy")
        return _flat(np.asarray(dataset[name][:]))
    return _flat(np.asarray(dataset[name]))


def _choose(key: str | None, names: Sequence[Any]) -> str:
    candidates = _KEYS if key is None else (key,)
    for candidate in candidates:
        if candidate in names:
            return candidate
    wanted = "has no such column" if key else f"has no column {', '.join(_KEYS)}"
    raise ValueError(f"partition_by={key!r}: the dataset {wanted}: pass the name of one of its columns, {list(names)}.")


def _read(dataset: Any, key: str | None) -> Labels:
    """Read every sample once for its label."""
    from tqdm import tqdm

    indices = tqdm(range(len(dataset)), desc="Reading labels", unit="sample", delay=1.0, leave=False)
    return _as_array([_label_of(dataset[i], i, key) for i in indices])


def _label_of(sample: Any, i: int, key: str | None) -> Any:
    name = type(sample).__name__
    if isinstance(sample, Mapping):
        label = sample[_choose(key, list(sample))]
    elif key is None and isinstance(sample, (tuple, list)) and len(sample) > 1:
        label = sample[-1]
    elif isinstance(sample, (tuple, list)) and (place := _position(key, sample)) is not None:
        label = sample[place]
    elif (label := _named(sample, key)) is None and key is not None:
        names = _names(sample)
        remedy = f"pass one of {names}"
        if not names:
            remedy = "pass None for the last entry of each sample"
            if isinstance(sample, (tuple, list)) and len(sample) > 1:
                remedy = f"pass the position of an entry, '0' to '{len(sample) - 1}', or None for the last"
        raise ValueError(
            f"partition_by={key!r}: sample {i}, a {name}, has no value of that name, and neither has the dataset:"
            f" {remedy}, or pass an array of labels as the dataset."
        )
    elif label is None:
        raise ValueError(
            f"partition_by=None: no label was found in sample {i}, a {name}: pass the name of its label, let samples be"
            " (input, label), or pass an array of labels as the dataset."
        )
    if hasattr(label, "item") and math.prod(getattr(label, "shape", ())) == 1:
        label = label.item()
    if not _is_scalar(label):
        shape = getattr(label, "shape", None)
        what = type(label).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
        raise ValueError(
            f"the label of sample {i} is a {what}, not a single value: pass an array of labels as the dataset."
        )
    return label


def _is_sample(entry: Any, key: str | None) -> bool:
    """Return whether an entry of a list has a label, rather than being one."""
    if isinstance(entry, _VALUES) or getattr(entry, "ndim", None) == 0:
        return False
    return isinstance(entry, (tuple, list, Mapping)) or key is not None or _named(entry, None) is not None


def _named(sample: Any, key: str | None) -> Any:
    """Return the item or attribute of that name, or of the first usual name; None if there is none."""
    items = _items(sample)
    for name in _KEYS if key is None else (key,):
        # Named items take precedence over attributes that all samples of the type have, such as `size`.
        value = sample[name] if name in items else attribute_of(sample, name)
        if value is None and not items and not hasattr(sample, "shape"):
            with suppress(Exception):
                value = sample[name]
        if value is not None and not callable(value):
            return value
    return None


def _items(sample: Any) -> list[Any]:
    """Return the names by which a sample other than a dict is indexed: a record, a row of a table, a graph."""
    names = attribute_of(attribute_of(sample, "dtype"), "names")
    if names is None and callable(keys := attribute_of(sample, "keys")):
        with suppress(Exception):
            names = list(keys())
    return list(names or ())


def _names(sample: Any) -> list[str]:
    """Return the names of a sample's items or fields, for a message."""
    fields = attribute_of(sample, "_fields") or attribute_of(sample, "__dict__") or ()
    return [str(name) for name in _items(sample) or fields if not str(name).startswith("_")]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or getattr(value, "ndim", None) == 0


def _flat(labels: Labels) -> Labels:
    """Return labels of one element each as a 1-D array, and others unchanged."""
    return labels.reshape(-1) if labels.ndim > 1 and labels.size == len(labels) else labels


def _as_array(values: Any) -> Labels:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"labels are not one value per sample ({error}): pass a 1-D array of labels.") from None
