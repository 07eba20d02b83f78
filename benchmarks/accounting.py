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
from collections.abc import Callable
from contextlib import redirect_stdout
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
from lightning_fedscale.devices.batches import form_of
from lightning_fedscale.metering import Meter
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
        module, began = Classifier(make()), time.perf_counter()
        meter = Meter(quiet(), module)
        cost = meter.training(form_of(batch_of(SAMPLES)))
        took, size = time.perf_counter() - began, meter.size
        six = 6 * cost.tokens
        rows.append(
            f"| {name} | {size.active:,} | {cost.flops / cost.tokens:.4g} | {cost.backward / cost.forward:.2f} |"
            f" {cost.flops / (six * size.active):.2f} | {cost.flops / (six * size.total):.2f} | {took:.2f} s |"
        )
    return rows


class Timed(ComputeAccounting):
    """Times its own work in each step or round, the clients' costs included."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds: list[float] = []
        self._spent = 0.0
        for hook in ("on_train_epoch_start", "on_train_batch_start", "on_round_end", "on_train_batch_end"):
            setattr(self, hook, self._timed(getattr(self, hook)))
        end = self.on_train_batch_end

        def last(*values: Any) -> None:
            end(*values)
            self.seconds.append(self._spent)
            self._spent = 0.0

        self.on_train_batch_end = last  # type: ignore[method-assign]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._counting.client = self._timed(self._counting.client)  # type: ignore[method-assign]

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*values)
            finally:
                self._spent += time.perf_counter() - began

        return timed


class Clock(pl.Callback):
    """Times steps, or rounds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)


def overhead(steps: int, clients: int = 0, batches: int = 1) -> str:
    """The callback's own time as a share of a step or round, and what the first one takes more, once."""
    clock, own = Clock(), Timed(Chinchilla())
    strategy: Any = FederatedStrategy(num_clients=clients, executor="sequential") if clients else "auto"
    trainer = quiet(callbacks=[own, clock], max_steps=steps, max_epochs=-1, strategy=strategy)
    samples = [tensor.repeat(clients * batches or steps, *[1] * (tensor.ndim - 1)) for tensor in images(SAMPLES)]
    with redirect_stdout(StringIO()):
        trainer.fit(Classifier(resnet18(16 if clients else 64)), DataLoader(TensorDataset(*samples), SAMPLES))
    each = statistics.mean(own.seconds[2:])
    return f"{each * 1e3:.2f} ms | {each / statistics.mean(clock.seconds[2:]):.2%} | {own.seconds[0]:.2f} s"


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
    steps, rounds = (5, 5) if options.fast else (60, 200)
    report = REPORT.format(
        ratios="\n".join(ratios()),
        plain=overhead(steps),
        short=overhead(rounds, 4, 1),
        long=overhead(max(rounds // 2, 4), 4, 8),
        torch=torch.__version__,
    )
    (options.output / "accounting.md").write_text(report)
    print(report)


REPORT = """# What ComputeAccounting counts, and what that costs

Made by `python -m benchmarks.accounting`, torch {torch}, one core.

## Counted FLOPs against 6 N D

Of forward and backward, per token (of text) or sample. N is the number of active parameters (trainable, outside of
embedding tables), or of all. 6 N D holds for transformers; it is too much where the first layer, which sends no
gradient back, is a good part of the model, and far too little where weights are used many times, as in convolutions
and over time. The last column is what counting once takes.

| model | N | FLOPs per token | backward / forward | of 6 N D | of 6 N D, all parameters | once |
|---|---:|---:|---:|---:|---:|---:|
{ratios}

## What it costs

The callback's own time, with a law, in a step or round: the mean over 60 steps, and 200 and 100
rounds, without the first two; its share of theirs; and what it takes once, in the first. Each shape of batches is
counted once.

| | in each | share | once |
|---|---:|---:|---:|
| step of ResNet18, batches of 32, plain Trainer | {plain} |
| round of ResNet18 with width 16, 4 clients with a batch of 32 each | {short} |
| round of the same, 4 clients with 8 such batches each | {long} |
"""


if __name__ == "__main__":
    main()
