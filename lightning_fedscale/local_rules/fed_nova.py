"""FedNova: clients with more steps do not count more."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from lightning_fedscale.local_rules.base import Correction, LocalRule, Merged, Outcome, Report
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def fed_nova(proximal: float = 0.0) -> LocalRule:
    r"""FedNova (arXiv 2007.07481): divide deltas by the clients' effective numbers of steps before averaging.

    If clients take unequal numbers of steps, as with ``local_epochs`` and unequal data, FedAvg converges to the optimum
    of another objective, in which clients are also weighted by their numbers of steps. FedNova steps by
    :math:`\tau_\mathrm{eff} \sum_k p_k \Delta_k / \|a_k\|_1`, where :math:`a_k` are the weights of the client's
    gradients in its delta. They are all 1 for plain SGD, so that :math:`\|a_k\|_1` is its number of steps; momentum and
    the proximal term are accounted for. :math:`\tau_\mathrm{eff} = \sum_k p_k \|a_k\|_1`, or the mean number of steps
    with a proximal term. The drift of many steps remains, in proportion to the learning rate.

    The paper's slow momentum is ``server.fed_avgm``; its clients reset their optimizer. It costs no memory and the
    communication of one number.

    Args:
        proximal: :math:`\mu` of FedProx's term, >= 0, added to the gradients; ``proximal * lr`` must be below 1.

    Raises:
        TypeError: if ``proximal`` is not a number.
        ValueError: if it is negative or not finite.

    Example:
        >>> import torch
        >>> outcome = Outcome(torch.tensor([0.6]), steps=3, lr=0.1, momentum=0.0)
        >>> report = fed_nova().finish(outcome, None, None)
        >>> outcome.delta, report.normalizer
        (tensor([0.2000]), 3.0)
    """
    mu = checks.positive("proximal", proximal) if proximal else 0.0
    return LocalRule(
        "fed_nova",
        _init,
        partial(_begin, mu=mu),
        partial(_finish, mu=mu),
        _merge,
        needs_sgd=True,
        instead="the same local_steps for all clients without it, or local_rules.fed_prox(mu=0.01)",
        knows_momentum=True,
        changes_delta=True,
    )


def way(steps: int, *, lr: float, momentum: float, mu: float) -> float:
    r"""Return :math:`\|a\|_1`: the distance of local SGD along a constant gradient of 1, in learning rates.

    Args:
        steps: optimizer steps.
        lr: learning rate.
        momentum: heavy-ball momentum, without dampening.
        mu: proximal term, which is a part of the optimizer's gradient.

    Example:
        >>> way(3, lr=0.1, momentum=0.0, mu=0.0), way(3, lr=0.1, momentum=0.5, mu=0.0)  # 1 + 1.5 + 1.75
        (3.0, 4.25)
    """
    velocity = distance = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1 - lr * mu * distance
        distance += velocity
    return distance


def _init(like: Tensor) -> None:
    return None


def _begin(client: Any, server: Any, *, mu: float) -> Correction:
    return Correction(proximal=mu)


def _finish(outcome: Outcome, client: Any, server: Any, *, mu: float) -> Report:
    length = way(outcome.steps, lr=outcome.lr, momentum=outcome.momentum, mu=mu)
    if length:  # else the gradient scaler has skipped all steps, and the delta is zero
        outcome.delta.div_(length)
    return Report(normalizer=float(outcome.steps) if mu else length)


def _merge(merged: Merged, server: Any) -> tuple[Tensor, Any]:
    return merged.delta.mul_(merged.normalizer), server
