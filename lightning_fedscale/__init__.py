"""Federated learning for PyTorch Lightning: change one argument, ``Trainer(strategy=FederatedStrategy())``.

Importing this package also makes ``Trainer(strategy="federated")`` known.
"""

from importlib import import_module
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_fedscale import (
    aggregators,
    attacks,
    compressors,
    local_rules,
    partitioners,
    privacy,
    samplers,
    server,
)
from lightning_fedscale.core.options import lightning_cli as class_paths
from lightning_fedscale.local_rules import schedules
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.types import ClientUpdate, RoundRecord
from lightning_fedscale.utils import moved

__version__ = "0.1.0"
__all__ = [
    "ClientUpdate",
    "FedBuff",
    "FederatedStrategy",
    "Partition",
    "RoundRecord",
    "aggregators",
    "attacks",
    "compressors",
    "local_rules",
    "partitioners",
    "privacy",
    "samplers",
    "schedules",
    "server",
]

FederatedStrategy.register_strategies(StrategyRegistry)
class_paths.register()
moved.install()


def __getattr__(name: str) -> Any:
    """Import `scaling` only when it is used: it needs pandas, which takes long to import."""
    if name == "scaling":
        return import_module("lightning_fedscale.scaling")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
