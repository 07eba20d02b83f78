"""Samplers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning_fedscale.samplers.availability import available, daily_cycle, drop_out
from lightning_fedscale.samplers.base import Sampler
from lightning_fedscale.samplers.uniform import poisson, round_robin, uniform
from lightning_fedscale.samplers.weighted import power_of_choice, weighted
from lightning_fedscale.utils import checks

FACTORIES: dict[str, Callable[..., Any]] = {
    "uniform": uniform,
    "poisson": poisson,
    "round_robin": round_robin,
    "weighted": weighted,
    "power_of_choice": power_of_choice,
    "available": available,
    "daily_cycle": daily_cycle,
    "drop_out": drop_out,
}
"""The samplers by name; those that take no arguments of their own are the sampler itself."""


def by_name(name: str) -> Sampler:
    """Return the sampler of this name.

    Raises:
        ValueError: for an unknown name, or one that cannot do without arguments.

    Example:
        >>> by_name("round_robin")(seed=0, round=1, num_clients=4, clients_per_round=2).tolist()
        [2, 3]
    """
    ready = {key: made for key, made in FACTORIES.items() if "round" in inspect.signature(made).parameters}
    if name in ready:
        sampler: Sampler = ready[name]
        return sampler
    others: Sampler = checks.named("sampler", name, FACTORIES)()
    return others
