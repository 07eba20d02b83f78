"""Federated learning for PyTorch Lightning: change one argument, ``Trainer(strategy=FederatedStrategy())``.

Importing this package also makes ``Trainer(strategy="federated")`` known. Everything else is imported when it is used,
so that scaling laws and the command ``fedscale`` start without torch and Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_fedscale.utils import late_imports, moved

if TYPE_CHECKING:
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
    from lightning_fedscale.local_rules import schedules
    from lightning_fedscale.partitioners import Partition
    from lightning_fedscale.server.asynchrony import FedBuff
    from lightning_fedscale.strategy import FederatedStrategy
    from lightning_fedscale.types import ClientUpdate, RoundRecord

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

_MODULES = (
    "aggregators", "attacks", "callbacks", "compressors", "core", "devices", "local_rules", "partitioners", "phases",
    "privacy", "samplers", "scaling", "server", "strategy", "study", "types",
)  # fmt: skip
_HOMES = {
    **dict(zip(_MODULES, _MODULES, strict=True)),
    "ClientUpdate": "types",
    "FedBuff": "server.asynchrony",
    "FederatedStrategy": "strategy",
    "Partition": "partitioners",
    "RoundRecord": "types",
    "schedules": "local_rules.schedules",
}

__getattr__, __dir__ = late_imports.exports(__name__, _HOMES)


def _federated(**arguments: Any) -> FederatedStrategy:
    from lightning_fedscale.strategy import FederatedStrategy  # only when needed, since Lightning is being imported

    return FederatedStrategy(**arguments)


def _register() -> None:
    """Make the strategy and its options known to Lightning and to its command line."""
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_fedscale.core.options import lightning_cli

    description = "One Trainer step is one federated round"
    StrategyRegistry.register("federated", _federated, description=description, override=True)  # of a reload
    lightning_cli.register()


def _import_strategy() -> None:
    """Make ``--trainer.strategy FederatedStrategy`` known: LightningCLI finds classes without a path if imported."""
    import_module(f"{__name__}.strategy")


moved.install()
late_imports.after_import("lightning.pytorch.strategies", _register)
late_imports.after_import("lightning.pytorch.cli", _import_strategy)
