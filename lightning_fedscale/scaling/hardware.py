"""What the devices of the clients allow: the memory for a batch, and the days of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lightning_fedscale.scaling.form import positive

ADAM_BYTES = 16
"""Bytes of a parameter with its gradient and Adam's two moments, in FP32 or mixed precision with a master copy."""
SENT_BYTES = 4
"""Bytes of a parameter that is sent."""
_DAY = 86_400.0


class Device(Protocol):
    """The part of a `lightning_fedscale.devices.DeviceClass` that a plan needs."""

    @property
    def name(self) -> str:
        """Name of the device class."""

    @property
    def memory(self) -> int:
        """Memory in bytes."""

    @property
    def flops(self) -> float:
        """Peak floating-point operations per second."""

    @property
    def up(self) -> float:
        """Uplink in bytes per second."""

    @property
    def down(self) -> float:
        """Downlink in bytes per second."""


class Hardware(NamedTuple):
    """The clients' devices; without any, there are no limits.

    Attributes:
        devices: device classes.
        utilization: fraction of their peak speed that training reaches.
        activation_bytes: bytes per token in the batch; None if they are not known.
    """

    devices: tuple[Device, ...] = ()
    utilization: float = 0.3
    activation_bytes: float | None = None

    @classmethod
    def of(cls, devices: Device | Sequence[Device], utilization: float, activation_bytes: float | None) -> Hardware:
        """Check the arguments of a plan.

        Raises:
            TypeError: for something that is no device class.
            ValueError: for a number outside its range.
        """
        if not 0 < utilization <= 1:
            raise ValueError(f"utilization={utilization!r}: pass a fraction of the device's peak speed, in (0, 1].")
        if activation_bytes is not None:
            positive("activation_bytes", activation_bytes)
        found = tuple(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else (devices,)
        for each in found:
            if not all(hasattr(each, name) for name in ("name", "memory", "flops", "up", "down")):
                raise TypeError(
                    f"device_class={each!r}: pass device classes, such as"
                    " lightning_fedscale.devices.device_class('phone')."
                )
        return cls(found, utilization, activation_bytes)

    def most_tokens(self, params: float) -> float | None:
        """Return the largest batch that fits into the smallest device, in tokens; None if that is not known."""
        if self.activation_bytes is None or not self.devices:
            return None
        return (min(each.memory for each in self.devices) - ADAM_BYTES * params) / self.activation_bytes

    def fits(self, params: float) -> bool | None:
        """Return whether a model and a batch of one token fit into all devices; None without devices."""
        needed = params * ADAM_BYTES + (self.activation_bytes or 0.0)
        return all(needed <= each.memory for each in self.devices) if self.devices else None

    def days(self, flops: float, params: float, rounds: float | None) -> float | None:
        """Return the days that the slowest device computes and communicates; None without devices.

        Args:
            flops: compute of one client.
            params: parameters that are sent and received in every round.
            rounds: number of rounds; None for none.
        """

        def seconds(device: Device) -> float:
            exchange = 0.0 if rounds is None else rounds * SENT_BYTES * params * (1.0 / device.up + 1.0 / device.down)
            return flops / (device.flops * self.utilization) + exchange

        return max(map(seconds, self.devices)) / _DAY if self.devices else None
