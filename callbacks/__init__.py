"""Callbacks for federated training, imported as ``lightning_fedscale.callbacks``."""

from __future__ import annotations

if __name__ == "callbacks":
    raise ImportError("'callbacks' is a part of lightning_fedscale: import lightning_fedscale.callbacks instead")

from lightning_fedscale.callbacks.client_metrics.callback import ClientMetrics
from lightning_fedscale.callbacks.compute_accounting.callback import ComputeAccounting
from lightning_fedscale.callbacks.critical_phase.callback import CriticalPhase
from lightning_fedscale.callbacks.max_batch_probe.callback import MaxBatchProbe
from lightning_fedscale.callbacks.round_events import RoundEvents
from lightning_fedscale.callbacks.server_ema import ServerEMA

__all__ = ["ClientMetrics", "ComputeAccounting", "CriticalPhase", "MaxBatchProbe", "RoundEvents", "ServerEMA"]
