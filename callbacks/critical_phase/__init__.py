"""`CriticalPhase`."""

from lightning_fedscale.callbacks.critical_phase.callback import CriticalPhase

__all__ = ["CriticalPhase"]
