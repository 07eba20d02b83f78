"""The laws on a device: library, executors, interruption, ranks and precisions."""

from __future__ import annotations

import multiprocessing
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.projects import clients, dataset, project
from benchmarks.gpu.record import Found, Record
from lightning_fedscale import Partition, aggregators, compressors
from lightning_fedscale.local_rules import fed_dyn, fed_prox, scaffold
from lightning_fedscale.local_rules.ditto import Ditto
from lightning_fedscale.types import ClientUpdate
from tests.laws import reference
from tests.strategies import sequential

State = dict[str, Tensor]
KEEP: dict[str, Any] = {"client_optimizer": "keep"}
SCAFFOLD: dict[str, Any] = {"local_rule": scaffold(), "momentum": 0.0}


class Bench:
    """Trains the projects of the laws."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.samples = 255  # so that eight clients have 1, 2, 4, ... 128
        self.rounds = 2 if machine.fast else 4
        self.kinds = ["mlp", "cnn", "gpt"]
        if machine.fast:
            self.samples = 63

    @property
    def partition(self) -> Partition:
        """Very unequal clients."""
        return clients(self.samples, 6 if self.machine.fast else 8)

    def fit(
        self, kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, **trainer: Any
    ) -> tuple[State, pl.Trainer]:
        """Train; return the global model on the CPU, and the Trainer.

        Args:
            kind: of the module.
            options: of the strategy, whose clients train sequentially unless they say otherwise; and ``momentum``.
            dtype: of module and data.
            trainer: options of the Trainer, and ``ckpt_path``.
        """
        options, path = dict(options), trainer.pop("ckpt_path", None)
        module = project(kind, dtype, options.pop("momentum", 0.9))
        strategy = sequential(**{"partitioner": self.partition, **options})
        run = self.machine.trainer(**{"max_epochs": self.rounds, "strategy": strategy, **trainer})
        try:
            run.fit(module, reference.loader(dataset(kind, self.samples, dtype)), ckpt_path=path)
        finally:
            torch.use_deterministic_algorithms(False)  # a Trainer leaves it as it has set it
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}, run

    def trained(self, kind: str, options: dict[str, Any], **trainer: Any) -> State:
        """The global model after training."""
        return self.fit(kind, options, **trainer)[0]


def run(record: Record, machine: Machine) -> None:
    """Run all checks of this part, with plain float32 products."""
    if machine.cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = Bench(machine)
    check_library(record, bench)
    check_executors(record, bench)
    check_interruption(record, bench)
    check_ranks(record, bench)
    check_precisions(record, bench)


# ---- the library does not matter


def check_library(record: Record, bench: Bench) -> None:
    for kind in bench.kinds:
        record.check(
            f"library: {kind} against a plain loop, deterministic", "0.0",
            partial(against_a_loop, bench, kind),
        )  # fmt: skip
        record.check(f"library: {kind}, not deterministic", "below 1e-5", partial(repeated, bench, kind))


def against_a_loop(bench: Bench, kind: str) -> Found:
    """The library against FedAvg written by hand."""
    return equal(by_loop(bench, kind), bench.trained(kind, {}, deterministic=True))


def by_loop(bench: Bench, kind: str) -> State:
    """FedAvg as the tests of the laws write it, on the device."""
    device = bench.machine.device
    module = project(kind, torch.float32, 0.9).to(device)
    data = TensorDataset(*(tensor.to(device) for tensor in dataset(kind, bench.samples).tensors))
    torch.use_deterministic_algorithms(True)
    try:
        state = reference.fed_avg(
            module, data, bench.partition, rounds=bench.rounds, clients_per_round=len(bench.partition)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    return {name: value.cpu() for name, value in state.items()}


def repeated(bench: Bench, kind: str) -> Found:
    """Largest difference of three equal runs from the first, and how many differ at all."""
    first, *others = (bench.trained(kind, {}) for _ in range(2 if bench.machine.fast else 4))
    differences = [reference.difference(first, other) for other in others]
    differ = sum(difference > 0 for difference in differences)
    return Found(f"{max(differences):.2g}; {differ} of {len(others)} runs differ", max(differences) < 1e-5)


def equal(left: State, right: State) -> Found:
    """Whether two models are bit-identical."""
    difference = reference.difference(left, right)
    return Found(f"{difference:.2g}", difference == 0.0)


# ---- the executor does not matter


def check_executors(record: Record, bench: Bench) -> None:
    ways = {"": {}, ", keep": KEEP, ", FedProx": {"local_rule": fed_prox(0.1)}, ", SCAFFOLD": SCAFFOLD}
    cases = [(kind, name) for kind in bench.kinds for name in ways] + [("noise", "")]
    if bench.machine.fast:
        cases = [("mlp", ", SCAFFOLD"), ("cnn", ""), ("gpt", ""), ("noise", "")]
    for kind, name in cases:
        for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            record.check(
                f"executors: {kind}{name}, {str(dtype).removeprefix('torch.')}", f"below {bound:g}, vectorized",
                partial(executors, bench, kind, ways[name], dtype, bound),
            )  # fmt: skip


def executors(bench: Bench, kind: str, options: dict[str, Any], dtype: torch.dtype, bound: float) -> Found:
    """Difference of the executors, and whether the clients did train vectorized."""
    expected, _ = bench.fit(kind, options, dtype)
    got, trainer = bench.fit(kind, {**options, "executor": "vectorized"}, dtype)
    difference, used = reference.difference(got, expected), executor_of(trainer)
    return Found(f"{difference:.2g}, {used}", difference < bound and used == "vectorized")


def executor_of(trainer: pl.Trainer) -> str:
    """The executor that the last round used."""
    kind: str | None = trainer.strategy._federation.fit.executor.kind  # type: ignore[attr-defined]
    return kind or "undecided"


# ---- interruption does not matter


def check_interruption(record: Record, bench: Bench) -> None:
    ways: dict[str, dict[str, Any]] = {
        "keep": KEEP,
        "SCAFFOLD": SCAFFOLD,
        "FedDyn": {"local_rule": fed_dyn(0.1)},
        "error feedback": {"compressor": compressors.error_feedback(compressors.top_k(0.1))},
        "Ditto": {"personal": Ditto(0.1)},
        "keep, in files": {**KEEP, "client_state_memory": 0},
        "keep, in pinned memory and files": {**KEEP, "client_state_memory": 20_000},
    }
    for name, options in ways.items():
        for kind in bench.kinds[:1] if bench.machine.fast else bench.kinds[:2]:
            record.check(
                f"interruption: {kind}, {name}", "0.0",
                partial(interruption, bench, kind, options),
            )  # fmt: skip


def interruption(bench: Bench, kind: str, options: dict[str, Any]) -> Found:
    """Stop half way, resume, and compare with a run that was never stopped."""
    whole = bench.trained(kind, options, deterministic=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "half.ckpt")
        _, trainer = bench.fit(kind, options, deterministic=True, max_epochs=bench.rounds // 2)
        trainer.save_checkpoint(path)
        return equal(bench.trained(kind, options, deterministic=True, ckpt_path=path), whole)


# ---- ranks do not matter


def check_ranks(record: Record, bench: Bench) -> None:
    for name, options in {"reset": {}, "keep": KEEP, "SCAFFOLD": SCAFFOLD}.items():
        if bench.machine.fast and name != "reset":
            continue
        record.check(
            f"ranks: two processes on this device over gloo, {name}", "0.0",
            partial(ranks, bench, options),
        )  # fmt: skip


def ranks(bench: Bench, options: dict[str, Any]) -> Found:
    """Two processes against one; NCCL would refuse one GPU for both."""
    start = "spawn" if bench.machine.cuda else "fork"  # CUDA does not survive a fork
    two = {"parallel_devices": [bench.machine.device] * 2, "process_group_backend": "gloo", "start_method": start}
    try:
        got = bench.trained("mlp", {**options, **two}, devices="auto")
    finally:
        for child in multiprocessing.active_children():  # if they were cut off
            child.kill()
    return equal(got, bench.trained("mlp", options))


# ---- precisions


def check_precisions(record: Record, bench: Bench) -> None:
    if not bench.machine.fast:
        for precision in ("bf16-mixed", "16-mixed"):
            record.check(
                f"precision: {precision}, same seed twice", "0.0",
                partial(same_twice, bench, precision),
            )  # fmt: skip
    half = "16-mixed" if bench.machine.cuda else "32-true"  # CPUs have no gradient scaler
    record.check(f"precision: {half}, steps that clients count", "as many as were taken", lambda: counted(bench, half))


def same_twice(bench: Bench, precision: str) -> Found:
    first, second = (bench.trained("mlp", {}, deterministic=True, precision=precision) for _ in range(2))
    return equal(first, second)


def counted(bench: Bench, precision: str) -> Found:
    """Steps of optimizers against those that clients report, which SCAFFOLD divides by."""
    taken, reported, mean = [0], list[int](), aggregators.mean()

    def step_taken(*_: Any) -> None:
        taken[0] += 1

    def accumulate(sums: Tensor, update: ClientUpdate, *rest: Any) -> Tensor:
        reported.append(update.optimizer_steps)
        return mean.accumulate(sums, update, *rest)

    hook = register_optimizer_step_post_hook(step_taken)
    try:
        bench.trained("mlp", {**SCAFFOLD, "aggregator": mean._replace(accumulate=accumulate)}, precision=precision)
    finally:
        hook.remove()
    return Found(f"{sum(reported)} reported, {taken[0]} taken", sum(reported) == taken[0] > 0)
