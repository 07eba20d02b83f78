"""The server of FedAvg, with and without momentum."""

from __future__ import annotations

from lightning_fedscale.server.base import ServerOptimizer
from lightning_fedscale.server.chain import chain
from lightning_fedscale.server.momentum import trace
from lightning_fedscale.server.scale import scale
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def fed_avg(lr: float = 1.0) -> ServerOptimizer:
    r"""Move by the aggregated delta: :math:`x \leftarrow x - \eta\,\Delta` (arXiv 1602.05629, 2003.00295).

    With ``lr=1`` and the weighted mean the new global model is the weighted mean of the client models.

    Args:
        lr: server learning rate, > 0.

    Raises:
        TypeError: if ``lr`` is not a number.
        ValueError: if ``lr`` is not positive and finite.

    Example:
        >>> import torch
        >>> server = fed_avg(lr=0.5)
        >>> params, delta = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
        >>> step, state = server.update(delta, server.init(params), params)
        >>> step["w"].tolist()
        [1.0]
    """
    return scale(checks.positive("lr", lr))


@record_call
def fed_avgm(lr: float = 1.0, momentum: float = 0.9, nesterov: bool = False) -> ServerOptimizer:
    r"""FedAvg with server momentum (arXiv 1909.06335): :math:`v \leftarrow \beta v + \Delta, x \leftarrow x - \eta v`.

    It equals ``chain(trace(momentum, nesterov), scale(lr))``. With momentum 0.9 steps grow up to tenfold, so ``lr`` may
    have to be smaller than 1.

    Args:
        lr: server learning rate, > 0.
        momentum: weight of earlier deltas, in [0, 1).
        nesterov: whether to step by :math:`\Delta + \beta v` instead of :math:`v`.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    Example:
        >>> import torch
        >>> server, params, delta = fed_avgm(lr=0.5), {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
        >>> step, state = server.update(delta, server.init(params), params)
        >>> step["w"].tolist(), server.update(delta, state, params)[0]["w"].tolist()  # 2 / 2, (0.9 * 2 + 2) / 2
        ([1.0], [1.899...])
    """
    return chain(trace(momentum, nesterov), scale(checks.positive("lr", lr)))


@record_call
def nesterov(lr: float = 0.7, momentum: float = 0.9) -> ServerOptimizer:
    r"""Outer optimizer of DiLoCo: :math:`v \leftarrow \beta v + \Delta,\; x \leftarrow x - \eta(\Delta + \beta v)`.

    It has the defaults of arXiv 2311.08105 and equals ``from_torch(SGD, lr=0.7, momentum=0.9, nesterov=True)``. DiLoCo
    combines it on the server with AdamW on the clients, which keep the optimizer's state:

        FederatedStrategy(num_clients=8, local_steps=500, aggregator="uniform", client_optimizer="keep",
                          server_optimizer=server.nesterov())

    Args:
        lr: server (outer) learning rate, > 0.
        momentum: weight of earlier deltas, in [0, 1).

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    Example:
        >>> import torch
        >>> server, params = nesterov(lr=1.0, momentum=0.5), {"w": torch.tensor([1.0])}
        >>> server.update({"w": torch.tensor([2.0])}, server.init(params), params)[0]["w"].tolist()
        [3.0]
    """
    return fed_avgm(lr, momentum, nesterov=True)
