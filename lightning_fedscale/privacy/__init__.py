"""Differential privacy of clients, its accounting, and secure aggregation."""

from lightning_fedscale.privacy.base import Privacy

__all__ = ["Privacy"]
