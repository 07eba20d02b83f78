"""How well detectors tell phases, and what `CriticalPhase` costs.

    python -m benchmarks.phases              detection curves, false alarms, overhead; eight minutes of CPU time
    python -m benchmarks.phases --fast       to see that it runs

Norms are made up: log-normal noise around a level that changes once. So the truth is known; what real norms do is in
`benchmarks.phase_study`.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from scipy.signal import lfilter
from scipy.stats import chi2
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale.callbacks import CriticalPhase
from lightning_fedscale.callbacks.critical_phase.steps import StepWatch
from lightning_fedscale.phases import (
    DETECTORS,
    Decision,
    Detector,
    Observation,
    State,
    accordion,
    federated_gradient_norm,
    page_hinkley,
    relative_change,
)
from tests.networks import Classifier, images, resnet18

RESULTS = Path(__file__).parent / "results"
SPREAD = 0.2
"""Standard deviation of the log-norm."""
BEFORE, AFTER, WARM_UP = 300, 200, 25
MOSTLY = 0.3
"""A detector that calls so large a share of stationary steps critical tells nothing, and has no place in a curve."""

FAMILIES: dict[str, tuple[Callable[[float], Detector], list[float]]] = {
    "relative_change, window 25": (relative_change, [0.008, 0.01, 0.0125, 0.015, 0.02, 0.03, 0.3]),
    "relative_change, window 5": (lambda t: relative_change(t, window=5), [0.03, 0.05, 0.07, 0.1, 0.15, 0.2]),
    "accordion, every 10": (accordion, [0.3, 0.4, 0.5, 0.7, 1.0, 1.5]),
    # `fisher_trace` is the same rule on another quantity.
    "federated_gradient_norm, fisher_trace": (federated_gradient_norm, [0.01, 0.3, 0.7, 1.0, 1.5, 2.0]),
    "the same, window 10": (
        lambda t: federated_gradient_norm(t, window=10),
        [0.01, 0.05, 0.1, 0.2, 0.3],
    ),
    "page_hinkley": (page_hinkley, [0.1, 0.3, 1.0, 3.0, 10.0]),
    "page_hinkley, order 0": (lambda t: page_hinkley(t, order=0), [0.1, 0.3, 1.0, 3.0, 10.0]),
}
Noise: TypeAlias = Callable[[np.random.Generator, int], np.ndarray]
NOISE: dict[str, Noise] = {
    "independent": lambda rng, n: rng.normal(size=n),
    **{
        f"autoregressive, {memory:g}": lambda rng, n, memory=memory: autoregressive(rng, memory, n)
        for memory in (-0.5, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99)
    },
    "autoregressive, 0.95, and as much of its own": lambda rng, n: math.sqrt(0.5) * (
        autoregressive(rng, 0.95, n) + rng.normal(size=n)
    ),
    "means of ten in a row": lambda rng, n: np.convolve(rng.normal(size=n + 9), np.ones(10), "valid") / math.sqrt(10),
    "heavy tails, Student's t of 3": lambda rng, n: rng.standard_t(3, size=n) / math.sqrt(3),
    "skewed, Gumbel's": lambda rng, n: rng.gumbel(size=n) * math.sqrt(6) / math.pi,
}  # fmt: skip
DEFAULT = "page_hinkley, the default"
SINGLE: dict[str, Detector] = {
    DEFAULT: page_hinkley(),
    "page_hinkley, order 0": page_hinkley(order=0),
    "relative_change at SelSync's 0.3, the former default": relative_change(0.3),
    "relative_change at 0.0125": relative_change(0.0125),
    "accordion": accordion(),
}
SIZES = [1.0, 0.5, 0.7, 0.85, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0]


def autoregressive(rng: np.random.Generator, memory: float, length: int) -> np.ndarray:
    """Standard normal numbers that each keep this share of the one before."""
    noise: np.ndarray = rng.normal(size=length)
    noise[1:] *= math.sqrt(1 - memory**2)
    found: np.ndarray = lfilter([1.0], [1.0, -memory], noise)
    return found


class Point(NamedTuple):
    """A detector at one threshold: what it says while nothing changes, and how soon it notices a change."""

    threshold: float
    false_alarms: float  # in 1,000 steps
    critical: float  # share of them
    noticed: float
    delay: float


def decisions(detector: Detector, norms: np.ndarray, state: State | None = None) -> Iterator[tuple[Decision, State]]:
    """What a detector says of each norm."""
    state = detector.init() if state is None else state
    for norm in norms.tolist():
        decision, state = detector.update(state, Observation([norm], client_square=norm**2))
        yield decision, state


def delays(detector: Detector, noise: Noise, changes: list[float], runs: int) -> np.ndarray:
    """Steps from a change of the level to the next critical one, runs by changes; infinite if there is none.

    What comes before the change is judged once.
    """
    rng, found = np.random.default_rng(0), np.full((runs, len(changes)), math.inf)
    for run in range(runs):
        norms = np.exp(SPREAD * noise(rng, BEFORE + AFTER))
        *_, (_, state) = decisions(detector, norms[:BEFORE])
        for row, change in enumerate(changes):
            after = decisions(detector, change * norms[BEFORE:], state)
            found[run, row] = next((step for step, (decision, _) in enumerate(after) if decision.critical), math.inf)
    return found


def points(detector: Detector, threshold: float, changes: list[float], runs: int, steps: int) -> list[Point]:
    """Measure over stationary runs of so many steps after the warm-up, and over runs with each of the changes."""
    rng, noise = np.random.default_rng(1), NOISE["independent"]
    stationary = [np.exp(SPREAD * noise(rng, steps + WARM_UP)) for _ in range(runs)]
    quiet = np.array([[d.critical for d, _ in decisions(detector, norms)] for norms in stationary])[:, WARM_UP:]
    alarms = (quiet[:, 1:] & ~quiet[:, :-1]).sum(1).mean()
    return [
        Point(
            threshold, float(alarms), float(quiet.mean()), float(np.isfinite(column).mean()), float(np.median(column))
        )
        for column in delays(detector, noise, changes, runs).T
    ]


def detection(changes: list[float], runs: int, steps: int) -> tuple[Figure, list[str]]:
    """Detection curves of all detectors, as a figure and as rows of a table."""
    figure = Figure(figsize=(4.6 * len(changes), 4.2), layout="constrained")
    found = {
        name: [points(make(threshold), threshold, changes, runs, steps) for threshold in thresholds]
        for name, (make, thresholds) in FAMILIES.items()
    }
    rows = []
    colors, markers = ["#332288", "#88CCEE", "#117733", "#CC6677", "#DDAA33", "#AA4499", "#888888"], "osD^vPX"
    for number, axes in enumerate(np.atleast_1d(figure.subplots(1, len(changes), sharey=True))):
        for (name, by_threshold), color, marker in zip(found.items(), colors, markers, strict=True):
            now = [of_changes[number] for of_changes in by_threshold]
            shown = [(p.false_alarms, min(p.delay, AFTER)) for p in now if p.critical < MOSTLY]
            if shown:
                axes.plot(*zip(*shown, strict=True), color=color, marker=marker, markersize=5, lw=1.3, label=name)
            rows += [
                f"| {name} | {p.threshold:g} | x {changes[number]:g} | {p.false_alarms:.2f} | {p.critical:.0%} |"
                f" {p.noticed:.0%} | {_steps(p.delay)} |"
                for p in now
            ]
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([0, 1, 3, 10, 30, 100, AFTER], ["0", "1", "3", "10", "30", "100", "not"])
        axes.minorticks_off()
        axes.axhline(AFTER, color="0.8", lw=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("false alarms in 1,000 steps")
        axes.set_title(f"the norm's level times {changes[number]:g}")
    figure.axes[0].set_ylabel("median delay in steps")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="x-small")
    return figure, rows


def _steps(delay: float) -> str:
    return "not" if math.isinf(delay) else f"{delay:.0f}"


def by_size(runs: int) -> list[str]:
    """Share of changes that single detectors notice, and the median delay, by the size of the change."""
    return [
        f"| {name} | {kind} | "
        + " | ".join(
            f"{np.isfinite(column).mean():.0%}, {_steps(float(np.median(column)))}"
            for column in delays(detector, NOISE[kind], SIZES, runs).T
        )
        + " |"
        for kind in ("independent", "autoregressive, 0.5", "autoregressive, 0.9")
        for name, detector in SINGLE.items()
    ]


def false_alarms(runs: int, steps: int) -> list[str]:
    """False alarms on stationary runs against the rate asked for, with 95 % intervals, for noise of all kinds."""

    def found(detector: Detector, noise: Noise) -> str:
        rng, alarms = np.random.default_rng(1), 0
        for _ in range(runs):
            norms = np.exp(SPREAD * noise(rng, steps))
            alarms += sum(decision.statistic > decision.threshold for decision, _ in decisions(detector, norms))
        low, high = chi2.ppf(0.025, 2 * alarms) / 2 if alarms else 0.0, chi2.ppf(0.975, 2 * alarms + 2) / 2
        return f"{alarms / runs:.2f} ({low / runs:.2f} to {high / runs:.2f})"

    return [
        f"| {name} | {' | '.join(found(detector, noise) for detector in shown)} |"
        for name, noise in NOISE.items()
        for shown in [[*(page_hinkley(rate) for rate in RATES), page_hinkley(order=0), relative_change(0.3)]]
    ]


RATES = [0.3, 1.0, 5.0]


def own_step(steps: int) -> list[str]:
    """CPU time of a detector's own update; the median of five times so many steps."""
    norms, found = np.exp(SPREAD * np.random.default_rng(2).normal(size=steps)), []
    for name, make in DETECTORS.items():
        took = []
        for _ in range(5):
            begun = time.process_time()
            for _ in decisions(make(), norms):
                pass
            took.append((time.process_time() - begun) / steps)
        found.append(f"{name} {1e6 * statistics.median(took):.0f}")
    return found


class Clock(Callback):
    """CPU time of every step, from its start to that of the next, and how much of it `CriticalPhase` spends.

    Both come from the same steps of the same run, so that other work on the machine matters little.
    """

    HOOKS = (
        (CriticalPhase, "on_train_batch_end"),
        (StepWatch, "on_train_batch_start"),
        (StepWatch, "on_before_optimizer_step"),
        (StepWatch, "_act"),
    )

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._spent: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._starts.append(time.process_time())
        self._spent.append(0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the callback's hooks."""
        with ExitStack() as stack:
            for kind, name in self.HOOKS:
                stack.enter_context(mock.patch.object(kind, name, self._timed(getattr(kind, name))))
            yield

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return hook(*args, **kwargs)
            finally:
                self._spent[-1] += time.process_time() - begun

        return call

    def shares(self) -> np.ndarray:
        """Of each step but the first two, which set things up, and the last: time spent by that of the median rest."""
        spent = np.array(self._spent[2:-1])
        found: np.ndarray = spent / np.median(np.diff(self._starts)[2:] - spent)
        return found


LOOK_EVERY, LOOK_BY_DEFAULT = 8, inspect.signature(CriticalPhase).parameters["noise_every"].default


def overhead(steps: int, repeats: int, batch: int = 32, width: int = 64) -> list[str]:
    """What the callback adds to a ResNet18 step."""
    torch.set_num_threads(1)
    scale = {"scale": 1.01, "detector": relative_change(1e6, window=1)}
    halves = f"scale, and halves of every {LOOK_BY_DEFAULT}th batch"
    options: dict[str, dict[str, Any]] = {
        "observe": {"action": "observe", "noise_every": None},
        "scale": {**scale, "noise_every": None},
        halves: {**scale, "noise_every": LOOK_EVERY},
    }
    found: dict[str, list[float]] = {name: [] for name in options}
    for repeat in range(repeats):
        for name, arguments in options.items():
            torch.manual_seed(repeat)
            clock = Clock()
            trainer = pl.Trainer(
                max_steps=steps, callbacks=[clock, CriticalPhase(**arguments)], accelerator="cpu", devices=1,
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            samples = [tensor.repeat(steps, *[1] * (tensor.ndim - 1)) for tensor in images(batch)]
            with clock.watching():
                trainer.fit(Classifier(resnet18(width)), DataLoader(TensorDataset(*samples), batch))
            shares = clock.shares()
            looks = np.arange(2, steps - 1) % LOOK_EVERY == LOOK_EVERY - 1
            if name == halves:
                every, of_look = shares[~looks].mean(), np.median(shares[looks])
                found[name].append(float(every + (of_look - every) / LOOK_BY_DEFAULT))
            else:
                found[name].append(float(shares.mean()))
    return [
        f"| {name} | {statistics.median(shares):.1%} | {min(shares):.1%} to {max(shares):.1%} |"
        for name, shares in found.items()
    ]


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phases", description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="few runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fast = options.fast
    options.output.mkdir(parents=True, exist_ok=True)
    runs, steps = (1, 100) if fast else (200, 1000)
    figure, rows = detection([2.0] if fast else [1.2, 1.5, 2.0], runs, steps)
    figure.savefig(options.output / "phase_detection.png", dpi=120)
    report = REPORT.format(
        rows="\n".join(rows),
        sizes="\n".join(by_size(runs)),
        headings=" | ".join(f"x {size:g}" for size in SIZES),
        dashes="|".join(["---:"] * len(SIZES)),
        alarms="\n".join(false_alarms(runs, steps)),
        asked=" | ".join(f"{rate:g} asked for" for rate in RATES),
        own=", ".join(own_step(100 if fast else 2000)),
        overhead="\n".join(overhead(10, 1, batch=4, width=16) if fast else overhead(28, 5)),
        spread=SPREAD,
        after=AFTER,
        torch=torch.__version__,
    )
    (options.output / "phases.md").write_text(report)
    print(report)


REPORT = """# Detectors of critical phases

Made by `python -m benchmarks.phases`. Norms are log-normal with a standard deviation of {spread} of the logarithm, as
gradient norms of small networks have about; their level changes once.

## False alarms against delay

![Detection curves](phase_detection.png)

A false alarm is a phase that becomes critical while nothing changes; a change is noticed if one does so within {after}
steps. 200 runs each. Down and to the left is better. Detectors that call 30 % or more of the stationary steps critical
are left out of the figure.

| detector | threshold | change | false alarms in 1,000 steps | critical for nothing | noticed | median delay |
|---|---:|---:|---:|---:|---:|---:|
{rows}

## By the size of the change

Share of changes that are noticed within {after} steps, and the median delay in steps, by detectors at their defaults or
the threshold that is named. 200 runs each, so shares are known to within 7 %. "x 1" is no change at all: what false
alarms alone would find. Where norms hang together, a change of the level is small beside how far they wander by
themselves, and is told from the one jump that it begins with.

| detector | noise of the log-norm | {headings} |
|---|---|{dashes}|
{sizes}

## The rate that was asked for

Alarms in 1,000 steps of 200 stationary runs, those in critical phases counted too, with 95 % intervals, by the kind of
their noise. `page_hinkley` of the default order, which learns how norms hang together, at three rates; with order 0,
which takes them for independent, at 1; and SelSync's `relative_change` at its published threshold, which is critical in
the first 25 steps and hardly ever again.

The default's rate holds within a tenth at 1 and a fifth at 5 where norms are independent, keep up to 0.9 of themselves,
or have heavy tails. Where they keep 0.95 and more, a slow part is under noise, or noise is skewed, up to half more
alarms come.

| noise of the log-norm | {asked} | order 0, 1 asked for | relative_change, 0.3 |
|---|---:|---:|---:|---:|---:|
{alarms}

## What it costs

A step of ResNet18 with batches of 32 images of 32x32 pixels on one core, torch {torch}: CPU time that the callback
spends in each, as a share of the rest of the step in the same run; the median of five runs, and the least and the most.
The last row adds what half batches take, a further forward and backward pass on a copy of the module, at the default
``noise_every``.

| CriticalPhase | of a step | from to |
|---|---:|---:|
{overhead}

A detector's own update takes, in microseconds of CPU time:
{own}.
"""


if __name__ == "__main__":
    main()
