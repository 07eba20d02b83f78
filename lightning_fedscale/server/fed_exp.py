"""FedExP: the server takes longer steps if clients disagree."""

from __future__ import annotations

from functools import partial

from lightning_fedscale.server.base import ServerOptimizer
from lightning_fedscale.types import Params
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def fed_exp(epsilon: float = 1e-3) -> ServerOptimizer:
    r"""FedExP (arXiv 2301.09604): set the server learning rate by the clients' disagreement in each round.

    :math:`x \leftarrow x - \eta \bar\Delta` with
    :math:`\eta = \max\bigl(1, \sum_k p_k \|\Delta_k\|^2 / (2 (\|\bar\Delta\|^2 + \epsilon))\bigr)`: if clients move in
    different directions, their mean is short and the step is made longer. The only parameter is :math:`\epsilon`, which
    bounds the step when the mean vanishes. The last iterates oscillate around the optimum: the paper evaluates the mean
    of the last two; `lightning_fedscale.callbacks.ServerEMA` averages over more rounds for the same purpose.

    Args:
        epsilon: bound > 0, in units of a squared delta; the paper tries 0.001 to 0.1.

    Raises:
        TypeError: if ``epsilon`` is not a number.
        ValueError: if it is not positive and finite.

    Example:
        Two clients with deltas 3 and -1: the mean of squares is 5, the mean is 1.

        >>> import torch
        >>> server, params = fed_exp(epsilon=0.25), {"w": torch.tensor([0.0])}
        >>> server.update({"w": torch.tensor([1.0])}, server.init(params), params, 5.0)[0]["w"].tolist()
        [2.0]
    """
    update = partial(_update, epsilon=checks.positive("epsilon", epsilon))
    return ServerOptimizer(_init, update, reads_norms=True, reads_params=False)


def _init(params: Params) -> dict[str, object]:
    return {}


def _update(
    delta: Params, state: dict[str, object], params: Params, mean_square: float, *, epsilon: float
) -> tuple[Params, dict[str, object]]:
    square_of_mean = sum(float(value.square().sum()) for value in delta.values())
    lr = max(1.0, float(mean_square) / (2 * (square_of_mean + epsilon)))
    return {name: lr * value for name, value in delta.items()}, state
