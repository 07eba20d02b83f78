"""What executor="auto" chooses, next to measured times: when is it faster to vectorize clients?

    python -m benchmarks.choice                  # writes results/choice.md, about ten minutes
    python -m benchmarks.choice mlp lstm         # some of the models, printed only
    python -m benchmarks.choice --fit            # also the weights of the model of a step that fit these times best

Every model trains in one process on one thread, and rounds take turns: one sequential, one vectorized. A ratio is the
median over pairs of neighbouring rounds. Times are the process's CPU times, so that other processes matter little.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import models
from lightning_fedscale import FederatedStrategy
from lightning_fedscale.core.executors import auto
from lightning_fedscale.core.executors.machine import processor
from lightning_fedscale.core.executors.step_model import WEIGHTS, Forecast, Weights
from lightning_fedscale.core.executors.vectorized import captured_steps
from lightning_fedscale.core.executors.vectorized.captured_steps import CapturedSteps
from lightning_fedscale.types import ClientUpdate

RESULTS = Path(__file__).parent / "results" / "choice.md"
PAIRS, WARM_UP = 8, 4  # rounds; steps are captured in the second one


class Last(nn.Module):
    """An LSTM over sequences, and a layer on its last state."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(inputs, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, sequences: Tensor) -> Tensor:
        output: Tensor = self.head(self.recurrent(sequences)[0][:, -1])
        return output


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def normed_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


class Case(NamedTuple):
    """A model and its clients.

    Attributes:
        characters: size of the alphabet; 0 if the inputs are numbers.
        capture: False for steps that are not captured, such as those that read a file.
    """

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 10
    clients: int = 10
    steps: int = 4
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    characters: int = 0
    capture: bool = True


def mlp(*widths: int, **options: Any) -> Case:
    name = "MLP " + "-".join(map(str, widths))
    return Case(name, lambda: models.mlp(*widths), widths[:1], **options)


def transformer(name: str, length: int, width: int, layers: int, **options: Any) -> Case:
    def make() -> nn.Module:
        return models.CharacterTransformer(80, length, width, layers)

    return Case(name, make, (length,), steps=2, characters=80, **options)


IMAGE, GREY = (3, 32, 32), (1, 28, 28)
CASES = [
    *(mlp(64, width, 10) for width in (16, 128, 256, 512, 1024)),
    *(mlp(64, 128, 10, clients=clients) for clients in (2, 3, 5, 30, 100)),
    *(mlp(64, 128, 10, batch=batch) for batch in (1, 32, 128)),
    *(mlp(64, 256, 256, 10, clients=clients) for clients in (10, 50)),
    *(mlp(64, 512, 512, 10, clients=clients) for clients in (3, 10)),
    mlp(64, 512, 512, 10, batch=64),
    mlp(64, 128, 128, 128, 128, 10),
    mlp(784, 10),
    mlp(784, 200, 200, 10),
    mlp(64, 128, 10, optimizer=torch.optim.Adam),
    mlp(64, 256, 256, 10, optimizer=torch.optim.Adam),
    Case("CNN, 0.88 M parameters", models.cnn, IMAGE, steps=2),
    Case("small CNN", models.small_cnn, IMAGE, steps=2),
    Case("small CNN", models.small_cnn, IMAGE, batch=2, steps=2),
    Case("CNN with BatchNorm", normed_cnn, (3, 16, 16), steps=2),
    Case("LeNet", lenet, GREY, steps=2),
    Case("LeNet", lenet, GREY, clients=3, steps=2),
    Case("LeNet", lenet, GREY, batch=32, steps=2),
    transformer("transformer, 2 layers of 64, 64 characters", 64, 64, 2, batch=16),
    transformer("transformer, 1 layer of 64, 32 characters", 32, 64, 1, batch=8),
    transformer("transformer, 1 layer of 32, 16 characters", 16, 32, 1, batch=4),
    Case("LSTM of 32, 12 steps", lambda: Last(8, 32), (12, 8), steps=2),
    *(mlp(64, 128, 10, clients=clients, capture=False) for clients in (10, 100)),
    Case("small CNN", models.small_cnn, IMAGE, batch=2, steps=2, capture=False),
    transformer("transformer, 1 layer of 32, 16 characters", 16, 32, 1, batch=4, capture=False),
]


class Module(pl.LightningModule):
    """A model with the plainest training step."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net, self._case = case.model(), case

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return models.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The case's optimizer."""
        return self._case.optimizer(self.parameters(), lr=0.01)


class TakeTurns(pl.Callback):
    """Changes the executor after each round, and keeps the CPU seconds that its clients' training took."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"sequential": [], "vectorized": []}
        self.forecast: Forecast
        self._rounds, self._of_round = 0, 0.0

    def timed(self, run: Callable[..., Iterator[ClientUpdate]]) -> Callable[..., Iterator[ClientUpdate]]:
        """Count the time of an executor, and not that of what is done with its updates."""

        def timed(*arguments: Any) -> Iterator[ClientUpdate]:
            updates = run(*arguments)
            while True:
                started = time.process_time()
                update = next(updates, None)
                self._of_round += time.process_time() - started
                if update is None:
                    return
                yield update

        return timed

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """A round is over."""
        executor: Any = trainer.strategy._federation.fit.executor  # type: ignore[attr-defined]
        if self._rounds >= WARM_UP:
            self.seconds[executor.kind].append(self._of_round)
        self._rounds, self._of_round = self._rounds + 1, 0.0
        self.forecast = executor._forecast._replace(captured=len(executor._vectorized._batched_step.captured) > 0)
        executor.kind = "sequential" if executor.kind == "vectorized" else "vectorized"


class Row(NamedTuple):
    """A case as measured; seconds are of a local batch."""

    case: Case
    forecast: Forecast
    sequential: float
    vectorized: float
    gains: list[float]  # of each pair of rounds

    @property
    def gain(self) -> float:
        return median(self.gains)


def measure(case: Case) -> Row:
    """Train a case with executors that take turns."""
    samples = case.clients * case.steps * case.batch
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, *case.shape, generator=generator)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    if case.characters:
        inputs, labels = (torch.randint(0, 80, (samples, *case.shape), generator=generator) for _ in range(2))
    turns = TakeTurns()
    strategy = FederatedStrategy(num_clients=case.clients, verify_executor=False, rounds_per_epoch=1000)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, callbacks=[turns], max_steps=WARM_UP + 2 * PAIRS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(0)
    run = mock.patch.object(auto.ExecutorChoice, "run", turns.timed(auto.ExecutorChoice.run))
    never = nullcontext() if case.capture else mock.patch.object(CapturedSteps, "is_due", return_value=False)
    soon = mock.patch.object(captured_steps, "_CAPTURE_AT", 2)
    with run, never, soon, mock.patch.object(auto, "_MARGIN", 0.0):  # so that whatever can be vectorized is
        trainer.fit(Module(case), DataLoader(TensorDataset(inputs, labels), case.batch, shuffle=True))
    batches = case.clients * case.steps
    sequential, vectorized = (turns.seconds[kind] for kind in ("sequential", "vectorized"))
    gains = [alone / joint for alone, joint in zip(sequential, vectorized, strict=True)]
    return Row(case, turns.forecast, median(sequential) / batches, median(vectorized) / batches, gains)


def fitted(rows: list[Row]) -> Weights:
    """The weights that predict the measured times, and above all their ratios, best."""
    from scipy.optimize import least_squares

    def weights(logs: np.ndarray) -> Weights:
        # Calls and views are too much alike in these steps to be told apart.
        return Weights(*np.exp(logs).tolist())._replace(view=WEIGHTS.view)

    def residuals(logs: np.ndarray) -> np.ndarray:
        off = []
        for row in rows:
            forecast = row.forecast._replace(model=row.forecast.model._replace(weights=weights(logs)))
            off += [
                0.5 * np.log(forecast.sequential / row.sequential), 0.5 * np.log(forecast.vectorized / row.vectorized),
                1.5 * np.log(forecast.gain / row.gain),
            ]  # fmt: skip
        return np.array([*off, *0.1 * (logs - start)])

    start = np.log(WEIGHTS)
    return weights(least_squares(residuals, start, loss="soft_l1", f_scale=0.2).x)


def line(row: Row) -> str:
    """A row of the table."""
    case, predicted = row.case, row.forecast.gain
    chosen = "vectorized" if predicted > auto._MARGIN else "sequential"
    lost = max(row.gain, 1.0) / (row.gain if chosen == "vectorized" else 1.0) - 1
    low, _, high = quantiles(row.gains, n=4)
    details = "" if case.optimizer is torch.optim.SGD else f", {case.optimizer.__name__}"
    details += "" if row.forecast.captured else ", not captured"
    return (
        f"| {case.name}{details} | {case.batch} | {case.clients} | {row.sequential * 1e3:.2f} |"
        f" {row.vectorized * 1e3:.2f} | {row.gain:.2f} ({low:.2f} to {high:.2f}) | {predicted:.2f} | {chosen} |"
        f" {lost:.0%} |"
    )


HEAD = """| model | batch | clients | sequential, ms | vectorized, ms | measured gain | predicted gain | chosen | lost |
|---|---:|---:|---:|---:|---:|---:|---|---:|"""


def report(lines: list[str]) -> str:
    """The page."""
    return f"""# What "auto" chooses

Time of a local batch on one core of {processor()}, with torch {torch.__version__} and
Python {platform.python_version()}; made by `python -m benchmarks.choice`. The measured gain is sequential over
vectorized time: the median, and the middle half, of {PAIRS} pairs of neighbouring rounds. The predicted gain is that of
the model of a step by which `executor="auto"` chooses: it vectorizes above {auto._MARGIN}. "lost" is the time that the
choice costs in excess of the faster executor.

The weights of the model were fitted to earlier measurements of the same models (`--fit`). It sees too little in a
transformer's captured steps, which need less memory traffic than the steps that are counted.

{HEAD}
""" + "\n".join(lines) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only models with one of these in their name; prints only")
    parser.add_argument("--fit", action="store_true", help="print the weights that fit best")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    chosen = [case for case in CASES if any(n.lower() in case.name.lower() for n in arguments.names or [""])]
    print(HEAD)
    rows, lines = [], []
    for case in chosen:
        rows.append(measure(case))
        lines.append(line(rows[-1]))
        print(lines[-1], flush=True)
    if arguments.fit:
        print(fitted(rows))
    if not arguments.names:
        RESULTS.write_text(report(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
