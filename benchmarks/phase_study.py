"""Do phases help large batches? CIFAR-10 at 16x16 pixels: small and large batches, and what is done to the large ones.

    python -m benchmarks.phase_study              five seeds, about half an hour on two cores
    python -m benchmarks.phase_study --fast       to see that it runs

Every run has the same number of iterations; the accuracy after as many epochs as the small batch trains is read on the
way, which is fair since the learning rate is constant. Without CIFAR-10 made-up images
stand in, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import tasks
from lightning_fedscale import phases
from lightning_fedscale.callbacks import CriticalPhase

RESULTS = Path(__file__).parent / "results"
SMALL, LARGE = 32, 256
SAMPLES, EPOCHS = 25_000, 6
RATE = 0.01  # the best for the small batch among 0.005, 0.01, 0.02, 0.05
THRESHOLD, FACTOR = 0.02, 2.0
THRESHOLDS, FACTORS = (0.0125, 0.015, 0.02, 0.05), (1.5, 2.0, 4.0, 8.0)


class Way(NamedTuple):
    """A way to train."""

    batch: int
    rate: float
    callback: Callable[[int], CriticalPhase] | None = None


def _step(threshold: float, factor: float) -> Callable[[int], CriticalPhase]:
    return lambda seed: CriticalPhase("relative_change", threshold, scale=factor, noise_every=None, every_n_steps=1)


def _adascale(seed: int) -> CriticalPhase:
    rule = phases.adascale(batch=LARGE, reference=SMALL)
    return CriticalPhase("relative_change", THRESHOLD, scale=rule, noise_every=10, every_n_steps=1)


def _noise(seed: int) -> CriticalPhase:
    return CriticalPhase(action="noise", target_batch=SMALL, noise_in="all", noise_every=None, seed=seed)


WAYS = {
    f"small batch ({SMALL})": Way(SMALL, RATE),
    f"large batch ({LARGE})": Way(LARGE, RATE),
    f"large batch, learning rate x {LARGE // SMALL}": Way(LARGE, RATE * LARGE / SMALL),
    f"large batch, step scaling x {FACTOR:g}": Way(LARGE, RATE, _step(THRESHOLD, FACTOR)),
    "large batch, AdaScale": Way(LARGE, RATE, _adascale),
    f"large batch, noise of {SMALL}": Way(LARGE, RATE, _noise),
}


class Batches:
    """Random batches of tensors, for as many steps as it takes; another order in every pass."""

    def __init__(self, data: tuple[Tensor, Tensor], size: int, steps: int, seed: int) -> None:
        self._data, self._size, self._steps, self._seed = data, size, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._data
        generator = torch.Generator().manual_seed(self._seed)
        done = 0
        while True:
            for indices in torch.randperm(len(labels), generator=generator).split(self._size):
                if done == self._steps:
                    return
                done += 1
                yield images[indices], labels[indices]


class Project(pl.LightningModule):
    """A CNN of 40,000 parameters, tested after as many samples as asked."""

    def __init__(self, rate: float, test: tuple[Tensor, Tensor], read_at: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        self._rate, self._test, self._read_at = rate, test, read_at
        self.read = math.nan

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == self._read_at:
            self.read = self.accuracy()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self._rate, momentum=0.9)

    @torch.no_grad()
    def accuracy(self) -> float:
        images, labels = self._test
        return float((self.network(images).argmax(1) == labels).float().mean())


def prepare(fast: bool) -> tuple[list[Tensor], str]:
    """Training images and labels, test images and labels, and where they are from."""
    data = tasks.images(1, *((256, 500) if fast else (SAMPLES, 10_000)))
    inputs = [F.avg_pool2d(torch.from_numpy(part), 2) * 4 for part in (data.inputs, data.test_inputs)]
    labels = [torch.from_numpy(part) for part in (data.labels, data.test_labels)]
    return [inputs[0], labels[0], inputs[1], labels[1]], data.source


def run(way: Way, seed: int, data: list[Tensor], epochs: int) -> dict[str, float]:
    """Train one way, and test it after the same epochs and after the same iterations."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    train, test = (data[0], data[1]), (data[2], data[3])
    steps = epochs * math.ceil(len(train[1]) / SMALL)
    read_at = epochs * math.ceil(len(train[1]) / way.batch)
    pl.seed_everything(seed, verbose=False)
    module = Project(way.rate, test, read_at)
    callbacks = [] if way.callback is None else [way.callback(seed)]
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Batches(train, way.batch, steps, seed))
    critical = sum(last - first + 1 for first, last in callbacks[0].record.spans) / steps if callbacks else math.nan
    return {"same_epochs": module.read, "same_iterations": module.accuracy(), "critical": critical}


def _job(job: tuple[str, str, int, Path, int]) -> tuple[str, str, int, dict[str, float]]:
    kind, name, seed, data, epochs = job
    way = WAYS[name] if kind == "way" else Way(LARGE, RATE, _step(*map(float, name.split(","))))
    return kind, name, seed, run(way, seed, torch.load(data), epochs)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values)) * stdtrit(len(values) - 1, 0.975))


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and interval of every way, as markdown."""
    lines = [
        "| trained by | test accuracy after the same epochs | after the same iterations | critical steps |",
        "|---|---:|---:|---:|",
    ]
    for name, runs in results.items():
        cells = []
        for column in ("same_epochs", "same_iterations"):
            mean, half = interval([run[column] for run in runs])
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f} %")
        critical = np.mean([run["critical"] for run in runs])
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {'' if math.isnan(critical) else f'{critical:.0%}'} |")
    return "\n".join(lines)


def heat_map(results: dict[str, dict[str, list[dict[str, float]]]]) -> Figure:
    """What threshold and factor change, against the large batch alone."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("same_epochs", "same_iterations"), strict=True):
        seeds = len(next(iter(results["cell"].values())))
        alone = np.mean([run[column] for run in results["way"][f"large batch ({LARGE})"][:seeds]])
        cells = [
            [np.mean([run[column] for run in results["cell"][f"{threshold},{factor}"]]) - alone for factor in FACTORS]
            for threshold in THRESHOLDS
        ]
        change = 100 * np.array(cells)
        image = axes.imshow(change, cmap="RdBu", vmin=-8, vmax=8)
        for (row, place), value in np.ndenumerate(change):
            axes.text(place, row, f"{value:+.1f}", ha="center", va="center")
        axes.set_xticks(range(len(FACTORS)), [f"{factor:g}" for factor in FACTORS])
        axes.set_yticks(range(len(THRESHOLDS)), [f"{threshold:g}" for threshold in THRESHOLDS])
        axes.set_xlabel("factor in non-critical phases")
        axes.set_title(f"after the {column.replace('_', ' ')}")
    figure.axes[0].set_ylabel("threshold of relative change")
    figure.colorbar(image, ax=figure.axes, label="points of accuracy beyond the large batch")
    return figure


def write(results: dict[str, dict[str, list[dict[str, float]]]], source: str, seeds: int, folder: Path) -> str:
    """The report, its figure and its numbers; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "phase_study.json").write_text(json.dumps(results, indent=1))
    heat_map(results).savefig(folder / "phase_sensitivity.png", dpi=120)
    text = table(results["way"])
    (folder / "phase_study.md").write_text(REPORT.format(rows=text, seeds=seeds, source=source, **globals()))
    return text


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phase_study", description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="little data, one seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    seeds, epochs = (1, 1) if options.fast else (options.seeds, EPOCHS)
    torch.set_num_threads(1)  # as in the workers, which are copies of this process: threads would not be copied
    data, source = prepare(options.fast)
    cells = [f"{threshold},{factor}" for threshold in THRESHOLDS for factor in FACTORS]
    jobs = [("way", name, seed) for seed in range(seeds) for name in WAYS]
    jobs += [("cell", cell, seed) for seed in range(min(2, seeds)) for cell in cells]
    results: dict[str, dict[str, list[dict[str, float]]]] = {"way": {}, "cell": {}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "data.pt")
        torch.save(data, file)
        with multiprocessing.get_context("fork").Pool(options.workers) as pool:
            for kind, name, seed, result in pool.imap(_job, [(*job, file, epochs) for job in jobs]):
                results[kind].setdefault(name, []).append(result)
                print(name, seed, result, flush=True)
    print(write(results, source, seeds, options.output))


REPORT = """# Critical phases and large batches

Data: {source}; 16x16 pixels, 10,000 other images to test. A CNN of 40,000 parameters; SGD with momentum 0.9 at the
constant learning rate {RATE}, the best for the small batch. {EPOCHS} epochs of batches of {SMALL} are as many
iterations as everybody gets. Mean of {seeds} seeds and its 95 % interval; made by `python -m benchmarks.phase_study`.

Step scaling: `relative_change` with window 25, threshold {THRESHOLD}, factor {FACTOR}. AdaScale: from {SMALL} to
{LARGE} samples, within the same phases. Noise: `diagonal`, in all phases.

{rows}

After the same iterations large batches have seen {LARGE} / {SMALL} times as many samples, so that column is no fair
comparison of data; it is the one of arXiv 2509.10537.

## Which threshold, which factor

![What threshold and factor change](phase_sensitivity.png)

Change of accuracy against the large batch without scaling, mean of two seeds.
"""


if __name__ == "__main__":
    main()
