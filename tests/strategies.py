"""The strategy as most tests want it."""

from __future__ import annotations

from typing import Any

from lightning_fedscale import FederatedStrategy


def sequential(*args: Any, **options: Any) -> FederatedStrategy:
    """One client after the other, whose bits can be told; `tests/laws/test_executors.py` compares the executors."""
    return FederatedStrategy(*args, **{"executor": "sequential", **options})
