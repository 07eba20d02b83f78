"""The weighted mean of FedAvg."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.types import ClientUpdate, Cohort
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call
from lightning_fedscale.utils.flat_view import elements_at_once


@record_call
def mean(weighting: str = "samples") -> Aggregator:
    r"""Take FedAvg's mean, :math:`\Delta = \sum_k w_k \Delta_k / \sum_k w_k` (arXiv 1602.05629).

    Use it unless clients may be faulty or hostile. The sum is in float64 and its weights are integers, so for float32
    models with up to about 10^7 samples a round it is exact in nearly every element, and then does not depend on the
    order of clients or on the number of ranks.

    Args:
        weighting: ``"samples"`` weights clients by their number of samples, ``"uniform"`` gives all the same weight.

    Raises:
        ValueError: if the weighting is unknown.

    Example:
        >>> import numpy as np
        >>> rule, cohort = mean(), Cohort(0, np.arange(2), num_clients=2, trainable=1, seed=0)
        >>> total = rule.init(torch.zeros(1, dtype=torch.float64), cohort)
        >>> for size, delta in [(1, 0.0), (3, 4.0)]:
        ...     vector = torch.tensor([delta], dtype=torch.float64)
        ...     total = rule.accumulate(total, ClientUpdate(0, vector, delta, size, size, 1, 0.0, 0.0), size, cohort)
        >>> rule.finish(total, cohort).tolist()
        [3.0]
    """
    checks.one_of("weighting", weighting, ("samples", "uniform"))
    return Aggregator(partial(_weigh, by_samples=weighting == "samples"), _init, _accumulate, _finish)


def _weigh(update: ClientUpdate, *, by_samples: bool) -> float:
    return float(update.num_samples) if by_samples else 1.0


def _init(like: Tensor, cohort: Cohort) -> Tensor:
    # The last element is the sum of weights, which is reduced over the ranks with the rest.
    return torch.zeros(like.numel() + 1, dtype=like.dtype, device=like.device)


def _accumulate(total: Tensor, update: ClientUpdate, weight: float, cohort: Cohort) -> Tensor:
    most = elements_at_once(total.device)
    for elements, delta in update.parts():
        for start in range(0, len(delta), most):
            own = delta[start : start + most]
            first = elements.start + start
            # Do not use add_(alpha=...): whether it rounds once or twice depends on machine and position.
            total[first : first + len(own)].add_(weight * own)
    total[-1].add_(weight)
    return total


def _finish(total: Tensor, cohort: Cohort) -> Tensor:
    return total[:-1].div_(total[-1])


def weighted_sum(weigh: Callable[[ClientUpdate], float]) -> Aggregator:
    """Sum the weighted deltas without dividing, for callers that divide by a constant.

    Example:
        >>> weighted_sum(lambda update: 0.5).finish(torch.ones(2), None).tolist()
        [1.0, 1.0]
    """
    return Aggregator(weigh, _zeros, _add, _as_it_is)


def _zeros(like: Tensor, cohort: Cohort) -> Tensor:
    return torch.zeros_like(like)


def _add(total: Tensor, update: ClientUpdate, weight: float, cohort: Cohort) -> Tensor:
    return total.add_(weight * update.delta)


def _as_it_is(total: Tensor, cohort: Cohort) -> Tensor:
    return total
