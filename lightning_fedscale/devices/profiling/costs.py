"""Floating-point operations and memory traffic of single operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import flop_counter

aten: Any = torch.ops.aten


class StepCost(NamedTuple):
    """The cost of one local step.

    Attributes:
        flops: floating-point operations of matrix products, convolutions, attention and recurrent layers; a multiply
            and an add count as two.
        bytes_moved: bytes that all its operators read and write, assuming no caches.
    """

    flops: float
    bytes_moved: float


def _convolution(result: Tensor, inputs: Tensor, weight: Tensor, *args: Any, transposed: bool | None = None) -> int:
    """Count one product with the whole weight per output position (per input position if transposed).

    The shapes already include groups, stride and dilation, so the gradients of input and weight cost the same each.
    """
    if transposed is None:
        transposed = len(args) > 4 and bool(args[4])
    places = inputs.shape[2:] if transposed else result.shape[2:]
    return 2 * inputs.shape[0] * math.prod(places) * weight.numel()


def _convolution_backward(result: Any, gradient: Tensor, inputs: Tensor, weight: Tensor, *args: Any) -> int:
    transposed, wanted = args[4], args[7]
    return _convolution(gradient, inputs, weight, transposed=transposed) * (bool(wanted[0]) + bool(wanted[1]))


def _convolution_in_time(result: Tensor, inputs: Tensor, weight: Tensor, *args: Any) -> int:
    return 2 * result.shape[0] * result.shape[1] * weight.numel()


def _convolution_in_time_backward(result: Any, gradient: Tensor, inputs: Tensor, weight: Tensor, *args: Any) -> int:
    return 2 * _convolution_in_time(gradient, inputs, weight)


def _attention(result: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    # Count the query's heads, of which several may share a key.
    return 2 * _scores(query, key) * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    result: Any, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    # Backward computes the scores again, then the gradients of values and scores, and those of queries and keys.
    return 2 * _scores(query, key) * (3 * query.shape[-1] + 2 * value.shape[-1])


def _scores(query: Tensor, key: Tensor) -> int:
    return math.prod(query.shape[:-1]) * key.shape[-2]


def _self_attention(result: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    # The operator has projections of queries, keys, values and results, and two products of all pairs.
    width, weights = int(args[0]), (args[2], args[4])
    return 2 * (query.numel() // width) * _numbers(weights) + 4 * _pairs(query) * width


def _transformer_layer(result: Any, inputs: Tensor, width: int, heads: int, *args: Any, **kwargs: Any) -> int:
    weights = args[0], args[2], args[11], args[13]
    return 2 * (inputs.numel() // width) * _numbers(weights) + 4 * _pairs(inputs) * width


def _numbers(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _pairs(sequences: Tensor) -> int:
    """Return the number of pairs of positions; each nested sequence has its own length."""
    if not sequences.is_nested:
        return sequences.shape[0] * sequences.shape[1] ** 2
    return sum(len(each) ** 2 for each in sequences.unbind())


def _recurrent(result: Any, inputs: Tensor, to_hidden: Tensor, within: Tensor, *args: Any, **kwargs: Any) -> int:
    # It computes the gates of all steps: each input and each hidden state times its matrix.
    steps = inputs.shape[0] * inputs.shape[1]
    return 2 * steps * (to_hidden.numel() + within.numel())


def _recurrent_backward(result: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _recurrent(result, *args)  # gradients of states and of matrices


def _layers(result: Any, inputs: Tensor, weights: list[Tensor], *args: Any, **kwargs: Any) -> int:
    # The operator has all layers and directions; packed sequences have no padding in their rows.
    rows = inputs.numel() // inputs.shape[-1]
    return 2 * rows * sum(weight.numel() for weight in weights if weight.ndim > 1)


def _layers_backward(result: Any, inputs: Tensor, weights: list[Tensor], *args: Any, **kwargs: Any) -> int:
    return 2 * _layers(result, inputs, weights)


def _matrix_product(result: Any, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    if left.layout != torch.strided:  # only the stored elements count
        return 2 * left._nnz() * right.shape[-1]
    if right.layout != torch.strided:
        return 2 * right._nnz() * left.shape[0]
    return 2 * left.numel() * right.shape[-1]


def _linear(result: Any, inputs: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * inputs.numel() * (weight.shape[0] if weight.ndim > 1 else 1)


def _added_product(result: Any, added: Tensor, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    return _matrix_product(result, left, right)


def _products_with_vector(result: Any, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * left.numel()


def _added_vector(result: Any, added: Tensor, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * left.numel()


def _outer(result: Any, added: Tensor, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * left.numel() * right.numel()


def _added_batch(result: Any, added: Tensor, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _trilinear(
    result: Any, one: Tensor, two: Tensor, three: Tensor, into_one: Any, into_two: Any, into_three: Any, *args: Any
) -> int:
    shapes: list[torch.Size] = []
    for tensor, places in ((one, into_one), (two, into_two), (three, into_three)):
        for place in places:
            tensor = tensor.unsqueeze(place)
        shapes.append(tensor.shape)
    return 2 * math.prod(int(max(sizes)) for sizes in zip(*shapes, strict=True))


_FUSED_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")

# torch does not count attention and LSTMs on a CPU, recurrent layers on CUDA, and products with vectors. It counts
# gradients of grouped convolutions as if they had no groups, and sparse matrices as if they were dense.
_OWN: dict[Any, Callable[..., int]] = {
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.conv_tbc: _convolution_in_time,
    aten.conv_tbc_backward: _convolution_in_time_backward,
    **{getattr(aten, f"_scaled_dot_product_{name}"): _attention for name in _FUSED_ATTENTION},
    **{getattr(aten, f"_scaled_dot_product_{name}_backward"): _attention_backward for name in _FUSED_ATTENTION},
    aten._native_multi_head_attention: _self_attention,
    aten._transformer_encoder_layer_fwd: _transformer_layer,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    aten._cudnn_rnn: _layers,
    aten._cudnn_rnn_backward: _layers_backward,
    aten.linear: _linear,
    aten.mm: _matrix_product,
    aten._sparse_mm: _matrix_product,
    aten.addmm: _added_product,
    aten._addmm_activation: _added_product,
    aten._sparse_addmm: _added_product,
    aten.mv: _products_with_vector,
    aten.dot: _products_with_vector,
    aten.vdot: _products_with_vector,
    aten.addmv: _added_vector,
    aten.addr: _outer,
    aten.addbmm: _added_batch,
    aten._trilinear: _trilinear,
}

# These operators read only the requested rows, not the whole table.
_LOOK_UPS = {aten.embedding, aten.index, aten.index_select, aten.gather}


def has_formula(operator: Any) -> bool:
    """Return whether the floating-point operations of an aten operator are known."""
    packet = operator._overloadpacket
    return packet in _OWN or packet in flop_counter.flop_registry


def flops_of(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the floating-point operations of one call of an aten operator; 0 for those that are not counted."""
    packet = operator._overloadpacket
    if (own := _OWN.get(packet)) is not None:
        return own(result, *args, **kwargs)
    if (known := flop_counter.flop_registry.get(packet)) is not None:
        return int(known(*args, **kwargs, out_val=result))
    return 0


def bytes_moved_by(operator: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> int:
    """Return the bytes that one call of an aten operator reads and writes; views move nothing."""
    if operator.is_view:
        return 0
    written = sum(map(_size, outputs))
    if operator._overloadpacket in _LOOK_UPS:
        return 2 * written
    return written + sum(map(_size, inputs))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
