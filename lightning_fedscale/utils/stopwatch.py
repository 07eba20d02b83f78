"""Times of work on a device, which runs later than it is launched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch

_Note = TypeVar("_Note")


class _Lap(NamedTuple):
    begun: Any
    ended: Any
    note: Any


class Stopwatch(Generic[_Note]):
    """Measures the seconds that a device spends on work; on a CPU, those of the host.

    A CUDA device is measured by events in its stream, which are read after it has passed them, so that nothing waits.

    Args:
        device: where the work is done.

    Example:
        >>> watch = Stopwatch[str](torch.device("cpu"))
        >>> watch.stop(watch.start(), "nothing")
        >>> [(note, seconds < 1.0) for note, seconds in watch.read()]
        [('nothing', True)]
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[_Lap] = []

    def start(self) -> Any:
        """Return the beginning of some work, for `stop`."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stop(self, begun: Any, note: _Note) -> None:
        """End the work that began there; `read` gives its seconds with this note."""
        self._laps.append(_Lap(begun, self.start(), note))

    def read(self, *, wait: bool = False) -> Iterator[tuple[_Note, float]]:
        """Yield notes and seconds of the work that has ended since the last call, in order.

        Args:
            wait: wait for work that the device has not finished.
        """
        while self._laps:
            begun, ended, note = self._laps[0]
            if self._device.type != "cuda":
                seconds = ended - begun
            elif ended.query() or wait:
                ended.synchronize()
                seconds = begun.elapsed_time(ended) / 1e3
            else:
                return
            del self._laps[0]
            yield note, seconds
