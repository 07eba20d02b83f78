"""How updates are made small before they are sent."""

from lightning_fedscale.compressors.base import Compressor, Encoded

__all__ = ["Compressor", "Encoded"]
