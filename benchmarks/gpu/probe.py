"""The batch probe on a device: found batches against the truth, and the memory that training takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu.laws import executor_of
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.record import Found, Record
from benchmarks.probe import Project, Setting, dry_run, in_child, limited, trainer, truth
from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import MaxBatchProbe
from tests.networks import KINDS, Classifier, vectors

BOUNDS = {0.02: (0.95, 1.0), 0.1: (0.85, 0.92)}
"""Of found / truth, by headroom."""
KEPT = 24
"""Bytes per parameter that the strategy may keep between rounds."""


def run(record: Record, machine: Machine) -> None:
    """Run all checks of this part."""
    if machine.cuda:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # children cannot be forked: see `in_child`
    kinds = ["mlp"] if machine.fast else list(KINDS)
    for precision in ("32-true", "bf16-mixed") if machine.cuda else ("32-true",):
        for kind in kinds:
            setting = Setting(kind, machine.type, 2**31 if machine.cuda else 2**27, precision)
            record.check(
                f"probe: {setting.model}", "found / truth 0.95 to 1.00, with 10 % headroom 0.85 to 0.92",
                partial(of_the_truth, setting),
            )  # fmt: skip
    for kind in kinds:
        name = f"memory of federated training with the found batch: {kind}"
        if machine.cuda:
            record.check(name, "at most the budget", partial(peak, machine, kind, 2**31))
        else:
            record.skip(name, "the CPU's allocator does not count")
    if machine.cuda:
        record.check("memory after auto chose sequential", f"at most {KEPT} bytes a parameter",
                     lambda: kept(machine))  # fmt: skip
    else:
        record.skip("memory after auto chose sequential", "the CPU's allocator does not count")


def of_the_truth(setting: Setting) -> Found:
    """Found batches over the largest that fits, by bisection under a real limit."""
    results = {headroom: in_child(found, setting, headroom) for headroom in BOUNDS}
    step_of = dry_run(setting).real_step
    with limited(setting):
        true = truth(setting, results[0.02].max_batch, step_of, exact=0.005).batch
    assert true is not None
    ratios = {headroom: result.max_batch / true for headroom, result in results.items()}
    # One sample more or less is no error of the probe.
    good = all(low - 1 / true <= ratios[headroom] <= high for headroom, (low, high) in BOUNDS.items())
    tried = [(result.real_steps, result.out_of_memory) for result in results.values()]
    good = good and all(steps <= 2 and not failed for steps, failed in tried)
    batches = ", ".join(f"{ratio:.3f} at {headroom:.0%} headroom" for headroom, ratio in ratios.items())
    return Found(
        f"{batches}; truth {true}; real steps, out of memory: {tried}", good if setting.device == "cuda" else None
    )


def found(setting: Setting, headroom: float) -> Any:
    """What the callback finds."""
    probe = MaxBatchProbe(budget=setting.budget, headroom=headroom, verify=setting.device == "cuda", apply=False)
    trainer(setting, probe).fit(Project(setting.kind))
    return probe.result


class Allocated(pl.Callback):
    """Bytes on the device at the start of each round, and the most from then on."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A round begins."""
        if not self.starts:
            torch.cuda.reset_peak_memory_stats()
        self.starts.append(torch.cuda.memory_allocated())


def peak(machine: Machine, kind: str, budget: int) -> Found:
    """Peak of the federated training that follows the probe, over the budget."""
    before, allocated = torch.cuda.memory_allocated(), Allocated()
    probe = MaxBatchProbe(budget=budget, headroom=0.1, max_samples=2**16)
    strategy = FederatedStrategy(num_clients=2, executor="sequential", local_steps=2, cache_dataset=False)
    machine.trainer(max_steps=2, callbacks=[probe, allocated], strategy=strategy).fit(Project(kind))
    taken = (torch.cuda.max_memory_allocated() - before) / budget
    assert probe.result is not None
    return Found(f"{taken:.3f} of the budget, batch {probe.result.max_batch}", taken <= 1.0)


def kept(machine: Machine) -> Found:
    """Bytes that stay allocated after a round in which "auto" tried a model of wide layers vectorized."""
    network = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(16)])
    module, allocated = Classifier(network), Allocated()
    run = machine.trainer(max_steps=3, callbacks=[allocated], strategy=FederatedStrategy(num_clients=20))
    run.fit(module, DataLoader(TensorDataset(*vectors(20 * 64, 1024)), 64))
    size = sum(parameter.numel() for parameter in module.parameters())
    grown, used = (allocated.starts[2] - allocated.starts[0]) / size, executor_of(run)
    return Found(f"{grown:.1f} bytes a parameter, {used}", grown <= KEPT if used == "sequential" else None)
