"""What a study found: the best setting, what is as good, and what stayed open."""

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
    """A setting at the full budget.

    Attributes:
        setting: how it trained.
        loss: mean over seeds; over those that did not choose it, where there are any.
        low: lower end of its 95 % interval by seeds; NaN with one seed alone.
        high: upper end.
        behind: how much more that is than the best setting's; 0 for that.
        behind_low: lower end of the difference's 95 % interval.
        behind_high: upper end.
        seeds: how many the loss is of.
        params: that are trained.
        rounds: until the budget was spent.
        passes: over all clients' data.
        most_passes: over the data of the client that has least.
        bytes: sent and received by a client.
        worst: largest loss of a client on the data that it trained on; NaN where not measured.
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
        """Whether the best setting is not shown to be better."""
        return self.behind_low <= 0


@dataclass(frozen=True)
class Answer:
    """What a study found.

    Attributes:
        argument: of the module, that makes it larger.
        flops: of all clients together.
        clients: how many hold data.
        results: all settings that trained with the full budget, best first.
        current: those of the current size: the best with FedAvg, and the best with any method; empty without one.
        notes: what is doubtful, or was left out, in words.
        strategy: expression for the best.
        study: what it was made for: module, data, partition (name, fingerprint, samples, mean distance of labels), and
            the methods, by what makes two runs ones of the same method.
        runs: how many were made, those with less of the budget included.
        minutes: that they took, one after the other.
        study_flops: that they computed in training.
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
        """Values of a setting's part with which the best setting is not shown to be better, ascending."""
        return sorted({getattr(each.setting, name) for each in self.results if each.is_even})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("results", "current")},
            "best": _plain(self.best),
            "even": {name: self.even(name) for name in AXES},
            "current": [_plain(each) for each in self.current],
            "results": [_plain(each) for each in self.results],
        }


def results_of(rows: pd.DataFrame, sizes: IntArray) -> list[Result]:
    """Settings at the full budget, best first.

    The seed 0 of each chose who went on, and flatters: where a setting has others, these count. The spread of seeds is
    taken to be the same for all settings, and is pooled over them.

    Args:
        rows: of a ledger, with the full budget.
        sizes: samples of each client.

    Raises:
        ValueError: if all diverged.
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
    """The best of a size with FedAvg, and the best with any method."""
    own = [each for each in results if each.setting.size == size]
    plain = [each for each in own if each.setting.method == FED_AVG]
    return tuple(dict.fromkeys([*plain[:1], *own[:1]]))


def _cells(rows: pd.DataFrame) -> list[tuple[Setting, pd.DataFrame]]:
    found: dict[Setting, list[int]] = {}
    for place, values in enumerate(zip(*(rows[name].tolist() for name in AXES), strict=True)):
        found.setdefault(Setting(*values), []).append(place)
    return [(setting, rows.iloc[places]) for setting, places in found.items()]


def _pooled(groups: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> tuple[float, int]:
    """Standard deviation within groups, and its degrees of freedom."""
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
