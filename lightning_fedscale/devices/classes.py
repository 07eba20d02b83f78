"""Kinds of hardware that clients run on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceClass:
    """A kind of device, by the figures that decide how large a batch it holds and how long a step takes it.

    Attributes:
        name: what it is called in populations, tables and logs.
        memory: bytes that training may use at most.
        flops: floating-point operations per second that it reaches.
        memory_bandwidth: bytes per second between its memory and its processor.
        up: bytes per second that it sends.
        down: bytes per second that it receives.
        latency: seconds before the first byte of a message arrives.
        availability: probability that a client of this class can be reached in a round, above 0 and at most 1.
        source: where the figures come from.
    """

    name: str
    memory: int
    flops: float
    memory_bandwidth: float
    up: float
    down: float
    latency: float = 0.0
    availability: float = 1.0
    source: str = ""
