"""Compressors by name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_fedscale.compressors.base import Compressor
from lightning_fedscale.compressors.choice import adaptive, phase_driven
from lightning_fedscale.compressors.dense import identity
from lightning_fedscale.compressors.feedback import error_feedback
from lightning_fedscale.compressors.low_rank import power_sgd
from lightning_fedscale.compressors.quantize import qsgd, sign, uniform_quantization
from lightning_fedscale.compressors.sparse import random_k, top_k
from lightning_fedscale.utils import checks

FACTORIES: dict[str, Callable[..., Compressor]] = {
    "identity": identity,
    "top_k": top_k,
    "random_k": random_k,
    "qsgd": qsgd,
    "sign": sign,
    "power_sgd": power_sgd,
    "uniform_quantization": uniform_quantization,
    "adaptive": adaptive,
}
"""The factories of compressors by name; none of them needs arguments."""

WRAPPERS: dict[str, Callable[..., Compressor]] = {"error_feedback": error_feedback, "phase_driven": phase_driven}
"""The factories that wrap other compressors, so that a name alone does not suffice."""


def by_name(name: str, argument: str = "compressor") -> Compressor:
    """Return the compressor of this name, with its default arguments.

    Args:
        name: one of `FACTORIES`.
        argument: name of the argument, for the message.

    Raises:
        ValueError: if the name is unknown (the message has the closest match), or one of `WRAPPERS`.

    Example:
        >>> by_name("top_k").name
        'top_k(0.01)'
        >>> by_name("topk")
        Traceback (most recent call last):
        ...
        ValueError: compressor='topk' is not known. Did you mean 'top_k'? Known: 'identity', 'top_k', ...
    """
    if name == "error_feedback":
        raise ValueError(
            f"{argument}={name!r} needs compressor: pass an object, compressors.{name}(compressors.top_k(0.1))."
        )
    compressor: Compressor = checks.named(argument, name, {**FACTORIES, **WRAPPERS})()
    return compressor
