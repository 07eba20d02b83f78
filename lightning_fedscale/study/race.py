"""The schedule of a study: many settings train with a small budget, few with all of it, the best with several seeds.

It is successive halving (arXiv 1502.07943) with three changes. Small budgets favour small models, so the best of every
size, method and rate stays until the end. Small budgets also favour large rates if the full budget overfits the data:
the full budget at the rate times the fraction follows the same path in more, smaller steps. Every stage therefore tries
the best setting at both rates, and applies the better rule to the other settings. Finally, values between those of the
grid are tried around the best setting at the full budget, one field at a time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

from lightning_fedscale.study.settings import FED_AVG, Setting, Space, best_of_each, without_duplicates

_TIMES = 3
"""Ratio of the budgets of successive stages."""

FEWEST_ROUNDS = 3
"""Fewest rounds of a run; with fewer, it does not show the effect of local steps."""

_OF_FIELD, _OF_SEEDS = 0.4, 0.25
"""Fractions of the final's time (half of the total) for the remaining settings, and for other seeds of the best; the
rest is for the neighbours of the best."""

_MOST_FINALISTS = 8

_TURNS = ("rate", "local_steps", "batch_size", "method", "size")
"""The fields that are varied around the best setting, the cheapest first."""


class Job(NamedTuple):
    """A run to do.

    Attributes:
        setting: the setting to train.
        share: fraction of the budget.
        seed: index of the seed, from 0.
    """

    setting: Setting
    share: float
    seed: int


class Measured(NamedTuple):
    """The result of a finished run.

    Attributes:
        loss: validation loss; infinite if training diverged.
        seconds: seconds that are charged for it.
    """

    loss: float
    seconds: float


Measure = Callable[[Sequence[Job]], Sequence[Measured]]
"""A function that does the runs."""


class Prices(NamedTuple):
    """The predicted cost of runs.

    Attributes:
        seconds: predicts the seconds of a setting with a fraction of the budget.
        rounds: predicts the rounds of a setting with a fraction of the budget.
        workers: number of runs at the same time.
    """

    seconds: Callable[[Setting, float], float]
    rounds: Callable[[Setting, float], float]
    workers: int = 1

    def of(self, jobs: Iterable[Job]) -> float:
        """Predict the seconds until all jobs have run."""
        return sum(self.seconds(each.setting, each.share) for each in jobs) / self.workers

    def affordable(self, jobs: Iterable[Job], seconds: float, least: int = 1) -> list[Job]:
        """Return as many of the first jobs as fit into the time, but at least ``least``."""
        found, spent = list[Job](), 0.0
        for job in jobs:
            spent += self.of([job])
            if len(found) >= least and spent > seconds:
                break
            found.append(job)
        return found


class Race:
    """The runs of a study, within a time limit.

    Args:
        space: the settings to try.
        anchors: settings of the current model, which take part at any cost.
        seconds: time for all runs.
        seeds: number of seeds of the finalists, besides the one that selects them.
        prices: predicted cost of runs, evaluated again before every stage.
        measure: does the runs.

    Attributes:
        losses: losses by fraction of the budget and setting, for the seed that selects.
    """

    def __init__(
        self, space: Space, anchors: Sequence[Setting], seconds: float, seeds: int, prices: Prices, measure: Measure
    ) -> None:
        self.space, self.anchors, self.seconds, self.seeds = space, list(anchors), seconds, seeds
        self.prices, self._measure = prices, measure
        self.losses: dict[float, dict[Setting, float]] = {}
        self._spent = 0.0

    @property
    def shares(self) -> list[float]:
        """Budget fractions of the stages, ascending to 1; the first gives a third of the settings enough rounds."""
        found, settings = [1.0], list(self.space.spread())
        while len(found) < 4:
            share = found[0] / _TIMES
            long_enough = sum(self.prices.rounds(each, share) >= FEWEST_ROUNDS for each in settings)
            if long_enough < len(settings) / 3:
                break
            found.insert(0, share)
        return found

    def plan(self) -> list[Job]:
        """Estimate the runs that fit into the time; the settings of later stages are not known in advance."""
        jobs, shares = list[Job](), self.shares
        entrants = self._entrants()
        for share in shares[:-1]:
            jobs += self.prices.affordable((Job(each, share, 0) for each in entrants), self._stage_seconds(shares))
        finalists = self.prices.affordable(
            (Job(each, 1.0, seed) for each in entrants for seed in range(self.seeds + 1)), self.seconds / 2
        )
        return jobs + finalists

    def run(self) -> dict[Setting, float]:
        """Do all runs.

        Returns:
            the losses at the full budget, for the seed that selects.
        """
        shares = self.shares
        going = self._entrants()
        until = begun = 0.0
        for share, following in pairwise(shares):
            until += self._stage_seconds(shares)
            jobs = self._new(Job(each, share, 0) for each in going)
            self._make(self.prices.affordable(jobs, until - self._spent, len(self.anchors)))
            # Settings with too few rounds at this budget enter later.
            waiting = [each for each in going if self.prices.rounds(each, share) < FEWEST_ROUNDS]
            begun = self._spent
            going = self._at_rates(self._promoted(share, waiting) or going, share, following)
        self._final(going, begun)
        return self.losses[1.0]

    def _entrants(self) -> list[Setting]:
        long_enough = (each for each in self.space.spread() if self.prices.rounds(each, 1.0) >= FEWEST_ROUNDS)
        return without_duplicates([*self.anchors, *long_enough])

    def _stage_seconds(self, shares: Sequence[float]) -> float:
        return self.seconds / 2 / max(1, len(shares) - 1)

    def _promoted(self, share: float, waiting: Sequence[Setting]) -> list[Setting]:
        """Order the settings for the next stage: the best, the current model, the best of each size, method and rate.

        Of the others, waiting settings alternate with those that have run, the best of these first.
        """
        losses = {each: loss for each, loss in self.losses.get(share, {}).items() if math.isfinite(loss)}
        ordered = sorted(losses, key=lambda each: losses[each])
        others = [each for pair in zip_longest(ordered, waiting) for each in pair if each is not None]
        return without_duplicates([
            *ordered[:1], *self._present(losses), *best_of_each(losses, ["size"]), *best_of_each(losses, ["method"]),
            *best_of_each(losses, ["rate"]), *others,
        ])  # fmt: skip

    def _at_rates(self, going: Sequence[Setting], share: float, following: float) -> list[Setting]:
        """Return the settings for the next stage, with rates for its larger budget.

        Rates stay the same unless the best setting is better at a lower rate, with which it covers the same path in
        smaller steps. Then the paths of the others are limited to that length too, or to their own if it is longer.
        """
        known = {each for each, loss in self.losses.get(share, {}).items() if math.isfinite(loss)}
        first = next((each for each in going if each in known), None)
        if first is None:
            return list(going)

        def path(each: Setting, of: float) -> float:
            return each.rate * each.local_steps * self.prices.rounds(each, of)

        def slower(each: Setting) -> Setting:
            if each not in known:
                return each
            whole = path(each, following)
            far = min(max(path(first, share), path(each, share)), whole)
            return each._replace(rate=float(f"{each.rate * far / whole:.3g}"))

        self._make(self._new(Job(each, following, 0) for each in (first, slower(first))))
        there = self.losses.get(following, {})
        if there.get(slower(first), math.inf) >= there.get(first, math.inf):
            return list(going)
        return without_duplicates([slower(first), first, *map(slower, going)])

    def _new(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs that have not run and that have enough rounds."""
        return [
            job for job in dict.fromkeys(jobs)
            if job.setting not in self.losses.get(job.share, {})
            and self.prices.rounds(job.setting, job.share) >= FEWEST_ROUNDS
        ]  # fmt: skip

    def _present(self, losses: dict[Setting, float]) -> list[Setting]:
        """Return the best settings of the current size with FedAvg, and with any method."""
        if not self.anchors:
            return []
        current = {each: loss for each, loss in losses.items() if each.size == self.anchors[0].size}
        plain = {each: loss for each, loss in current.items() if each.method == FED_AVG}
        return [min(some, key=lambda each: some[each]) for some in (plain, current) if some]

    def _final(self, going: Sequence[Setting], begun: float) -> None:
        """Do the runs with the full budget, starting at time ``begun``."""
        time = max(self.seconds / 2, self.seconds - begun)
        field = self._new(Job(each, 1.0, 0) for each in going)
        self._make(self.prices.affordable(field, begun + time * _OF_FIELD - self._spent, 1 + 2 * bool(self.anchors)))
        self._climb(begun + time, time * _OF_SEEDS)
        self._make(self._present_at_best())
        self._make(self.prices.affordable(self._finals(), begun + time - self._spent, self._fewest_finals))

    def _present_at_best(self) -> list[Job]:
        """Return jobs of the current size with the best setting's other fields, with FedAvg and with its method."""
        losses = self.losses.get(1.0, {})
        at = min(losses, key=lambda each: losses[each], default=None)
        if at is None or not self.anchors:
            return []
        here = at._replace(size=self.anchors[0].size)
        return self._new([Job(here._replace(method=self.anchors[0].method), 1.0, 0), Job(here, 1.0, 0)])

    @property
    def _fewest_finals(self) -> int:
        return self.seeds * (1 + 2 * bool(self.anchors))

    def _finals(self) -> list[Job]:
        """Return jobs with other seeds, of the best setting, the current ones, and the next best."""
        losses = {each: loss for each, loss in self.losses.get(1.0, {}).items() if math.isfinite(loss)}
        best = sorted(losses, key=lambda each: losses[each])
        finalists = without_duplicates([*best[:1], *self._present(losses), *best])[:_MOST_FINALISTS]
        return [Job(each, 1.0, seed) for each in finalists for seed in range(1, self.seeds + 1)]

    def _climb(self, end: float, for_seeds: float) -> None:
        """Vary one field of the best setting after another while this improves it and leaves time for the seeds."""
        names, idle = deque(_TURNS), 0
        while idle < len(names):
            losses = self.losses.get(1.0, {})
            at = min(losses, key=lambda each: losses[each], default=None)
            if at is None or not math.isfinite(losses[at]):
                return
            around = self._new(Job(each, 1.0, 0) for each in self.space.neighbours(at, names[0]))
            # The finals may be of any of these, so the dearest counts.
            dearest = max((self.prices.of([each]) for each in around), default=0.0) - self.prices.of([Job(at, 1.0, 1)])
            finals = self.prices.of(self._finals()[: self._fewest_finals]) + self.seeds * max(0.0, dearest)
            needed = max(for_seeds, finals) + self.prices.of(self._present_at_best())
            self._make(self.prices.affordable(around, end - needed - self._spent, 0))
            if min(losses.values()) < losses[at]:
                idle = 0  # continue with this field
            else:
                names.rotate(-1)
                idle += 1

    def _make(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        found = self._measure(jobs)
        self._spent += sum(each.seconds for each in found) / self.prices.workers
        for job, each in zip(jobs, found, strict=True):
            if job.seed == 0:
                self.losses.setdefault(job.share, {})[job.setting] = each.loss
