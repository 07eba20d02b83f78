"""What `ComputeAccounting` counts, against 6 x parameters x tokens, and what it costs.

python -m benchmarks.accounting              a minute or two
python -m benchmarks.accounting --fast       to see that it runs
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.phases import RESULTS
from lightning_fedscale import FederatedStrategy
from lightning_fedscale.callbacks import ComputeAccounting
from lightning_fedscale.callbacks.compute_accounting.flop_meter import MeteredStep
from lightning_fedscale.callbacks.compute_accounting.parameter_counts import count_parameters
from lightning_fedscale.scaling import Chinchilla
from tests.networks import GPT, KINDS, Classifier, images, mlp, resnet18, tokens, vectors

SAMPLES = 32
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "MLP, 64 inputs": (mlp, vectors),
    "MLP, 4 x 512": (
        lambda: nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.ReLU())]),
        lambda samples: vectors(samples, 512),
    ),
    "GPT, 32 tokens": (GPT, tokens),
    "GPT, checkpointing": (lambda: GPT(layers=4, saving=True), tokens),
    "LSTM, 20 steps": KINDS["lstm"],
    "ResNet18, 32 x 32": (resnet18, images),
}


def quiet(**options: Any) -> pl.Trainer:
    """A Trainer on one CPU device that says nothing."""
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def ratios() -> list[str]:
    """Counted FLOPs over 6 N D, by active and by all parameters."""
    rows = []
    for name, (make, batch_of) in MODELS.items():
        module, accounting = Classifier(make()), ComputeAccounting(law=None)
        with redirect_stdout(StringIO()):
            loader = DataLoader(TensorDataset(*batch_of(SAMPLES)), SAMPLES)
            quiet(callbacks=[accounting], max_steps=1).fit(module, loader)
        ledger, size = accounting.ledger, count_parameters(module)
        flops, six = ledger.training_flops, 6 * ledger.tokens
        rows.append(
            f"| {name} | {size.active:,} | {flops / ledger.tokens:.4g} |"
            f" {ledger.flops['backward'] / ledger.flops['forward']:.2f} |"
            f" {flops / (six * size.active):.2f} | {flops / (six * size.total):.2f} |"
        )
    return rows


class Timed(ComputeAccounting):
    """Times its own work between steps, in processor time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds = 0.0
        for hook in ("on_train_epoch_start", "on_train_batch_start", "on_round_end", "on_train_batch_end"):
            setattr(self, hook, self._timed(getattr(self, hook)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if isinstance(trainer.strategy, FederatedStrategy):
            meter: Any = trainer.strategy._federation.fit.meter
            meter.client = self._timed(meter.client)

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any) -> Any:
            began = time.process_time()
            try:
                return work(*values)
            finally:
                self.seconds += time.process_time() - began

        return timed


@contextmanager
def timed_steps() -> Iterator[dict[bool, list[float]]]:
    """Processor time of the steps inside, of those that are counted and of the others."""
    found: dict[bool, list[float]] = {True: [], False: []}
    enter, leave, began = MeteredStep.__enter__, MeteredStep.__exit__, [0.0]

    def timed_enter(step: MeteredStep) -> MeteredStep:
        began[0] = time.process_time()
        return enter(step)

    def timed_leave(step: MeteredStep, *error: Any) -> None:
        leave(step, *error)
        found[step.cost.counted].append(time.process_time() - began[0])

    MeteredStep.__enter__, MeteredStep.__exit__ = timed_enter, timed_leave  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        MeteredStep.__enter__, MeteredStep.__exit__ = enter, leave  # type: ignore[method-assign]


def overhead(samples: int, steps: int, clients: int = 0, batches: int = 1) -> str:
    """The callback's own work as a share of all steps or rounds: between steps, and what counted steps take more."""
    own = Timed(Chinchilla())
    strategy: Any = FederatedStrategy(num_clients=clients, executor="sequential") if clients else "auto"
    trainer = quiet(callbacks=[own], max_steps=steps, max_epochs=-1, strategy=strategy)
    all_of_them = [tensor.repeat(clients * batches or steps, *[1] * (tensor.ndim - 1)) for tensor in images(samples)]
    with redirect_stdout(StringIO()), timed_steps() as found:
        trainer.fit(Classifier(resnet18(16 if clients else 64)), DataLoader(TensorDataset(*all_of_them), samples))
    counted, others = len(found[True]), len(found[False])
    usual = statistics.median(found[False])
    whole, more = usual * (counted + others), statistics.median(found[True]) - usual
    between = own.seconds / (counted + others)
    return (
        f"{between * 1e3:.3f} ms | {between / usual:.2%} | {counted} of {counted + others} | {more / usual:.0%} |"
        f" {(own.seconds + more * counted) / whole:.2%}"
    )


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accounting", description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="few runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    # Of the first eight steps, each is counted.
    samples, steps, rounds = (4, 10, 3) if options.fast else (SAMPLES, 60, 200)
    report = REPORT.format(
        ratios="\n".join(ratios()),
        plain=overhead(samples, steps),
        short=overhead(samples, rounds, 4, 1),
        long=overhead(samples, rounds // 2, 4, 8),
        samples=samples,
        steps=steps,
        rounds=rounds,
        long_rounds=rounds // 2,
        torch=torch.__version__,
    )
    (options.output / "accounting.md").write_text(report)
    print(report)


REPORT = """# What ComputeAccounting counts, and what that costs

Made by `python -m benchmarks.accounting`, torch {torch}, one core.

## Counted FLOPs against 6 N D

Of forward and backward of one step, per token (of text) or sample. N is the number of active parameters (trainable,
outside of embedding tables that are only looked up), or of all. 6 N D holds for transformers; it is too much where the
first layer, which sends no gradient back, is a good part of the model, and far too little where weights are used many
times, as in convolutions and over time.

| model | N | FLOPs per token | backward / forward | of 6 N D | of 6 N D, all parameters |
|---|---:|---:|---:|---:|---:|
{ratios}

## What it costs

Operators are counted while the run's own steps execute: the first eight of each form of batch, then one each time
before their number has doubled. In processor time: the callback's own work in every batch and its share of a step, a
law included; how many steps were counted; how much longer such a step takes; and all of it as a share of the run's
steps, which goes on falling.

| | own work in each | share | counted | these take longer by | all, of these steps |
|---|---:|---:|---:|---:|---:|
| {steps} steps of ResNet18, batches of {samples}, plain Trainer | {plain} |
| {rounds} rounds of ResNet18 with width 16, 4 clients with a batch of {samples} each | {short} |
| {long_rounds} rounds of the same, 4 clients with 8 such batches each | {long} |
"""


if __name__ == "__main__":
    main()
