"""Local rules by name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_fedscale.local_rules.base import LocalRule
from lightning_fedscale.local_rules.fed_dyn import fed_dyn
from lightning_fedscale.local_rules.fed_nova import fed_nova
from lightning_fedscale.local_rules.fed_prox import fed_prox
from lightning_fedscale.local_rules.scaffold import scaffold
from lightning_fedscale.utils import checks

FACTORIES: dict[str, Callable[..., LocalRule]] = {
    "fed_prox": fed_prox,
    "scaffold": scaffold,
    "fed_dyn": fed_dyn,
    "fed_nova": fed_nova,
}
"""The local rules by name; the contract tests and docs/papers.md have a row for each."""


def by_name(name: str) -> LocalRule:
    """Return the local rule of this name, with its defaults.

    Raises:
        ValueError: for an unknown name, or one that cannot do without arguments.

    Example:
        >>> by_name("scaffold").vectors_up
        2
    """
    rule: LocalRule = checks.named("local_rule", name, FACTORIES)()
    return rule
