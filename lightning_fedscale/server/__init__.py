"""Server optimizers, which move the global model along the aggregated pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable

from lightning_fedscale.server.adaptive import (
    fed_adagrad,
    fed_adam,
    fed_yogi,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_yogi,
)
from lightning_fedscale.server.base import ServerOptimizer, follows_scale, own_decay
from lightning_fedscale.server.chain import chain
from lightning_fedscale.server.fed_avg import fed_avg, fed_avgm, nesterov
from lightning_fedscale.server.fed_exp import fed_exp
from lightning_fedscale.server.momentum import trace
from lightning_fedscale.server.per_parameter import per_parameter
from lightning_fedscale.server.scale import scale
from lightning_fedscale.server.scheduled import scheduled
from lightning_fedscale.server.torch_optimizer import from_torch
from lightning_fedscale.utils import checks

__all__ = [
    "FACTORIES",
    "ServerOptimizer",
    "by_name",
    "chain",
    "fed_adagrad",
    "fed_adam",
    "fed_avg",
    "fed_avgm",
    "fed_exp",
    "fed_yogi",
    "follows_scale",
    "from_torch",
    "nesterov",
    "own_decay",
    "per_parameter",
    "scale",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_yogi",
    "scheduled",
    "trace",
]

FACTORIES: dict[str, Callable[..., ServerOptimizer]] = {
    "fed_avg": fed_avg,
    "fed_avgm": fed_avgm,
    "fed_adagrad": fed_adagrad,
    "fed_adam": fed_adam,
    "fed_yogi": fed_yogi,
    "fed_exp": fed_exp,
    "nesterov": nesterov,
    "from_torch": from_torch,
    "chain": chain,
    "scheduled": scheduled,
}
"""The server optimizers by name; the contract tests and docs/papers.md have a row for each."""


def by_name(name: str) -> ServerOptimizer:
    """Return the server optimizer of this name, with its defaults.

    Raises:
        ValueError: if the name is unknown, or its optimizer needs arguments.

    Example:
        >>> by_name("fed_avgm").reads_norms
        False
    """
    optimizer: ServerOptimizer = checks.named("server_optimizer", name, FACTORIES)()
    return optimizer
