"""How often the host waits for the device: per local batch, per client and per round."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from benchmarks.gpu.laws import Bench
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.record import Found, Record
from lightning_fedscale.local_rules import fed_prox
from tests.laws import reference

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (str(ROOT / "lightning_fedscale"), str(ROOT / "callbacks"))
WATCHED = 2
"""The round that is watched: the ones before it choose an executor and record steps."""


class Share(NamedTuple):
    """Waits of a round, divided among what causes them."""

    per_batch: float
    per_client: float
    per_round: float


class Waits(pl.Callback):
    """Counts the waits of one round by file and line of the package."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._watching: Any = None
        self.places = Counter[str]()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin with the watched round."""
        if trainer.global_step == WATCHED:
            self._machine.wait()
            self._watching = watching(self.places, self._machine)
            self._watching.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        """End after it."""
        if self._watching is not None:
            self._watching.__exit__(None, None, None)
            self._watching = None


@contextmanager
def watching(places: Counter[str], machine: Machine) -> Iterator[None]:
    """Count torch's warnings about waits inside the context by the place that caused them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            places[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if machine.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if machine.cuda:
                torch.cuda.set_sync_debug_mode("default")


def place() -> str:
    """File and line of the package's code that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(ROOMS):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def shares(count: Any) -> Share:
    """Solve for the causes from three rounds: some clients with some batches, more batches, more clients.

    Args:
        count: returns the waits of a round with so many clients of so many batches.
    """
    few, batches, clients = count(4, 5), count(4, 10), count(8, 5)
    per_batch = (batches - few) / 20
    per_client = (clients - few) / 4 - 5 * per_batch
    return Share(per_batch, per_client, few - 4 * per_client - 20 * per_batch)


def run(record: Record, machine: Machine) -> None:
    """Run all checks of this part."""
    if not machine.cuda:
        record.skip("waits", "a CPU waits for no device")
        return
    bench = Bench(machine)
    options: dict[str, Any] = {"executor": "sequential"}
    record.check("waits, sequential", "0 per local batch, at most 2 per client and 8 per round",
                 lambda: divided(bench, options, most=(0.0, 2.0, 8.0)))  # fmt: skip
    for name, rule in (("", {}), (", FedProx", {"local_rule": fed_prox(0.1)})):
        record.check(
            f"waits, vectorized{name}", "0 per step, at most 8 per round",
            partial(divided, bench, {"executor": "vectorized", **rule}, most=(0.0, 0.0, 8.0)),
        )  # fmt: skip


def divided(bench: Bench, options: dict[str, Any], most: tuple[float, float, float]) -> Found:
    """The waits of a round by cause, and the places of most of them."""
    places = Counter[str]()
    found = shares(lambda clients, batches: counted(bench, options, clients, batches, places))
    common = ", ".join(f"{number} {where}" for where, number in places.most_common(6))
    text = f"{found.per_batch:.2f} per batch, {found.per_client:.2f} per client, {found.per_round:.1f} per round"
    good = all(value <= bound + 1e-9 for value, bound in zip(found, most, strict=True))
    return Found(f"{text}; {common}", good)


def counted(bench: Bench, options: dict[str, Any], clients: int, batches: int, places: Counter[str]) -> int:
    """The waits of a round with so many equal clients of so many batches."""
    bench.samples = clients * batches * 8
    waits = Waits(bench.machine)
    options = {"partitioner": reference.equal_clients(clients, batches * 8), **options}
    bench.fit("mlp", options, max_epochs=WATCHED + 1, callbacks=[waits])
    places += waits.places
    return sum(waits.places.values())
