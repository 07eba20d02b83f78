"""Compressors, which reduce the size of updates before they are sent."""

from lightning_fedscale.compressors.base import Compressor, Encoded
from lightning_fedscale.compressors.choice import adaptive, phase_driven
from lightning_fedscale.compressors.dense import identity
from lightning_fedscale.compressors.feedback import error_feedback
from lightning_fedscale.compressors.low_rank import power_sgd
from lightning_fedscale.compressors.quantize import qsgd, sign, uniform_quantization
from lightning_fedscale.compressors.registry import FACTORIES, WRAPPERS, by_name
from lightning_fedscale.compressors.sparse import random_k, top_k

__all__ = [
    "FACTORIES",
    "WRAPPERS",
    "Compressor",
    "Encoded",
    "adaptive",
    "by_name",
    "error_feedback",
    "identity",
    "phase_driven",
    "power_sgd",
    "qsgd",
    "random_k",
    "sign",
    "top_k",
    "uniform_quantization",
]
