"""Error feedback: the error of a message is added to the next one."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from lightning_fedscale.compressors.base import Compressor, Encoded, check_compressor
from lightning_fedscale.types import Params
from lightning_fedscale.utils.factory_repr import record_call

_State: TypeAlias = dict[str, Any]


@record_call
def error_feedback(compressor: Compressor) -> Compressor:
    r"""Send :math:`m = C(\Delta + e)` and keep :math:`e \leftarrow \Delta + e - m` (arXiv 1901.09847).

    All messages and the kept error together are the sum of all updates: nothing is lost, but some of it is late. This
    makes biased compressors, such as `top_k` and `sign`, converge. Clients must take part repeatedly: the error of a
    client that is never drawn again is lost.

    It costs each sender a float64 number per parameter. Messages are those of ``compressor``.

    Args:
        compressor: the compressor whose errors are kept. It must be contractive. Unbiased ones are not: their errors
            may be many times as long as the update and would grow without bound if fed back, while without feedback
            they average out. For ``random_k`` there is ``unbiased=False``; if you know that the errors of a quantizer
            are small, mark it: ``qsgd(4096)._replace(contractive=True)``.

    Raises:
        TypeError: if it is not a compressor.
        ValueError: if it is not contractive, or already keeps errors.

    Example:
        >>> import torch
        >>> from lightning_fedscale.compressors import top_k
        >>> rule, delta = error_feedback(top_k(k=1)), {"w": torch.tensor([3.0, 2.0], dtype=torch.float64)}
        >>> state = rule.init(delta)
        >>> for _ in range(2):
        ...     encoded, state = rule.encode(delta, state, np.random.default_rng(0))
        ...     print(encoded.seen["w"].tolist())
        [3.0, 0.0]
        [0.0, 4.0]
    """
    check_compressor("compressor", compressor)
    if compressor.keeps_error:
        raise ValueError(f"error_feedback({compressor.name}): it already keeps its errors: remove one error_feedback.")
    if not compressor.contractive:
        raise ValueError(
            f"error_feedback({compressor.name}): its errors can be larger than the update, so they would grow without"
            " bound; they average out without feedback: remove error_feedback"
            + (", or pass unbiased=False." if compressor.name.startswith("random_k") else ".")
        )
    return Compressor(
        f"error_feedback({compressor.name})",
        partial(_init, inner=compressor),
        partial(_encode, inner=compressor),
        compressor.decode,
        stateful=True,
        keeps_error=True,
        operations=compressor.operations + 2,  # the error is added, and the sent value is subtracted
    )


def _init(params: Params, *, inner: Compressor) -> _State:
    return {
        "error": {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in params.items()},
        "inner": inner.init(params),
    }


def _encode(
    delta: Params, state: _State, generator: np.random.Generator, *, inner: Compressor
) -> tuple[Encoded, _State]:
    wanted = {name: tensor + state["error"][name] for name, tensor in delta.items()}
    encoded, after = inner.encode(wanted, state["inner"], generator)
    error = {name: tensor.sub_(encoded.seen[name]) for name, tensor in wanted.items()}
    return encoded, {"error": error, "inner": after}
