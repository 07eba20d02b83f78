"""The geometric median, on which a distant update has bounded influence."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.coordinates import middle
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.aggregators.rows import distances_to
from lightning_fedscale.aggregators.stacked import Stack, stacked
from lightning_fedscale.types import Cohort
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def geometric_median(
    weighting: str = "uniform", smoothing: float = 1e-6, tolerance: float = 1e-6, iterations: int = 100
) -> Aggregator:
    r"""Take the point with the least weighted sum of distances to all updates (RFA, arXiv 1912.13445).

    It is computed by the paper's smoothed Weiszfeld iteration:

    .. math:: z \leftarrow \frac{\sum_k \beta_k \Delta_k}{\sum_k \beta_k}, \qquad
        \beta_k = \frac{w_k}{\max(\nu, \lVert z - \Delta_k \rVert)}

    Distances are over trainable parameters; the final weights apply to buffers too. The iteration starts at the
    coordinate-wise median, which attackers cannot move far away.

    **It tolerates attackers with less than half of the round's weight.** The paper weights by samples; the default here
    does not, since an attacker may claim any number of samples.

    Args:
        weighting: ``"uniform"`` gives all clients the same weight, ``"samples"`` weights by their number of samples.
        smoothing: the paper's :math:`\nu`, the least distance that is used in the weights.
        tolerance: stop when the point moves by less than this share of its median distance to the updates.
        iterations: maximum number of iterations.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if the weighting is unknown, or a number is not above 0.

    Example:
        >>> import torch
        >>> from lightning_fedscale.aggregators import aggregate
        >>> rows = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0], [1.0, 1.0], [1.0, 1.0], [1e9, 1e9]])
        >>> aggregate(geometric_median(), rows).round(decimals=3).tolist()  # the mean lies at 1.4e8
        [1.0, 1.0]
    """
    checks.positive("smoothing", smoothing)
    checks.positive("tolerance", tolerance)
    checks.integer("iterations", iterations)
    read = partial(_read, smoothing=smoothing, tolerance=tolerance, iterations=iterations)
    return stacked(mean(weighting).weigh, read)


def _read(stack: Stack, cohort: Cohort, *, smoothing: float, tolerance: float, iterations: int) -> Tensor:
    rows = stack.deltas[:, : stack.trainable]
    distances = distances_to(middle(rows), rows)
    # The median may coincide with an update, which would dominate the first step: there the nearer half count equally.
    shares = _shares(stack.weights, distances, max(smoothing, float(distances.median())))
    center = shares @ rows
    distances = distances_to(center, rows)
    for _ in range(iterations):
        shares = _shares(stack.weights, distances, smoothing)
        before, center = center, shares @ rows
        distances = distances_to(center, rows)
        # Unlike the paper's code, do not use the sum of distances: a distant update would make every step look small.
        if torch.dist(before, center) <= tolerance * distances.median():
            break
    return shares @ stack.deltas


def _shares(weights: Tensor, distances: Tensor, shortest: float) -> Tensor:
    shares = weights / distances.clamp(min=shortest)
    return shares.div_(shares.sum())
