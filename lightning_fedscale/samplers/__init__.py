"""Samplers choose the clients of a round."""

from lightning_fedscale.samplers.availability import available, daily_cycle, drop_out
from lightning_fedscale.samplers.base import Sampler, reads_losses
from lightning_fedscale.samplers.registry import FACTORIES, by_name
from lightning_fedscale.samplers.uniform import poisson, round_robin, uniform
from lightning_fedscale.samplers.weighted import power_of_choice, weighted

__all__ = [
    "FACTORIES",
    "Sampler",
    "available",
    "by_name",
    "daily_cycle",
    "drop_out",
    "poisson",
    "power_of_choice",
    "reads_losses",
    "round_robin",
    "uniform",
    "weighted",
]
