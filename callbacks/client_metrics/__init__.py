"""`ClientMetrics`."""

from lightning_fedscale.callbacks.client_metrics.callback import ClientMetrics

__all__ = ["ClientMetrics"]
