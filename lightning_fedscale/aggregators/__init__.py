"""How the server turns many client updates into one pseudo-gradient."""

from lightning_fedscale.aggregators.base import Aggregator, by_name
from lightning_fedscale.aggregators.mean import mean

__all__ = ["Aggregator", "by_name", "mean"]
