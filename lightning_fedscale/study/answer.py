"""The result of a study: the best setting, those that are as good, and what is undetermined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from lightning_fedscale.partitioners.partition import IntArray
from lightning_fedscale.study.settings import FED_AVG, Setting

AXES = ("size", "method", "batch_size", "local_steps", "rate")


@dataclass(frozen=True)
class Result:
    """The result of a setting at the full budget.

    Attributes:
        setting: the setting.
        loss: mean over seeds, without the seed that selected the setting if there are others.
        low: lower end of its 95 % interval over seeds; NaN if no setting has several seeds.
        high: upper end.
        behind: loss minus that of the best setting; 0 for the best one.
        behind_low: lower end of the difference's 95 % interval.
        behind_high: upper end.
        seeds: number of seeds in the loss.
        params: number of trained parameters.
        rounds: rounds until the budget was spent.
        passes: passes over the data of all clients.
        most_passes: passes over the data of the client with the fewest samples.
        bytes: bytes sent and received by a client.
        worst: largest loss of a client on its training data; NaN if it was not measured.
    """

    setting: Setting
    loss: float
    low: float
    high: float
    behind: float
    behind_low: float
    behind_high: float
    seeds: int
    params: float
    rounds: float
    passes: float
    most_passes: float
    bytes: float
    worst: float

    @property
    def is_even(self) -> bool:
        """Whether the best setting is not significantly better."""
        return self.behind_low <= 0


@dataclass(frozen=True)
class Answer:
    """The result of a study.

    Attributes:
        argument: the module's argument that sets its size.
        flops: compute of all clients together.
        clients: number of clients in the partition.
        results: all settings that trained with the full budget, best first.
        current: the results of the current size: the best with FedAvg, and the best with any method; empty without a
            current size.
        notes: doubts and omissions, in words.
        strategy: Python expression of the best setting's strategy.
        study: what the study was made for: module, data, partition (name, fingerprint, samples, mean distance of
            labels), and the options of each method, which identify it.
        runs: number of runs, including those with less than the full budget.
        minutes: sum of the runs' minutes.
        study_flops: sum of the runs' training FLOPs.
    """

    argument: str
    flops: float
    clients: int
    results: tuple[Result, ...]
    current: tuple[Result, ...]
    notes: tuple[str, ...]
    strategy: str
    study: Mapping[str, Any]
    runs: int
    minutes: float
    study_flops: float

    @property
    def best(self) -> Result:
        """The setting with the least loss."""
        return self.results[0]

    def even(self, name: str) -> list[Any]:
        """Return a field's values among the settings that are as good as the best, ascending."""
        return sorted({getattr(each.setting, name) for each in self.results if each.is_even})

    def as_dict(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("results", "current")},
            "best": _plain(self.best),
            "even": {name: self.even(name) for name in AXES},
            "current": [_plain(each) for each in self.current],
            "results": [_plain(each) for each in self.results],
        }


def results_of(rows: pd.DataFrame, sizes: IntArray) -> list[Result]:
    """Return the results of the settings at the full budget, best first.

    Seed 0 selected the settings, so its losses are too low: if a setting has other seeds, only these count. The
    standard deviation over seeds is assumed to be the same for all settings, and is pooled over them.

    Args:
        rows: rows of a ledger with the full budget.
        sizes: number of samples of each client.

    Raises:
        ValueError: if all settings diverged.
    """
    sample = {setting: cell for setting, cell in _cells(rows) if math.isfinite(cell["loss"].mean())}
    if not sample:
        raise ValueError(
            "size: every setting diverged at the full budget: pass smaller rates, such as rates=[0.01, 0.03, 0.1]."
        )
    fresh = {setting: cell.loc[cell["seed"] > 0, "loss"].to_numpy(float) for setting, cell in sample.items()}
    first = {setting: cell.loc[cell["seed"] == 0, "loss"].to_numpy(float) for setting, cell in sample.items()}
    spread, free = _pooled(list(fresh.values()))
    wide = float(student.ppf(0.975, free)) * spread if free else math.nan
    tried = [each for each in sample if len(fresh[each])] or list(sample)
    mean = {each: float((fresh[each] if len(fresh[each]) else first[each]).mean()) for each in sample}
    best = min(tried, key=lambda each: mean[each])
    found = []
    for setting, cell in sample.items():
        is_fresh = len(fresh[setting]) > 0
        seeds, others = (len(fresh[setting]), len(fresh[best])) if is_fresh else (1, 1)
        base = mean[best] if is_fresh or not len(first[best]) else float(first[best].mean())
        behind = 0.0 if setting == best else mean[setting] - base
        half = 0.0 if setting == best else wide * math.sqrt(1 / seeds + 1 / max(1, others))
        found.append(
            Result(
                setting,
                mean[setting],
                mean[setting] - wide / math.sqrt(seeds),
                mean[setting] + wide / math.sqrt(seeds),
                behind,
                behind - half,
                behind + half,
                seeds,
                float(cell["params"].mean()),
                float(cell["rounds"].mean()),
                float(cell["samples"].mean() / sizes.sum()),
                float(cell["samples"].mean() / np.count_nonzero(sizes) / sizes[sizes > 0].min()),
                float(cell["bytes"].mean()),
                float(cell["worst"].mean()),
            )
        )
    return sorted(found, key=lambda each: (each.setting != best, each.behind))


def current_of(results: Sequence[Result], size: int | None) -> tuple[Result, ...]:
    """Return the best result of a size with FedAvg, and the best with any method."""
    own = [each for each in results if each.setting.size == size]
    plain = [each for each in own if each.setting.method == FED_AVG]
    return tuple(dict.fromkeys([*plain[:1], *own[:1]]))


def _cells(rows: pd.DataFrame) -> list[tuple[Setting, pd.DataFrame]]:
    found: dict[Setting, list[int]] = {}
    for place, values in enumerate(zip(*(rows[name].tolist() for name in AXES), strict=True)):
        found.setdefault(Setting(*values), []).append(place)
    return [(setting, rows.iloc[places]) for setting, places in found.items()]


def _pooled(groups: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> tuple[float, int]:
    """Return the standard deviation within groups, and its degrees of freedom."""
    free = sum(max(0, len(each) - 1) for each in groups)
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in groups if len(each))
    return (math.sqrt(squares / free) if free else math.nan), free


def _plain(result: Result) -> dict[str, Any]:
    numbers = {name: value for name, value in asdict(result).items() if name != "setting"}
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }
    return {**result.setting._asdict(), **known, "even": result.is_even}
