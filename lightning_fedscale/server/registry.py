"""Server optimizers by name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_fedscale.server.adaptive import fed_adagrad, fed_adam, fed_yogi
from lightning_fedscale.server.base import ServerOptimizer
from lightning_fedscale.server.chain import chain
from lightning_fedscale.server.fed_avg import fed_avg, fed_avgm, nesterov
from lightning_fedscale.server.fed_exp import fed_exp
from lightning_fedscale.server.scheduled import scheduled
from lightning_fedscale.server.torch_optimizer import from_torch
from lightning_fedscale.utils import checks

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
        ValueError: for an unknown name, or one that cannot do without arguments.

    Example:
        >>> by_name("fed_avgm").reads_norms
        False
    """
    optimizer: ServerOptimizer = checks.named("server_optimizer", name, FACTORIES)()
    return optimizer
