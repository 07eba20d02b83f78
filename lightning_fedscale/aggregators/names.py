"""All rules by name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_fedscale import checks
from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.coordinates import median, trimmed_mean
from lightning_fedscale.aggregators.geometric_median import geometric_median
from lightning_fedscale.aggregators.krum import krum, multi_krum
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.aggregators.norm_clipped import norm_clipped

FACTORIES: dict[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "norm_clipped": norm_clipped,
}
"""What makes each rule of this room; contract tests read it."""

_BY_NAME = {**FACTORIES, "uniform": lambda: mean("uniform")}


def by_name(name: str) -> Aggregator:
    """The aggregator that a string argument stands for: a rule that needs no argument of its own.

    Raises:
        ValueError: for another name, with the closest match; for a rule that needs arguments.

    Example:
        >>> by_name("unifrom")
        Traceback (most recent call last):
        ...
        ValueError: aggregator='unifrom' is not known. Did you mean 'uniform'? Known: 'mean', 'median', ...
    """
    rule: Aggregator = checks.named("aggregator", name, _BY_NAME)()
    return rule
