"""How the clients of a rank train inside Lightning."""

from lightning_fedscale.executors.cache import DeviceData
from lightning_fedscale.executors.choice import Ballot, ExecutorChoice
from lightning_fedscale.executors.client_log import ClientLog
from lightning_fedscale.executors.exchange import Exchange, exchange_of
from lightning_fedscale.executors.hooks import LocalBatchHooks, RoundEnd, listeners
from lightning_fedscale.executors.loader import ClientLoader, RoundLoader
from lightning_fedscale.executors.loops import NoAccumulation, RoundLoops, close_finished_epoch
from lightning_fedscale.executors.sequential import LargestClient, RoundContext, SequentialExecutor
from lightning_fedscale.executors.transfer import Transfer
from lightning_fedscale.executors.vectorized import VectorizedExecutor

__all__ = [
    "Ballot",
    "ClientLoader",
    "ClientLog",
    "DeviceData",
    "Exchange",
    "ExecutorChoice",
    "LargestClient",
    "LocalBatchHooks",
    "NoAccumulation",
    "RoundContext",
    "RoundEnd",
    "RoundLoader",
    "RoundLoops",
    "SequentialExecutor",
    "Transfer",
    "VectorizedExecutor",
    "close_finished_epoch",
    "exchange_of",
    "listeners",
]
