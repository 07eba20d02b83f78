"""The vectorized executor: many clients in one batched step."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # For whoever imports it by the old name of its module; parts of this room must not load the executor.
    if name == "VectorizedExecutor":
        from lightning_fedscale.core.executors.vectorized.executor import VectorizedExecutor

        return VectorizedExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
