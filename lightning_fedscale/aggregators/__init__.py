"""How the server turns many client updates into one pseudo-gradient."""

from lightning_fedscale.aggregators.base import Aggregator, by_name
from lightning_fedscale.aggregators.mean import mean, weighted_sum
from lightning_fedscale.aggregators.stacked import Stack, stacked

__all__ = ["Aggregator", "Stack", "by_name", "mean", "stacked", "weighted_sum"]
