"""A server learning rate."""

from __future__ import annotations

from functools import partial

from lightning_fedscale.server.base import ServerOptimizer
from lightning_fedscale.types import Params
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def scale(factor: float) -> ServerOptimizer:
    r"""Multiply the delta by a factor: :math:`\eta\,\Delta`. It is the last link of most chains; alone it is `fed_avg`.

    Args:
        factor: the server's learning rate, > 0.

    Raises:
        TypeError: if ``factor`` is not a number.
        ValueError: if it is not positive and finite.

    Example:
        >>> import torch
        >>> half, params = scale(0.5), {"w": torch.tensor([1.0])}
        >>> half.update({"w": torch.tensor([2.0])}, half.init(params), params)[0]["w"].tolist()
        [1.0]
    """
    return ServerOptimizer(_init, partial(_update, factor=checks.positive("factor", factor)), reads_params=False)


def _init(params: Params) -> dict[str, object]:
    return {}


def _update(
    delta: Params, state: dict[str, object], params: Params, *, factor: float
) -> tuple[Params, dict[str, object]]:
    return ({name: factor * value for name, value in delta.items()} if factor != 1 else delta), state
