"""Executors, which train the clients of a rank inside Lightning."""

from lightning_fedscale.core.executors.auto import ExecutorChoice, ExecutorTiming
from lightning_fedscale.core.executors.device_cache import DeviceData
from lightning_fedscale.core.executors.exchanged_tensors import Exchange, exchange_of
from lightning_fedscale.core.executors.loader import ClientLoader, RoundLoader
from lightning_fedscale.core.executors.sequential import LargestClient, RoundContext, SequentialExecutor
from lightning_fedscale.core.executors.transfer import Transfer
from lightning_fedscale.core.executors.vectorized.executor import VectorizedExecutor
from lightning_fedscale.core.lightning.client_log import ClientLog
from lightning_fedscale.core.lightning.hooks import LocalBatchHooks, RoundEnd, listeners

__all__ = [
    "ClientLoader",
    "ClientLog",
    "DeviceData",
    "Exchange",
    "ExecutorChoice",
    "ExecutorTiming",
    "LargestClient",
    "LocalBatchHooks",
    "RoundContext",
    "RoundEnd",
    "RoundLoader",
    "SequentialExecutor",
    "Transfer",
    "VectorizedExecutor",
    "exchange_of",
    "listeners",
]
