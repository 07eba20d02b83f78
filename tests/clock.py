"""A clock that stands still: what a test asserts about time does not depend on the machine or on what else it does."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
import pytest

READERS = ("lightning_fedscale", "lightning", "pytorch_lightning")


class Clock:
    """Stands in for the module ``time``.

    Attributes:
        now: what every reading gives; a test moves it on.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def stop(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give one stopped clock to all modules of the package and of Lightning that read the time."""
    clock = Clock()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in READERS and vars(module).get("time") is time:
            monkeypatch.setattr(module, "time", clock)
    return clock


class Minutes(pl.Callback):
    """On whose clock every round takes a minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_batch_start(self, *args: object) -> None:
        self._clock.now += 60
