"""Callbacks on a device: what they cost, and whether their FLOPs, joules and seconds are right."""

from __future__ import annotations

import importlib
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu.machine import Machine, Stopwatch
from benchmarks.gpu.record import Found, Record
from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ComputeAccounting, CriticalPhase, MaxBatchProbe
from lightning_fedscale.callbacks.compute_accounting.energy import EnergyMeter
from tests.networks import Classifier, images, mlp, resnet18, vectors

WARM_UP = 5


class Runs:
    """Trains ResNet18, or a small MLP to test the script."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.steps, self.turns, self.batch = (WARM_UP + 4, 1, 4) if machine.fast else (WARM_UP + 40, 3, 64)

    def fit(self, *callbacks: pl.Callback, machine: Machine | None = None, **options: Any) -> None:
        """Train for so many steps, or so many rounds of clients."""
        network, batch_of = (mlp, vectors) if self.machine.fast else (resnet18, images)
        torch.manual_seed(0)
        module = Classifier(network(), torch.optim.SGD, lr=0.01)
        # Two batches for clients, which would take long; else one epoch, of which the probe times the later steps.
        batches = 2 if "strategy" in options else self.steps
        data = DataLoader(TensorDataset(*batch_of(batches * self.batch)), self.batch)
        trainer = (machine or self.machine).trainer(
            **{"max_steps": self.steps, "callbacks": list(callbacks), **options}
        )
        trainer.fit(module, data)

    def seconds(self, *callbacks: pl.Callback, **options: Any) -> float:
        """Median seconds of a step, or of a round."""
        watch = Stopwatch(self.machine)
        self.fit(watch, *callbacks, **options)
        return statistics.median(watch.seconds(WARM_UP))


def run(record: Record, machine: Machine) -> None:
    """Run all checks of this part."""
    runs = Runs(machine)
    made: dict[str, tuple[Callable[[], pl.Callback], float]] = {
        "CriticalPhase": (CriticalPhase, 0.025),
        "ComputeAccounting": (lambda: ComputeAccounting(law=None, report=False), 0.005),
    }
    for name, (make, most) in made.items():
        for what in ("step", "round"):
            record.check(
                f"{name}: share of a {what}", f"at most {most:.1%}",
                partial(share, runs, make, what, most),
            )  # fmt: skip
    record.check("ComputeAccounting: FLOPs against the CPU's", "within 1 %", lambda: flops(runs))
    record.check("MaxBatchProbe: seconds of a step against the device's clock", "within 5 %", lambda: step_time(runs))
    if machine.cuda:
        record.check("ComputeAccounting: joules against mean power", "within 15 %", lambda: joules(runs))
    else:
        record.skip("ComputeAccounting: joules against mean power", "NVML is for NVIDIA's devices")


def share(runs: Runs, make: Callable[[], pl.Callback], what: str, most: float) -> Found:
    """What the callback adds to a step or to a round, in turns with and without it."""
    alone, watched = list[float](), list[float]()
    for _ in range(runs.turns):
        for times, callbacks in ((alone, []), (watched, [make()])):
            options = {"strategy": FederatedStrategy(num_clients=2, executor="sequential")} if what == "round" else {}
            times.append(runs.seconds(*callbacks, **options))
    added = statistics.median(watched) / statistics.median(alone) - 1
    return Found(
        f"{added:+.2%} of {1000 * statistics.median(alone):.2f} ms", added <= most if runs.machine.cuda else None
    )


def flops(runs: Runs) -> Found:
    """Counted FLOPs of a step here and on the CPU."""
    counted = []
    for machine in (runs.machine, Machine("cpu", runs.machine.fast)):
        accounting = ComputeAccounting(law=None, report=False)
        runs.fit(accounting, machine=machine, max_steps=1)
        counted.append(accounting.ledger.training_flops)
    ratio = counted[0] / counted[1]
    return Found(f"{ratio:.4f} of {counted[1]:.4g}", abs(ratio - 1) <= 0.01)


def step_time(runs: Runs) -> Found:
    """Seconds of a step by the probe, which the host measures, and by the device."""
    probe, watch = MaxBatchProbe(budget="8GiB", verify=False, apply=False), Stopwatch(runs.machine)
    runs.fit(probe, watch)
    fitted = probe.times.fit()
    ratio = (fitted.fixed + fitted.per_sample * runs.batch) / statistics.median(watch.seconds(WARM_UP))
    return Found(f"{ratio:.3f} of it", abs(ratio - 1) <= 0.05 if runs.machine.cuda else None)


def joules(runs: Runs) -> Found:
    """Joules of a run against its mean power times its seconds."""
    pynvml: Any = importlib.import_module("pynvml")  # not everywhere
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    pynvml.nvmlInit()
    handle, powers, over = pynvml.nvmlDeviceGetHandleByUUID(uuid), [], threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            powers.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)

    meter, begun, sampler = EnergyMeter(uuid, processor=False), time.perf_counter(), threading.Thread(target=sample)
    sampler.start()
    try:
        runs.fit(max_steps=10 * runs.steps, max_epochs=10)
    finally:
        over.set()
        sampler.join()
    spent, expected = meter.read(), statistics.mean(powers) * (time.perf_counter() - begun)
    if spent is None:
        return Found("nothing could be read", False)
    return Found(f"{spent:.0f} J, {spent / expected:.2f} of power x seconds", abs(spent / expected - 1) <= 0.15)
