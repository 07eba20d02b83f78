"""Encode labels and ids of any kind as the numbers 0, 1, 2, ..."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_fedscale.partitioners.partition import IntArray


def encode(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], IntArray]:
    """Encode values as the positions of their distinct values in sorted order.

    Args:
        values: a 1-D array of integers, booleans, floats, strings, or any hashable objects.

    Returns:
        ``(distinct, codes)`` with ``distinct[codes] == values``.

    Raises:
        ValueError: a value is missing (None or NaN).

    Example:
        >>> distinct, codes = encode(np.array(["cat", "dog", "cat"]))
        >>> distinct.tolist(), codes.tolist()
        (['cat', 'dog'], [0, 1, 0])
    """
    _check_none_missing(values)
    if values.dtype.kind == "O":
        return _encode_objects(values)
    if values.dtype.kind in "iu" and values.size:
        low, high = int(values.min()), int(values.max())
        # Labels are usually small integers, for which counting is several times faster than sorting.
        if high - low < 4 * values.size and -(2**62) < low <= high < 2**62:
            shifted = values.astype(np.int64) - low  # Widened first: int8 labels -128 and 127 are 255 apart.
            present = np.bincount(shifted) > 0
            distinct = (np.flatnonzero(present) + low).astype(values.dtype)
            return distinct, (np.cumsum(present) - 1)[shifted]
    distinct, codes = np.unique(values, return_inverse=True)
    return distinct, codes.astype(np.int64, copy=False)


def encode_classes(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], IntArray]:
    """Encode classes like :func:`encode`, and reject labels that are not classes.

    Raises:
        ValueError: the labels are floats, complex numbers or dates.
    """
    if labels.dtype.kind in "fcmM":
        raise ValueError(
            f"labels have dtype {labels.dtype}, and this needs classes: pass integers or strings (labels.astype(int)),"
            " name another column with partition_by, or use ContinuousPartitioner for a real-valued target."
        )
    return encode(labels)


def _check_none_missing(values: npt.NDArray[Any]) -> None:
    if values.dtype.kind in "fc":
        missing = np.isnan(values)
    elif values.dtype.kind == "O":
        missing = np.fromiter((v is None or v != v for v in values), dtype=np.bool_, count=len(values))
    else:
        return
    if missing.any():
        i = int(np.argmax(missing))
        raise ValueError(
            f"the label or id of sample {i} is missing ({values[i]}): remove such samples, or give them one."
        )


def _encode_objects(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], IntArray]:
    # Sort by type first, so that ids of several types have an order too.
    ordered = sorted(set(values), key=lambda value: (type(value).__name__, value))
    code_of = {value: code for code, value in enumerate(ordered)}
    distinct = np.fromiter(ordered, dtype=object, count=len(ordered))
    return distinct, np.fromiter((code_of[value] for value in values), dtype=np.int64, count=len(values))
