"""Executors, which train the clients of a rank inside Lightning."""

from lightning_fedscale.core.executors.auto import ExecutorChoice, ExecutorTiming
from lightning_fedscale.core.executors.device_cache import DeviceData
from lightning_fedscale.core.executors.frozen_parameters import FrozenGuard, FrozenWritten, can_watch
from lightning_fedscale.core.executors.loader import ClientLoader, RoundLoader
from lightning_fedscale.core.executors.round_context import LargestClient, RoundContext
from lightning_fedscale.core.executors.sequential import SequentialExecutor
from lightning_fedscale.core.executors.shared_tensors import SharedTensors, shared_tensors_of
from lightning_fedscale.core.executors.transfer import Transfer
from lightning_fedscale.core.executors.vectorized.executor import VectorizedExecutor
from lightning_fedscale.core.lightning.client_log import ClientLog
from lightning_fedscale.core.lightning.hooks import LocalBatchHooks, RoundEnd, listeners

__all__ = [
    "ClientLoader",
    "ClientLog",
    "DeviceData",
    "ExecutorChoice",
    "ExecutorTiming",
    "FrozenGuard",
    "FrozenWritten",
    "LargestClient",
    "LocalBatchHooks",
    "RoundContext",
    "RoundEnd",
    "RoundLoader",
    "SequentialExecutor",
    "SharedTensors",
    "Transfer",
    "VectorizedExecutor",
    "can_watch",
    "listeners",
    "shared_tensors_of",
]
