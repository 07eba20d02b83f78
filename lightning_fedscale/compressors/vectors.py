"""Updates as one vector, and rounding to float32 as in messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lightning_fedscale.types import FloatArray, Params

Float32Array: TypeAlias = npt.NDArray[np.float32]
_Real = TypeVar("_Real", np.float32, np.float64)

LARGEST = float(np.finfo(np.float32).max)


def size(params: Params) -> int:
    """Return the number of elements.

    Example:
        >>> size({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
        8
    """
    return sum(tensor.numel() for tensor in params.values())


def parts(params: Params) -> Iterator[slice]:
    """Yield the slice of each tensor in the vector."""
    start = 0
    for tensor in params.values():
        yield slice(start, start + tensor.numel())
        start += tensor.numel()


def flatten(params: Params, dtype: type[_Real]) -> npt.NDArray[_Real]:
    """Return a new vector of all elements, in the order of the mapping; see `rounded` for float32."""
    vector = np.empty(size(params), dtype)
    with np.errstate(over="ignore"):
        for part, tensor in zip(parts(params), params.values(), strict=True):
            vector[part].reshape(tensor.shape)[...] = tensor.detach().cpu().numpy()
    if dtype is np.float32:
        np.clip(vector, -LARGEST, LARGEST, out=vector)
    return vector


def unflatten(vector: npt.NDArray[np.float64] | Float32Array, like: Params) -> Params:
    """Cut the vector into float64 tensors with the names, shapes and devices of ``like``."""
    whole = torch.from_numpy(vector.astype(np.float64, copy=False))
    return {
        name: whole[part].view(tensor.shape).to(tensor.device)
        for part, (name, tensor) in zip(parts(like), like.items(), strict=True)
    }


def rounded(values: FloatArray) -> Float32Array:
    """Round to the nearest float32 numbers; those beyond float32's range become its largest.

    Example:
        >>> rounded(np.array([0.1, 1e300])).tolist()
        [0.10000000149011612, 3.4028234663852886e+38]
    """
    return np.clip(values, -LARGEST, LARGEST).astype(np.float32)


def at_least(value: float) -> np.float32:
    """Return the smallest float32 number that is not below ``value``, or else the largest finite one.

    Example:
        >>> float(at_least(0.1)) > 0.1, float(at_least(0.5))
        (True, 0.5)
    """
    near = np.float32(min(max(value, -LARGEST), LARGEST))
    # Compare Python numbers, since numpy would round the value to float32 first.
    return near if float(near) >= min(value, LARGEST) else np.nextafter(near, np.float32(np.inf))


def at_most(value: float) -> np.float32:
    """Return the largest float32 number that is not above ``value``, or else the smallest finite one."""
    return -at_least(-value)
