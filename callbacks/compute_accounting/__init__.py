"""`ComputeAccounting`."""

from lightning_fedscale.callbacks.compute_accounting.callback import ComputeAccounting

__all__ = ["ComputeAccounting"]
