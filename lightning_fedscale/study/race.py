"""Which settings train with how much of the budget: many with little, few with all of it, the best with several seeds.

Successive halving (arXiv 1502.07943) with three precautions. Small budgets favour small models, so the best of every
size, method and rate stays until the end. They favour large rates as well, where the whole budget passes over the data
until they are known by heart: what a share of the budget reached at some rate, all of it reaches at that rate times the
share, on the same path in more steps. So at every stage the best is tried at both, and what is better is done with
the others. And what a grid leaves out is tried around the best at the full budget, one thing at a time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

from lightning_fedscale.study.settings import FED_AVG, Setting, Space, best_of_each, without_twins

_TIMES = 3
"""Each stage trains so many times as long as the one before."""

FEWEST_ROUNDS = 3
"""A run of fewer rounds says nothing about any number of local steps."""

_OF_FIELD, _OF_SEEDS = 0.4, 0.25
"""Of the final's time, which is half of all, for those who have come so far, and for other seeds of the best; what is
left is for the surroundings of the best."""

_MOST_FINALISTS = 8

_TURNS = ("rate", "local_steps", "batch_size", "method", "size")
"""The things that are tried around the best, the cheapest first."""


class Job(NamedTuple):
    """A run that is to be made.

    Attributes:
        setting: how it trains.
        share: of the budget.
        seed: counted from 0.
    """

    setting: Setting
    share: float
    seed: int


class Measured(NamedTuple):
    """A run that is over.

    Attributes:
        loss: infinite where training diverged.
        seconds: that it took, or counts as.
    """

    loss: float
    seconds: float


Measure = Callable[[Sequence[Job]], Sequence[Measured]]
"""Makes runs."""


class Prices(NamedTuple):
    """What runs take.

    Attributes:
        seconds: predicted, of a setting and a share.
        rounds: that a setting and a share come to.
        workers: runs that go on at a time.
    """

    seconds: Callable[[Setting, float], float]
    rounds: Callable[[Setting, float], float]
    workers: int = 1

    def of(self, jobs: Iterable[Job]) -> float:
        """Seconds until all have run."""
        return sum(self.seconds(each.setting, each.share) for each in jobs) / self.workers

    def affordable(self, jobs: Iterable[Job], seconds: float, least: int = 1) -> list[Job]:
        """As many of the first as there is time for."""
        found, spent = list[Job](), 0.0
        for job in jobs:
            spent += self.of([job])
            if len(found) >= least and spent > seconds:
                break
            found.append(job)
        return found


class Race:
    """A study's runs, as far as their time allows.

    Args:
        space: what is tried.
        anchors: settings that take part whatever they cost, the present ones first: those of the current model.
        seconds: for all runs.
        seeds: of the finalists, besides the one that chooses them.
        prices: what runs take; asked again before every stage.
        measure: makes runs.

    Attributes:
        losses: of every share: of each setting, with the seed that chooses.
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
        """Of the stages, ascending to 1: as small as a third of the settings still have some rounds in."""
        found, settings = [1.0], list(self.space.spread())
        while len(found) < 4:
            share = found[0] / _TIMES
            long_enough = sum(self.prices.rounds(each, share) >= FEWEST_ROUNDS for each in settings)
            if long_enough < len(settings) / 3:
                break
            found.insert(0, share)
        return found

    def plan(self) -> list[Job]:
        """The runs that there is time for, as far as they can be told before: who goes on is not known yet."""
        jobs, shares = list[Job](), self.shares
        entrants = self._entrants()
        for share in shares[:-1]:
            jobs += self.prices.affordable((Job(each, share, 0) for each in entrants), self._stage_seconds(shares))
        finalists = self.prices.affordable(
            (Job(each, 1.0, seed) for each in entrants for seed in range(self.seeds + 1)), self.seconds / 2
        )
        return jobs + finalists

    def run(self) -> dict[Setting, float]:
        """Make all runs.

        Returns:
            the losses at the full budget, of the seed that chooses.
        """
        shares = self.shares
        going = self._entrants()
        until = begun = 0.0
        for share, following in pairwise(shares):
            until += self._stage_seconds(shares)
            jobs = self._new(Job(each, share, 0) for each in going)
            self._make(self.prices.affordable(jobs, until - self._spent, len(self.anchors)))
            # Those for whom this was too little come in later.
            waiting = [each for each in going if self.prices.rounds(each, share) < FEWEST_ROUNDS]
            begun = self._spent
            going = self._at_rates(self._promoted(share, waiting) or going, share, following)
        self._final(going, begun)
        return self.losses[1.0]

    def _entrants(self) -> list[Setting]:
        long_enough = (each for each in self.space.spread() if self.prices.rounds(each, 1.0) >= FEWEST_ROUNDS)
        return without_twins([*self.anchors, *long_enough])

    def _stage_seconds(self, shares: Sequence[float]) -> float:
        return self.seconds / 2 / max(1, len(shares) - 1)

    def _promoted(self, share: float, waiting: Sequence[Setting]) -> list[Setting]:
        """Who goes on, the most urgent first: the best, the present model, the best of each size, method and rate.

        Of the others, those who wait take turns with those who have run, the best of these first.
        """
        losses = {each: loss for each, loss in self.losses.get(share, {}).items() if math.isfinite(loss)}
        ordered = sorted(losses, key=lambda each: losses[each])
        others = [each for pair in zip_longest(ordered, waiting) for each in pair if each is not None]
        return without_twins([
            *ordered[:1], *self._present(losses), *best_of_each(losses, ["size"]), *best_of_each(losses, ["method"]),
            *best_of_each(losses, ["rate"]), *others,
        ])  # fmt: skip

    def _at_rates(self, going: Sequence[Setting], share: float, following: float) -> list[Setting]:
        """Those who go on, at the rates that more of the budget calls for.

        That is as they are, unless the best is better on the path that it has gone, in smaller steps. Then others go no
        further than this either, but for those who are further already.
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
        return without_twins([slower(first), first, *map(slower, going)])

    def _new(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that have not run, and come to some rounds."""
        return [
            job for job in dict.fromkeys(jobs)
            if job.setting not in self.losses.get(job.share, {})
            and self.prices.rounds(job.setting, job.share) >= FEWEST_ROUNDS
        ]  # fmt: skip

    def _present(self, losses: dict[Setting, float]) -> list[Setting]:
        """The best of the current size with FedAvg, and with any method."""
        if not self.anchors:
            return []
        current = {each: loss for each, loss in losses.items() if each.size == self.anchors[0].size}
        plain = {each: loss for each, loss in current.items() if each.method == FED_AVG}
        return [min(some, key=lambda each: some[each]) for some in (plain, current) if some]

    def _final(self, going: Sequence[Setting], begun: float) -> None:
        """Runs with the whole budget, from this time on."""
        time = max(self.seconds / 2, self.seconds - begun)
        field = self._new(Job(each, 1.0, 0) for each in going)
        self._make(self.prices.affordable(field, begun + time * _OF_FIELD - self._spent, 1 + 2 * bool(self.anchors)))
        self._climb(begun + time, time * _OF_SEEDS)
        self._make(self._present_at_best())
        self._make(self.prices.affordable(self._finals(), begun + time - self._spent, self._fewest_finals))

    def _present_at_best(self) -> list[Job]:
        """The present model as the best trains, with FedAvg and with its method: what size and method cost alone."""
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
        """Runs with other seeds: of the best, of the present ones, of those that are next."""
        losses = {each: loss for each, loss in self.losses.get(1.0, {}).items() if math.isfinite(loss)}
        best = sorted(losses, key=lambda each: losses[each])
        finalists = without_twins([*best[:1], *self._present(losses), *best])[:_MOST_FINALISTS]
        return [Job(each, 1.0, seed) for each in finalists for seed in range(1, self.seeds + 1)]

    def _climb(self, end: float, for_seeds: float) -> None:
        """Around the best, one thing after the other, as long as that finds better ones, and seeds have their time."""
        names, idle = deque(_TURNS), 0
        while idle < len(names):
            losses = self.losses.get(1.0, {})
            at = min(losses, key=lambda each: losses[each], default=None)
            if at is None or not math.isfinite(losses[at]):
                return
            around = self._new(Job(each, 1.0, 0) for each in self.space.neighbours(at, names[0]))
            # Of whichever of these may come out best.
            dearest = max((self.prices.of([each]) for each in around), default=0.0) - self.prices.of([Job(at, 1.0, 1)])
            finals = self.prices.of(self._finals()[: self._fewest_finals]) + self.seeds * max(0.0, dearest)
            needed = max(for_seeds, finals) + self.prices.of(self._present_at_best())
            self._make(self.prices.affordable(around, end - needed - self._spent, 0))
            if min(losses.values()) < losses[at]:
                idle = 0  # and further in this direction
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
