"""The vectorized executor: many clients in one batched step."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # `lightning_fedscale.executors.vectorized`, the old name of the module, is this package now. The import is
    # here, since importing another module of the package must not load the executor.
    if name == "VectorizedExecutor":
        from lightning_fedscale.core.executors.vectorized.executor import VectorizedExecutor

        return VectorizedExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
