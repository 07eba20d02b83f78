"""Speed on a device: rounds against the hand-written loop, launches, and what clients cost beside their steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import models, tasks
from benchmarks.contenders import BY_NAME
from benchmarks.contest import Turns
from benchmarks.gpu.laws import executor_of
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.record import Found, Record
from benchmarks.referee import compete
from lightning_fedscale import FederatedStrategy
from tests.laws import reference
from tests.networks import Classifier, images, resnet18, tokens

OURS = ("sequential", "vectorized", "auto")
AS_FAST = 1.1
""""auto" may take so much of the faster executor's time."""


class Race(NamedTuple):
    """A task, and the largest ratios to the loop that are expected of each executor; None for any."""

    recipe: tasks.Recipe
    sequential: float | None
    vectorized: float | None


def words(clients: int = 16, each: int = 32, length: int = 64, characters: int = 64) -> tasks.Data:
    """Made-up text in which each character is the one before it plus one, or any."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, characters, (clients * each + 64, length + 1))
    follows = rng.random(text.shape) < 0.5
    for at in range(1, length + 1):
        text[:, at] = np.where(follows[:, at], (text[:, at - 1] + 1) % characters, text[:, at])
    train, test = text[: clients * each], text[clients * each :]
    parts = tasks.iid(len(train), clients)
    return tasks.Data(train[:, :-1], train[:, 1:], parts, test[:, :-1], test[:, 1:], "made-up text")


def races() -> dict[str, Race]:
    """The tasks, the quickest first."""
    recipes, few = tasks.RECIPES, Turns(warm_up=3, number=5, rounds=2)
    gpt = tasks.Recipe(
        "GPU: transformer of 10 M parameters, 16 clients, batch 16", words,
        lambda data: ["transformer", 64, 64, 384, 6, 6], 0.1, 16, few, batch_size=16, device="cuda",
    )  # fmt: skip
    some: dict[str, Any] = {"data": lambda: tasks.images(test_samples=500), "turns": few}
    return {
        "digits-gpu": Race(recipes["digits-gpu"], 1.4, 0.4),
        "resnet-gpu": Race(recipes["resnet-gpu"]._replace(**some), 1.1, None),
        "gpt-gpu": Race(gpt, 1.05, 0.8),
        "cnn-gpu": Race(recipes["cnn-gpu"]._replace(**some), 1.2, 0.6),
    }


def run(record: Record, machine: Machine) -> None:
    """Run all checks of this part."""
    if machine.fast:
        small = tasks.RECIPES["digits"]._replace(turns=Turns(warm_up=1, number=2, rounds=1), device=machine.type)
        race(record, machine, "digits", Race(small, 1.4, 0.4), ("sequential",))
    else:
        for name, each in races().items():
            race(record, machine, name, each._replace(recipe=each.recipe._replace(device=machine.type)), OURS)
    for executor in OURS[:2]:
        record.check(f"launches of a round, {executor}", "", partial(launches, machine, executor))
    sizes = {"MLP": (Small, 0.001)} if machine.fast else {"ResNet18": (ResNet, 0.005), "GPT": (Gpt, 0.01)}
    for name, (sized, most) in sizes.items():
        record.check(
            f"cost of a client beside its steps, {name}", f"at most {1000 * most:.0f} ms",
            partial(of_a_client, machine, sized, most),
        )  # fmt: skip
    if machine.cuda:
        record.check("peak memory beyond plain training, ResNet18", "at most 26 bytes a parameter",
                     lambda: extra_memory(machine))  # fmt: skip
    else:
        record.skip("peak memory beyond plain training, ResNet18", "the CPU's allocator does not count")


def race(record: Record, machine: Machine, name: str, run: Race, ours: tuple[str, ...]) -> None:
    """Let the executors and the loop take turns, and add a row for each executor."""
    seconds: dict[str, float] = {}

    def compete_once() -> Found:
        prepared = tasks.prepare(name, run.recipe)
        contenders = [BY_NAME[each] for each in ("floor", *ours)]
        results = compete(prepared, contenders, 1, lambda text: None)
        if failures := {each: result.failure for each, result in results.items() if result.failure}:
            return Found(str(failures), False)
        seconds.update({each: result.medians[0] for each, result in results.items()})
        busy = {each: f"{result.utilisation[0]:.0%}" for each, result in results.items() if result.utilisation}
        return Found(f"loop {1000 * seconds['floor']:.1f} ms a round; busy {busy}" if busy else "all ran", True)

    record.check(f"{name}: all contenders run", "no failure", compete_once)
    expected = {"sequential": run.sequential, "vectorized": run.vectorized}
    if "auto" in seconds:
        faster = min(seconds["sequential"], seconds["vectorized"])
        expected["auto"] = AS_FAST * faster / seconds["floor"]
    for each in ours if seconds else ():
        ratio, bound = seconds[each] / seconds["floor"], expected[each]
        good = None if bound is None or not machine.cuda else ratio <= bound
        text = "" if bound is None else f"at most {bound:.2f}"
        record.check(f"{name}: {each} / loop", text, partial(Found, f"{ratio:.2f}", good))


# ---- a round, looked at closely


class Profiled(pl.Callback):
    """Profiles the third round."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        kinds = [ProfilerActivity.CUDA if machine.cuda else ProfilerActivity.CPU]
        self._profile = profile(activities=kinds)
        self.events: list[Any] = []
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin with the third round."""
        if trainer.global_step == 2:
            self._machine.wait()
            self._profile.start()
            self.seconds = -time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """End after it."""
        if trainer.global_step == 3:
            self._machine.wait()
            self.seconds += time.perf_counter()
            self._profile.stop()
            self.events = list(self._profile.events() or [])  # type: ignore[no-untyped-call]


def launches(machine: Machine, executor: Any) -> Found:
    """Kernels and copies of a round and the share of its time that they take; on a CPU its operators."""
    watch, clients = Profiled(machine), 4 if machine.fast else 100
    strategy = FederatedStrategy(partitioner=reference.equal_clients(clients, 20), executor=executor)
    trainer = machine.trainer(max_epochs=3, callbacks=[watch], strategy=strategy)
    trainer.fit(reference.make_module(), reference.loader(reference.dataset(20 * clients), 10))
    if not machine.cuda:
        return Found(f"{len(watch.events)} operators, {executor_of(trainer)}", bool(watch.events))
    kernels = [event for event in watch.events if event.device_type.name == "CUDA"]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6 / watch.seconds
    return Found(f"{len(kernels)} launches, device busy {busy:.0%}, {executor_of(trainer)}", len(kernels) > 0)


# ---- what a client costs


class Sized(NamedTuple):
    """A network, and batches for it."""

    network: Callable[[], nn.Module]
    batch: Callable[[int], Any]


ResNet = Sized(resnet18, images)
Small = Sized(lambda: models.mlp(64, 128, 10), lambda samples: (torch.randn(samples, 64), torch.arange(samples) % 10))
Gpt = Sized(lambda: Stacked(32_000, 64, 768, 12, 12), lambda samples: tokens(samples, 64, 32_000))


class Stacked(models.CharacterTransformer):
    """Gives classes in the last dimension."""

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return super().forward(characters).mT


class RoundSeconds(pl.Callback):
    """Seconds of each round."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.rounds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A round begins."""
        self._machine.wait()
        self.rounds.append(-time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        """A round is over."""
        self._machine.wait()
        self.rounds[-1] += time.perf_counter()


def of_a_client(machine: Machine, sized: Sized, most: float) -> Found:
    """Seconds of a client beside its steps: rounds of many clients against as many steps of one client."""
    clients, rounds = (3, 2) if machine.fast else (8, 6)
    took = {}
    for number, steps in ((clients, 1), (1, clients)):
        watch = RoundSeconds(machine)
        strategy = FederatedStrategy(partitioner=reference.equal_clients(number, 8 * steps), executor="sequential")
        module = Classifier(sized.network(), torch.optim.SGD, lr=0.01)
        trainer = machine.trainer(max_epochs=rounds, callbacks=[watch], strategy=strategy)
        trainer.fit(module, DataLoader(TensorDataset(*sized.batch(8 * clients)), 8))
        took[number] = statistics.median(watch.rounds[1:])
    each = (took[clients] - took[1]) / (clients - 1)
    size = sum(parameter.numel() for parameter in module.parameters())
    return Found(f"{1000 * each:.2f} ms, {size / 1e6:.1f} M parameters", each <= most if machine.cuda else None)


def extra_memory(machine: Machine) -> Found:
    """Peak memory of a federated run beyond that of plain training."""
    peaks, size = [], 0
    for options in ({}, {"strategy": FederatedStrategy(num_clients=2, executor="sequential")}):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        module = Classifier(resnet18(), torch.optim.SGD, lr=0.01)
        data = DataLoader(TensorDataset(*images(32)), 8)
        machine.trainer(max_epochs=2, **options).fit(module, data)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        size = sum(parameter.numel() for parameter in module.parameters())
    extra = (peaks[1] - peaks[0]) / size
    return Found(f"{extra:.1f} bytes a parameter", extra <= 26)
