"""Does `fedscale size` find what trying all settings finds, and what does it take?

    python -m benchmarks.sizing                      about two hours; writes results/sizing.md
    python -m benchmarks.sizing --tasks digits       one task, some 20 minutes
    python -m benchmarks.sizing --fast               only to see that it runs

For each task every setting of a grid trains at the whole budget, once; then `size` is given the same axes and a small
part of the time and of the compute that the grid took. The grid's best settings and the chosen one then train with
the same fresh seeds, for a best of hundreds by one seed flatters.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from benchmarks.sizing_tasks import TASKS, Task
from benchmarks.tasks import Unavailable
from lightning_fedscale.study import Answer, size
from lightning_fedscale.study.answer import Result, results_of
from lightning_fedscale.study.arguments import methods_of, partition_of
from lightning_fedscale.study.ledger import Ledger
from lightning_fedscale.study.loaders import train_loader
from lightning_fedscale.study.race import Job
from lightning_fedscale.study.settings import Setting
from lightning_fedscale.study.trial import Executing, Project

RESULTS = Path(__file__).parent / "results"
TIME, COMPUTE = 0.15, 0.2
"""Shares of the grid's that the study may take."""
SEEDS, RERUN = 4, 4
"""Fresh seeds of the settings that are compared, and how many of the grid's best these are."""


class Compared(NamedTuple):
    """A task's outcome.

    Attributes:
        chosen: the study's best setting, against the grid's best.
        grid: the grid's best setting.
        settings: of the grid.
        minutes: of the grid.
        answer: of the study.
        shares: compute of the study's runs, in whole budgets.
    """

    chosen: Result
    grid: Result
    settings: int
    minutes: float
    answer: Answer
    shares: float


def project_of(task: Task) -> Project:
    """What the grid trains: as `size` does it."""
    held, _ = partition_of(task.partition(), None, train_loader(None, task.data()).dataset)
    return Project(
        task.module, task.data, argument="width", partition=held, clients_per_round=None,
        methods=methods_of(task.space["methods"]), flops=task.flops, seed=0, loss=None, trainer={"accelerator": "cpu"},
    )  # fmt: skip


class Runs:
    """Runs of the grid, kept in a file; each by the executor that is faster."""

    def __init__(self, project: Project, ledger: Ledger) -> None:
        self._project, self._ledger = project, ledger
        self._faster: dict[tuple[int, int], Executing] = {}

    def row(self, setting: Setting, seed: int) -> dict[str, Any]:
        """A run at the whole budget."""
        job = Job(setting, 1.0, seed)
        row = self._ledger.get(job)
        if row is None:
            row = self._project.run(job, self._executor(setting))
            self._ledger.add(job, row)
        return row

    def _executor(self, setting: Setting) -> Executing:
        kind = setting.size, setting.batch_size
        if kind not in self._faster:
            names: tuple[Executing, ...] = ("sequential", "vectorized")
            self._faster[kind] = min(names, key=lambda name: self._of_rounds(setting, name))
        return self._faster[kind]

    def _of_rounds(self, setting: Setting, name: Executing) -> float:
        """Seconds of twenty rounds, without what is spent once."""
        few, many = (self._project.run(Job(setting, 1.0, 0), name, rounds=rounds)["seconds"] for rounds in (4, 24))
        return float(many - few)


def compare(name: str, task: Task, folder: Path, seeds: int, say: Callable[[str], None]) -> Compared:
    """Try all settings, then ask `size`, and train the best of both with so many fresh seeds."""
    project = project_of(task)
    made_for = {"task": name, "flops": task.flops, "fingerprint": project.partition.fingerprint}
    runs = Runs(project, Ledger(folder / name / "grid", made_for))
    axes = [task.space[each] for each in ("sizes", "methods", "batch_sizes", "local_steps", "rates")]
    settings = [Setting(*each) for each in product(*axes)]
    rows = []
    for place, setting in enumerate(settings):
        rows.append(runs.row(setting, 0))
        say(f"{name}: {place + 1} of {len(settings)}: {setting}: {rows[-1]['loss']:.4f}")
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    answer = size(
        task.module, task.data, task.flops, argument="width", partition=project.partition,
        folder=folder / name / "study", study_minutes=TIME * minutes,
        study_flops=COMPUTE * len(settings) * task.flops, trainer={"accelerator": "cpu"}, say=say,
        **_space(task),
    )  # fmt: skip
    best = sorted(zip(settings, rows, strict=True), key=lambda each: each[1]["loss"])[:RERUN]
    compared = dict.fromkeys([answer.best.setting, *(setting for setting, _ in best)])
    table = pd.DataFrame([runs.row(setting, seed) for setting in compared for seed in range(1, seeds + 1)])
    found = results_of(table, project.partition.sizes)
    chosen = next(each for each in found if each.setting == answer.best.setting)
    of_grid = next(each for each in found if each.setting in dict(best))
    kept = pd.read_csv(folder / name / "study" / "runs.csv")
    return Compared(chosen, of_grid, len(settings), minutes, answer, float(kept["share"].sum()))


def _space(task: Task) -> dict[str, Any]:
    return {**task.space, "current": max(task.space["sizes"]) // 2}


def small(task: Task) -> Task:
    """Only to see that it runs."""
    one = {"batch_sizes": task.space["batch_sizes"][:1], "local_steps": [2], "rates": [1.0]}
    space = {**task.space, "sizes": [16, 32], "methods": ["fed_avg", "scaffold"], **one}
    return task._replace(flops=task.flops / 50, space=space)


def page(found: dict[str, Compared], missing: dict[str, str]) -> str:
    """Markdown."""
    head = (
        "| task | grid: settings, minutes | study: runs, minutes, compute | grid's best | chosen |"
        " more than the grid's best | present model, FedAvg |"
    )
    lines = [
        "# Does `fedscale size` find what trying everything finds?", "",
        f"Every setting of the grid trains once at the whole budget; the study has the same axes, {TIME:.0%} of the",
        f"grid's time and {COMPUTE:.0%} of its compute, or what it needs at least. Losses are means over the same",
        "fresh seeds of both, which chose neither; intervals are 95 %, by one spread for all. The study's minutes and",
        "compute are shares of the grid's. `python -m benchmarks.sizing`", "",
        head, "|" + "---|" * (head.count("|") - 1),
    ]  # fmt: skip
    for name, each in found.items():
        more = each.chosen.loss - each.grid.loss
        half = max(each.chosen.high - each.chosen.loss, 0.0) * 2**0.5
        now = each.answer.current[0] if each.answer.current else None
        lines.append(
            f"| {name} | {each.settings}, {each.minutes:.1f} | {each.answer.runs}, {each.answer.minutes:.1f}"
            f" ({each.answer.minutes / each.minutes:.0%}), {each.shares / each.settings:.0%} |"
            f" {_told(each.grid)} | {_told(each.chosen)} | {more:+.4f} ({more - half:+.4f} to {more + half:+.4f}) |"
            f" {'' if now is None else f'width {now.setting.size}: {now.behind:+.3f}'} |"
        )
    lines += [f"| {name} | not run: {reason} |" + " |" * 5 for name, reason in missing.items()]
    return "\n".join([*lines, ""])


def _told(result: Result) -> str:
    size, method, batch, steps, rate = result.setting
    return (
        f"width {size}, {method}, batch {batch}, {steps} steps, rate {rate:g}:"
        f" {result.loss:.4f} ({result.low:.4f} to {result.high:.4f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--folder", type=Path, default=Path(".bench/sizing"), help="for runs; what is there stays")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found, missing = dict[str, Compared](), dict[str, str]()
    for name in args.tasks.split(","):
        task = small(TASKS[name]) if args.fast else TASKS[name]
        try:
            folder, seeds = (args.folder / "fast", 2) if args.fast else (args.folder, SEEDS)
            found[name] = compare(name, task, folder, seeds, lambda line: print(line, flush=True))
        except Unavailable as reason:
            missing[name] = str(reason)
    text = page(found, missing)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "sizing.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
