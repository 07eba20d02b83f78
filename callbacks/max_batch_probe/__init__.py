"""`MaxBatchProbe`."""

from lightning_fedscale.callbacks.max_batch_probe.callback import MaxBatchProbe

__all__ = ["MaxBatchProbe"]
