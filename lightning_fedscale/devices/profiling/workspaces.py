"""Memory that operators keep for backward, if only the library below torch knows its size."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

_LSTM = torch.ops.aten.mkldnn_rnn_layer.default
_NUMBERS = 2**18  # hidden numbers in the layer that is run to measure the size
_PAGE = 4096


def with_workspace(operator: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Return a fake operator's result with workspaces as large as the real ones.

    With fake tensors the LSTM of oneDNN has an empty workspace, although this is most of the layer's memory.
    """
    if operator is not _LSTM or not isinstance(result[-1], FakeTensor):
        return result
    inputs, within = args[0], args[2]
    steps, samples, features = inputs.shape
    hidden = within.shape[1]
    how = tuple(tuple(value) if isinstance(value, list) else value for value in args[7:])
    few = max(8, _NUMBERS // (steps * hidden))
    if samples <= few:
        size = _lstm_bytes(steps, samples, features, hidden, inputs.dtype, how)
    else:  # a row of the workspace per sample
        less, more = (_lstm_bytes(steps, n, features, hidden, inputs.dtype, how) for n in (few // 2, few))
        size = math.ceil(more + (more - less) * (samples - few) / (few - few // 2))
    return (*result[:-1], result[-1].new_empty(math.ceil(size / _PAGE) * _PAGE))


@lru_cache(maxsize=256)
def _lstm_bytes(steps: int, samples: int, features: int, hidden: int, dtype: torch.dtype, how: Any) -> int:
    with unset_fake_temporarily(), _disable_current_modes(), torch.enable_grad():
        weights = [torch.zeros(4 * hidden, features, dtype=dtype), torch.zeros(4 * hidden, hidden, dtype=dtype)]
        weights += [torch.zeros(4 * hidden, dtype=dtype)] * 2
        state = torch.zeros(samples, hidden, dtype=dtype)
        workspace: Tensor = _LSTM(torch.zeros(steps, samples, features, dtype=dtype), *weights, state, state, *how)[-1]
    return workspace.untyped_storage().nbytes()
