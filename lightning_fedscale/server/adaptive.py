"""Adaptive server optimizers, with one learning rate per parameter (arXiv 2003.00295)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_fedscale.server.base import ServerOptimizer
from lightning_fedscale.server.chain import chain
from lightning_fedscale.server.per_parameter import Moments, per_parameter
from lightning_fedscale.server.scale import scale
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def fed_adagrad(lr: float = 0.01, beta1: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    r"""FedAdagrad (arXiv 2003.00295): :math:`x \leftarrow x - \eta\, m / (\sqrt v + \tau)`, where v is a sum.

    :math:`m \leftarrow \beta_1 m + (1 - \beta_1) \Delta`, :math:`v \leftarrow v + \Delta^2`. Use it if some
    parameters rarely change, such as the embeddings of rare words. It equals
    ``chain(scale_by_adagrad(beta1, tau), scale(lr))``.

    Args:
        lr: server learning rate, > 0: roughly how far a parameter moves in the first rounds. The default is only a
            starting point.
        beta1: weight of earlier deltas in :math:`m`, in [0, 1); the paper takes 0.
        tau: the degree of adaptivity, > 0; a smaller value adapts more. :math:`v` starts at :math:`\tau^2`.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    Example:
        >>> server, params = fed_adagrad(lr=1.0, tau=1.0), {"w": torch.tensor([0.0])}
        >>> server.update({"w": torch.tensor([2.0])}, server.init(params), params)[0]["w"]  # 2 / (sqrt(1 + 4) + 1)
        tensor([0.6180])
    """
    return chain(scale_by_adagrad(beta1, tau), scale(checks.positive("lr", lr)))


@record_call
def fed_adam(lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    r"""FedAdam (arXiv 2003.00295): :math:`x \leftarrow x - \eta\, m / (\sqrt v + \tau)`, where both are averages.

    :math:`m \leftarrow \beta_1 m + (1 - \beta_1) \Delta`, :math:`v \leftarrow \beta_2 v + (1 - \beta_2) \Delta^2`.
    As in the paper there is no bias correction; ``from_torch(torch.optim.Adam, lr=...)`` has one. It equals
    ``chain(scale_by_adam(beta1, beta2, tau), scale(lr))``.

    Args:
        lr: server learning rate, > 0: roughly how far a parameter moves in a round. The default is a starting point.
        beta1: weight of earlier deltas, in [0, 1).
        beta2: weight of earlier squared deltas, in [0, 1).
        tau: the degree of adaptivity, > 0; a smaller value adapts more. :math:`v` starts at :math:`\tau^2`.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    Example:
        >>> server, params = fed_adam(lr=1.0, beta1=0.5, beta2=0.5, tau=1.0), {"w": torch.tensor([0.0])}
        >>> server.update({"w": torch.tensor([1.0])}, server.init(params), params)[0]["w"]  # 0.5 / (sqrt(1) + 1)
        tensor([0.2500])
    """
    return chain(scale_by_adam(beta1, beta2, tau), scale(checks.positive("lr", lr)))


@record_call
def fed_yogi(lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    r"""FedYogi (arXiv 2003.00295): FedAdam whose :math:`v` changes by at most :math:`(1 - \beta_2) \Delta^2`.

    :math:`v \leftarrow v - (1 - \beta_2)\, \Delta^2 \operatorname{sign}(v - \Delta^2)`: it forgets a few large deltas
    more slowly than FedAdam. It equals ``chain(scale_by_yogi(beta1, beta2, tau), scale(lr))``.

    Args:
        lr: server learning rate, > 0: roughly how far a parameter moves in a round. The default is a starting point.
        beta1: weight of earlier deltas, in [0, 1).
        beta2: one minus the share of :math:`\Delta^2` by which :math:`v` changes, in [0, 1).
        tau: the degree of adaptivity, > 0; a smaller value adapts more. :math:`v` starts at :math:`\tau^2`.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    Example:
        >>> server, params = fed_yogi(lr=1.0, beta1=0.5, beta2=0.5, tau=1.0), {"w": torch.tensor([0.0])}
        >>> server.update({"w": torch.tensor([2.0])}, server.init(params), params)[0]["w"]  # 1 / (sqrt(1 + 2) + 1)
        tensor([0.3660])
    """
    return chain(scale_by_yogi(beta1, beta2, tau), scale(checks.positive("lr", lr)))


@record_call
def scale_by_adagrad(beta1: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    """`fed_adagrad` without the learning rate: a link of `chain`.

    Example:
        >>> rule, params = scale_by_adagrad(tau=1.0), {"w": torch.tensor([0.0])}
        >>> rule.update({"w": torch.tensor([2.0])}, rule.init(params), params)[0]["w"]
        tensor([0.6180])
    """
    return _adaptive("scale_by_adagrad", _sum, beta1, 0.0, tau)


@record_call
def scale_by_adam(beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """`fed_adam` without the learning rate: a link of `chain`.

    Example:
        >>> rule, params = scale_by_adam(beta1=0.5, beta2=0.5, tau=1.0), {"w": torch.tensor([0.0])}
        >>> rule.update({"w": torch.tensor([1.0])}, rule.init(params), params)[0]["w"]
        tensor([0.2500])
    """
    return _adaptive("scale_by_adam", _average, beta1, beta2, tau)


@record_call
def scale_by_yogi(beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """`fed_yogi` without the learning rate: a link of `chain`.

    Example:
        >>> rule, params = scale_by_yogi(beta1=0.5, beta2=0.5, tau=1.0), {"w": torch.tensor([0.0])}
        >>> rule.update({"w": torch.tensor([2.0])}, rule.init(params), params)[0]["w"]
        tensor([0.3660])
    """
    return _adaptive("scale_by_yogi", _approach, beta1, beta2, tau)


_Second = Callable[[Tensor, Tensor, float], Tensor]


def _adaptive(name: str, second: _Second, beta1: float, beta2: float, tau: float) -> ServerOptimizer:
    beta1 = checks.in_interval("beta1", beta1, 0.0, 1.0, closed_end=False)
    beta2 = checks.in_interval("beta2", beta2, 0.0, 1.0, closed_end=False)
    tau = checks.positive("tau", tau)
    update = partial(_update, second=second, beta1=beta1, beta2=beta2, tau=tau)
    return per_parameter(name, partial(_init, tau=tau), update, reads_params=False)


def _init(like: Tensor, *, tau: float) -> Moments:
    return {"first": torch.zeros_like(like), "second": torch.full_like(like, tau**2)}


def _update(
    delta: Tensor, state: Moments, *, second: _Second, beta1: float, beta2: float, tau: float
) -> tuple[Tensor, Moments]:
    m = beta1 * state["first"] + (1 - beta1) * delta
    v = second(state["second"], delta.square(), beta2)
    return m / (v.sqrt() + tau), {"first": m, "second": v}


def _sum(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    return v + square


def _average(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    return beta2 * v + (1 - beta2) * square


def _approach(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    return v - (1 - beta2) * square * (v - square).sign()
