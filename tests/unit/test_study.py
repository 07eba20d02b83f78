"""The race of `lightning_fedscale.study` on losses that are known, its prices, its statistics."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

import lightning_fedscale
from lightning_fedscale import FederatedStrategy
from lightning_fedscale.study import METHODS
from lightning_fedscale.study.answer import current_of, results_of
from lightning_fedscale.study.cost import Cost
from lightning_fedscale.study.ledger import Ledger
from lightning_fedscale.study.methods import expression_of, options_of
from lightning_fedscale.study.race import Job, Measured, Prices, Race
from lightning_fedscale.study.settings import FED_AVG, Setting, Space, ladder

FLOPS, CLIENTS, NOISE = 5e10, 8, 0.006
SPACE = Space(ladder(256), (FED_AVG, "scaffold", "fed_prox", "fed_avgm"), (32, 128), (5, 20), (0.25, 1.0, 4.0))
PRESENT = Setting(256, FED_AVG, 32, 5, 1.0)


def rounds(setting: Setting, share: float) -> float:
    return share * FLOPS / (1600 * setting.size * setting.batch_size * setting.local_steps * CLIENTS)


def seconds(setting: Setting, share: float) -> float:
    """Small models are slow: they take many batches."""
    return 0.5 + share * FLOPS * (5e-4 / (1600 * setting.size * setting.batch_size) + 1 / 2e10)


class Task:
    """A loss for every setting, in which each method has a best size, rate, batch and number of steps of its own."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.noise = np.random.default_rng(seed + 1000)
        self.best = {
            method: (draw.uniform(math.log(16), math.log(512)), draw.uniform(0, 0.15), *draw.normal(0, 0.9, 3))
            for method in SPACE.methods
        }
        self.fresh: dict[Setting, list[float]] = {}

    def loss(self, setting: Setting, share: float) -> float:
        size, behind, rate, batch, steps = self.best[setting.method]
        size += 0.5 * math.log(share)  # the best size grows with compute
        pace = math.log(setting.rate) - rate + 0.2 * (math.log(setting.size) - size)
        return (
            1.4 + behind + 0.3 * (share**-0.25 - 1) + 0.03 * (math.log(setting.size) - size) ** 2 + 0.02 * pace**2
            + 0.01 * (math.log(setting.batch_size / 64) - batch) ** 2
            + 0.01 * (math.log(setting.local_steps / 10) - steps) ** 2
        )  # fmt: skip

    def measure(self, jobs: Sequence[Job]) -> list[Measured]:
        found = [
            Measured(
                self.loss(each.setting, each.share) + NOISE * self.noise.normal(), seconds(each.setting, each.share)
            )
            for each in jobs
        ]
        for job, each in zip(jobs, found, strict=True):
            if job.share == 1 and job.seed > 0:
                self.fresh.setdefault(job.setting, []).append(each.loss)
        return found

    def chosen(self) -> Setting:
        return min(self.fresh, key=lambda each: float(np.mean(self.fresh[each])))


class Repeated(Task):
    """Few data, passed over until they are known by heart: loss is least after a path of some length."""

    def loss(self, setting: Setting, share: float) -> float:
        size, behind, rate, _, steps = self.best[setting.method]
        path = math.log(setting.rate * share) - rate - 0.7 * math.log(setting.size * setting.batch_size / 64**2)
        return (
            1.4 + behind + 0.03 * (math.log(setting.size) - size) ** 2
            + (0.06 if path > 0 else 0.1 / (1 + 0.3 * abs(path))) * path**2
            + 0.01 * (math.log(setting.local_steps / 10) - steps) ** 2
        )  # fmt: skip


def race_of(task: Task, time: float, present: Sequence[Setting] = (PRESENT,)) -> Race:
    return Race(SPACE, present, time, 3, Prices(seconds, rounds, 2), task.measure)


@pytest.mark.parametrize(("kind", "behind_by", "missed"), [(Task, NOISE / 2, 2), (Repeated, NOISE, 6)])
def test_a_race_finds_what_the_whole_grid_would_at_a_quarter_of_its_cost(
    kind: type[Task], behind_by: float, missed: int
) -> None:
    """Settings of the grid that are within the noise of a run of the best one count as found."""
    grid = [each for each in SPACE.spread() if rounds(each, 1.0) >= 3]
    whole = sum(seconds(each, 1.0) for each in grid)
    behind = []
    for seed in range(20):
        task = kind(seed)
        race = race_of(task, whole / 4 / 2)  # two workers
        race.run()
        assert race._spent * 2 < whole / 4 * 1.05
        behind.append(task.loss(task.chosen(), 1.0) - min(task.loss(each, 1.0) for each in grid))
    assert np.median(behind) < behind_by
    assert sum(each > 2 * NOISE for each in behind) <= missed


def test_what_a_share_reached_is_tried_at_a_smaller_rate() -> None:
    """At a third of the budget a large rate is best, and with all of it the third of that rate."""
    space = Space((16, 64), (FED_AVG,), (32,), (5,), (0.5, 2.0))

    def loss(setting: Setting, share: float) -> float:
        return 1 + abs(math.log(setting.rate * share * 3 / 2)) + 0.01 * math.log(setting.size)

    race = Race(
        space, [], 60.0, 2, Prices(lambda setting, share: share, rounds),
        lambda jobs: [Measured(loss(each.setting, each.share), each.share) for each in jobs],
    )  # fmt: skip
    whole = race.run()
    first, second = list(whole)[:2]
    assert first.rate == 2.0
    assert second == first._replace(rate=0.667)
    assert min(whole, key=lambda each: whole[each]).rate == pytest.approx(2 / 3, rel=0.01)


def test_what_small_budgets_mislead_about_is_tried_with_the_whole_budget() -> None:
    """The best of every size, since small budgets favour small models; the present model with FedAvg and its best."""
    task = Task(3)
    race = race_of(task, 300.0)
    whole = race.run()
    assert {each.size for each in whole} >= set(SPACE.sizes)
    assert any(each.size == PRESENT.size and each.method == FED_AVG for each in task.fresh)
    best = min(whole, key=lambda each: whole[each])
    assert {best._replace(size=PRESENT.size), best._replace(size=PRESENT.size, method=FED_AVG)} <= set(whole)
    assert len(race.shares) == 4
    assert race.shares[0] < 0.05


def test_settings_that_small_budgets_do_not_reach_come_in_later() -> None:
    task = Task(4)
    race = race_of(task, 600.0)
    race.run()
    first, last = race.shares[0], race.shares[-2]
    late = [each for each in race.losses[last] if rounds(each, first) < 3]
    assert late
    assert not set(late) & set(race.losses[first])


def test_settings_that_diverge_leave_the_race() -> None:
    task = Task(5)

    def measure(jobs: Sequence[Job]) -> list[Measured]:
        return [
            each._replace(loss=math.inf) if job.setting.rate >= 1 else each
            for job, each in zip(jobs, task.measure(jobs), strict=True)
        ]

    race = Race(SPACE, [PRESENT], 200.0, 2, Prices(seconds, rounds), measure)
    whole = race.run()
    assert min(whole, key=lambda each: whole[each]).rate < 1


def test_a_race_of_which_all_diverge_ends() -> None:
    race = Race(
        SPACE, [PRESENT], 100.0, 2, Prices(seconds, rounds), lambda jobs: [Measured(math.inf, 1.0) for _ in jobs]
    )
    assert all(math.isinf(loss) for loss in race.run().values())


def test_settings_that_diverge_with_little_are_not_given_up() -> None:
    """Where all do, nobody has lost yet, and nobody waits: all go on."""
    small = Space((16, 32), (FED_AVG,), (32,), (5,), (1.0,))

    def measure(jobs: Sequence[Job]) -> list[Measured]:
        return [Measured(1.0 if each.share == 1 else math.inf, 1.0) for each in jobs]

    assert Race(small, [], 600.0, 2, Prices(seconds, rounds), measure).run()


def test_the_plan_is_of_about_what_runs() -> None:
    task, made = Task(6), list[Job]()
    race = race_of(task, 400.0)
    planned = race.plan()
    measure = race._measure

    def counted(jobs: Sequence[Job]) -> Sequence[Measured]:
        made.extend(jobs)
        return measure(jobs)

    race._measure = counted
    race.run()
    assert len(made) == pytest.approx(len(planned), rel=0.35)


def test_the_first_settings_cover_sizes_and_methods() -> None:
    settings = list(SPACE.spread())
    assert len(settings) == len(set(settings)) == SPACE.number
    cells = len(SPACE.sizes) * len(SPACE.methods)
    assert len({(each.size, each.method) for each in settings[:cells]}) == cells
    for name, values in (("rate", SPACE.rates), ("batch_size", SPACE.batch_sizes), ("local_steps", SPACE.local_steps)):
        count = pd.Series([getattr(each, name) for each in settings[: 4 * cells]]).value_counts()
        assert set(count.index) == set(values)
        assert count.min() > 4 * cells / len(values) / 2


def test_neighbours_differ_in_one_thing() -> None:
    least = Setting(1, FED_AVG, 1, 1, 1.0)
    for name in Setting._fields:
        for each in SPACE.neighbours(PRESENT, name):
            assert [
                one for one, other in zip(Setting._fields, each, strict=True) if other != getattr(PRESENT, one)
            ] == [name]
        for each in SPACE.neighbours(least, name):
            assert min(each.size, each.batch_size, each.local_steps) >= 1
    assert {each.size for each in SPACE.neighbours(PRESENT, "size")} == {181, 362}


def test_what_runs_take_is_learned_from_runs() -> None:
    """Also of sizes in between, and of settings that have not run."""
    cost = Cost(FLOPS, CLIENTS)
    for size in (16, 256, 1024):
        for share in (0.01, 0.1):
            setting = Setting(size, FED_AVG, 32, 5, 1.0)
            cost.learn(
                setting, samples=share * FLOPS / (1600 * size), flops=share * FLOPS, seconds=seconds(setting, share)
            )
    other = Setting(64, "scaffold", 128, 20, 1.0)
    assert cost.seconds(other, 1.0) == pytest.approx(seconds(other, 1.0), rel=0.02)
    assert cost.rounds(other, 0.5) == pytest.approx(rounds(other, 0.5), rel=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_expression_says(name: str) -> None:
    arguments = ast.parse(f"FederatedStrategy({', '.join(expression_of(METHODS[name]))})", mode="eval")
    names = {each: getattr(lightning_fedscale, each) for each in ("local_rules", "server")}
    made = eval(compile(arguments, "", "eval"), {"FederatedStrategy": dict, **names})
    options = options_of(METHODS[name])
    assert made.keys() == options.keys()
    for key, value in options.items():
        assert getattr(value, "call", value) == getattr(made[key], "call", made[key])
    FederatedStrategy(num_clients=2, **options)


def table_of(losses: dict[Setting, Sequence[float]]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for setting, each in losses.items():
        for seed, loss in enumerate(each):
            rows.append({
                **setting._asdict(), "share": 1.0, "seed": seed, "loss": loss, "params": 10.0 * setting.size,
                "rounds": 5, "samples": 400.0, "bytes": 1e3, "worst": 2 * loss, "flops": 1e6, "seconds": 1.0,
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_the_seed_that_chose_does_not_count_and_intervals_hold() -> None:
    """Of the difference between two settings, over many studies: the 95 % interval has the truth in it."""
    one, other, lucky = (Setting(size, FED_AVG, 8, 5, 1.0) for size in (1, 2, 4))
    draw, inside = np.random.default_rng(0), 0
    for _ in range(400):
        noise = draw.normal(0, 0.1, (2, 4))
        found = results_of(table_of({one: 1.0 + noise[0], other: 1.3 + noise[1], lucky: [0.1]}), np.array([100, 100]))
        first, second = (next(each for each in found if each.setting == setting) for setting in (one, other))
        assert found[0].setting in (one, other), "a seed of its own is not enough to be the best"
        low, high = (
            (first.behind_low, first.behind_high)
            if first is not found[0]
            else (-second.behind_high, -second.behind_low)
        )
        inside += low <= -0.3 <= high
    assert 370 <= inside <= 392


def test_settings_that_are_not_shown_to_be_worse_are_even() -> None:
    best, near, far = (Setting(size, FED_AVG, 8, 5, 1.0) for size in (1, 2, 4))
    found = results_of(
        table_of({best: [1, 0.98, 1.0, 1.02], near: [1, 0.99, 1.01, 1.03], far: [2, 1.98, 2.0, 2.02]}),
        np.array([50, 150, 0]),
    )
    assert [each.setting for each in found] == [best, near, far]
    assert [each.is_even for each in found] == [True, True, False]
    assert (found[0].behind, found[0].passes, found[0].most_passes) == (0.0, 2.0, 4.0)
    assert current_of(found, 4) == (found[2],)


def test_diverged_settings_are_no_results() -> None:
    good, bad = (Setting(size, FED_AVG, 8, 5, 1.0) for size in (1, 2))
    assert [each.setting for each in results_of(table_of({good: [1.0], bad: [math.inf]}), np.array([1]))] == [good]
    with pytest.raises(ValueError, match="every setting diverged"):
        results_of(table_of({bad: [math.inf]}), np.array([1]))


def test_a_ledger_gives_back_what_it_was_given(tmp_path: Any) -> None:
    job = Job(Setting(16, FED_AVG, 32, 5, 1 / 3), 1 / 27, 2)
    row = cast("dict[str, Any]", table_of({job.setting: [math.inf]}).iloc[0].to_dict())
    Ledger(tmp_path, {"flops": 1e9}).add(job, {**row, "share": job.share, "seed": job.seed})
    again = Ledger(tmp_path, {"flops": 1e9})
    kept = again.get(job)
    assert kept is not None
    assert kept["loss"] == math.inf
    assert again.get(job._replace(seed=1)) is None
    with pytest.raises(ValueError, match=r"another study \(flops 1000000000.0 there and 2.0 here\)"):
        Ledger(tmp_path, {"flops": 2.0})
