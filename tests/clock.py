"""The tests' own clock: nothing that a test finds depends on the machine or on what else the machine does."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_fedscale.core.executors.machine import BUILT_IN
from lightning_fedscale.core.executors.vectorized import executor

READERS = ("lightning_fedscale", "lightning.", "pytorch_lightning")


class Clock:
    """Stands in for the module ``time``: seconds are counted, not measured.

    Attributes:
        now: the time, which a test may move on.
        tick: what each reading moves it by; 0 stops it.
    """

    def __init__(self) -> None:
        self.now, self.tick = 0.0, 1e-3

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now

    monotonic = perf_counter

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def install(put: Callable[[Any, str, Any], None] = setattr) -> Clock:
    """Give one clock to all modules of the package and of Lightning that read the time."""
    clock = Clock()
    # On this clock nothing can be measured, and nothing measured on it may be kept in the user's cache.
    put(executor, "machine_of", lambda device: BUILT_IN[device.type])
    for module in _that_read_time(len(sys.modules)):
        put(module, "time", clock)
    return clock


@functools.lru_cache(maxsize=1)
def _that_read_time(modules: int) -> list[Any]:
    """Search thousands of modules again only once others were imported, as every test asks."""
    found = [module for name, module in list(sys.modules.items()) if name.startswith(READERS)]
    return [module for module in found if vars(module).get("time") is time]


class Minutes(pl.Callback):
    """On whose clock every round takes a minute, and nothing else takes any time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        clock.tick = 0.0

    def on_train_batch_start(self, *args: object) -> None:
        self._clock.now += 60
