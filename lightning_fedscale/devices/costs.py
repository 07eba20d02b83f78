"""Floating-point operations and memory traffic of single operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import flop_counter

aten: Any = torch.ops.aten


class StepCost(NamedTuple):
    """What one local step costs.

    Attributes:
        flops: floating-point operations of matrix products, convolutions, attention and recurrent layers; a multiply
            and an add count as two.
        bytes_moved: bytes that all its operators read and write, nothing kept in caches.
    """

    flops: float
    bytes_moved: float


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    counted: int = flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return counted


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    shapes = gradient.shape, query.shape, key.shape, value.shape
    counted: int = flop_counter.sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return counted


def _recurrent(inputs: Tensor, to_hidden: Tensor, within: Tensor, *args: Any, **kwargs: Any) -> int:
    # The gates of all steps at once: each input and each hidden state times its matrix.
    steps = inputs.shape[0] * inputs.shape[1]
    return 2 * steps * (to_hidden.numel() + within.numel())


def _recurrent_backward(inputs: Tensor, to_hidden: Tensor, within: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _recurrent(inputs, to_hidden, within)  # with respect to states and to matrices


def _layers(inputs: Tensor, weights: list[Tensor], *args: Any, **kwargs: Any) -> int:
    # All layers and directions in one operator; packed sequences have no padding in their rows.
    rows = inputs.numel() // inputs.shape[-1]
    return 2 * rows * sum(weight.numel() for weight in weights if weight.ndim > 1)


def _layers_backward(inputs: Tensor, weights: list[Tensor], *args: Any, **kwargs: Any) -> int:
    return 2 * _layers(inputs, weights)


# torch counts neither attention nor LSTMs on a CPU, and no recurrent layers on CUDA.
_OWN: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    aten._cudnn_rnn: _layers,
    aten._cudnn_rnn_backward: _layers_backward,
}

# They read the rows that they are asked for, not the whole table.
_LOOK_UPS = {aten.embedding, aten.index, aten.index_select, aten.gather}


def flops_of(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Floating-point operations of one call of an aten operator; 0 for those that are not counted."""
    packet = operator._overloadpacket
    if (own := _OWN.get(packet)) is not None:
        return own(*args, **kwargs)
    if (known := flop_counter.flop_registry.get(packet)) is not None:
        return int(known(*args, **kwargs, out_val=result))
    return 0


def bytes_moved_by(operator: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> int:
    """Bytes that one call of an aten operator reads and writes; views move nothing."""
    if operator.is_view:
        return 0
    written = sum(map(_size, outputs))
    if operator._overloadpacket in _LOOK_UPS:
        return 2 * written
    return written + sum(map(_size, inputs))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
