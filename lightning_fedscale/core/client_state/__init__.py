"""The state of a client between its rounds: its position in its data, and what its training leaves behind."""

from lightning_fedscale.core.client_state.optimizers import OptimizerKeeper, OptimizerState
from lightning_fedscale.core.client_state.states import Files, Memory, PinnedMemory, StateStore, Tier, size_of, tiers_of
from lightning_fedscale.core.client_state.store import ClientStore

__all__ = [
    "ClientStore",
    "Files",
    "Memory",
    "OptimizerKeeper",
    "OptimizerState",
    "PinnedMemory",
    "StateStore",
    "Tier",
    "size_of",
    "tiers_of",
]
