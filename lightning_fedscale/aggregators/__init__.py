"""Aggregators, which turn many client updates into one pseudo-gradient."""

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.centered_clipping import centered_clipping
from lightning_fedscale.aggregators.coordinates import median, trimmed_mean
from lightning_fedscale.aggregators.geometric_median import geometric_median
from lightning_fedscale.aggregators.krum import krum, multi_krum
from lightning_fedscale.aggregators.mean import mean, weighted_sum
from lightning_fedscale.aggregators.norm_clipped import norm_clipped
from lightning_fedscale.aggregators.registry import FACTORIES, aggregator_of, by_name
from lightning_fedscale.aggregators.rows import aggregate
from lightning_fedscale.aggregators.stacked import Stack, stacked

__all__ = [
    "FACTORIES",
    "Aggregator",
    "Stack",
    "aggregate",
    "aggregator_of",
    "by_name",
    "centered_clipping",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "multi_krum",
    "norm_clipped",
    "stacked",
    "trimmed_mean",
    "weighted_sum",
]
