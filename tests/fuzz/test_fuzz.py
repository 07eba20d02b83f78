"""All ways to execute a random training agree; ``python -m tests.fuzz --seeds 5000`` looks at more of them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from tests.dist import processes
from tests.fuzz import batches, habits, layers, recipes
from tests.fuzz.check import check, draw_of, rank_differences, short, spreads
from tests.fuzz.known import KNOWN
from tests.fuzz.recipes import NOT_VECTORIZABLE, Recipe, draw, read, shrink, simpler
from tests.fuzz.regressions import REGRESSIONS
from tests.fuzz.runs import difference, run

SEEDS = range(3000)
CHUNKS = 9
# What vectorized and sequential executors have to go on with exactly: odd seeds resume the one, even seeds the other.
RESUMED = "optimizer", "scheduler", "trainer", "strategy"


def shown(seed: int) -> set[tuple[str, int]]:
    """What the seed's recipe can show: little but what keeps its clients from being vectorized, if anything does."""
    features = draw_of(seed).features
    features = features & NOT_VECTORIZABLE or features
    return {(feature, seed % 2 if feature.startswith(RESUMED) else 0) for feature in features}


@functools.cache
def covering() -> list[int]:
    """Few seeds, in order, that together show all that the seeds do; `make fuzz` tries thousands of others."""
    left = {seed: shown(seed) for seed in SEEDS}
    missing = set[tuple[str, int]]().union(*left.values())
    chosen = []
    while missing:
        best = max(left, key=lambda seed: len(left[seed] & missing))
        missing -= left.pop(best)
        chosen.append(best)
    return sorted(chosen)


@pytest.fixture(autouse=True)
def said_nothing() -> Iterator[None]:
    """Lightning says hello in every training."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("start", range(CHUNKS))
def test_all_ways_agree(start: int) -> None:
    verdicts = [(short(seed), check(short(seed))) for seed in covering()[start::CHUNKS]]
    failures = [
        f"{failure}\n    python -m tests.fuzz --recipe {str(recipe)!r}"
        for recipe, v in verdicts
        for failure in v.failures
    ]
    assert not failures, "\n\n".join(failures)
    # Otherwise agreement says little.
    assert sum(verdict.vectorized for _, verdict in verdicts) >= 2
    assert sum(verdict.refused or verdict.meaningless is not None for _, verdict in verdicts) <= 5


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_failed_once(name: str) -> None:
    verdict = check(REGRESSIONS[name])
    assert not verdict.failures, "\n\n".join(map(str, verdict.failures))
    assert verdict.meaningless is None


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    seeds = [seed for seed in range(0, 200, 10) if spreads(short(seed))]
    assert len(seeds) >= 10
    executors = [f"{('sequential', 'vectorized')[number % 2]}:{seed}" for number, seed in enumerate(seeds)]
    (ended,) = processes.run_ranks([(Path(__file__).with_name("ranks.py"), 2, tmp_path, 2, *executors)], tmp_path)
    processes.assert_well(ended)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    failures = [how for seed in seeds if (how := rank_differences(short(seed), [rank[seed] for rank in ranks]))]
    assert not failures, "\n\n".join(failures)


def test_a_recipe_is_a_function_of_its_seed_and_can_be_read_again() -> None:
    for seed in range(100):
        recipe = draw(seed)
        assert draw(seed) == recipe == read(str(recipe))
    assert len({str(draw(seed)) for seed in range(100)}) == 100


def test_everything_is_tried() -> None:
    drawn = {feature for seed in covering() for feature in draw_of(seed).features}
    everything: dict[str, Iterable[str]] = {
        "inputs:": layers.ON_INPUTS, "tokens:": layers.ON_TOKENS, "blocks:": layers.BLOCKS, "states:": habits.STATES,
        "logs:": habits.LOGS, "loss:": habits.LOSSES, "hooks:": habits.HOOKS, "batch:": batches.FORMS,
        "optimizer:": recipes.OPTIMIZERS, "scheduler:": recipes.SCHEDULERS,
        "trainer:precision=": map(repr, recipes.PRECISIONS),
        **{f"trainer:{name}=": values for name, values in recipes.TRAINER.items()},
        **{f"strategy:{name}=": values for name, values in recipes.STRATEGY.items()},
    }  # fmt: skip
    assert {f"{kind}{name}" for kind, names in everything.items() for name in names} - drawn == set(KNOWN)


def test_a_failing_recipe_is_made_as_simple_as_it_can_be() -> None:
    recipe = next(r for r in map(draw, range(1000)) if len(r.blocks) == 2 and "linear" in r.blocks)
    small = shrink(recipe, lambda other: "linear" in other.blocks and other.epochs > 2)
    assert small == Recipe(seed=recipe.seed, blocks=("linear",))
    assert all(other.blocks == () or other.epochs == 2 for other in simpler(small))
    assert shrink(recipe, lambda other: True) == Recipe(seed=recipe.seed, epochs=2)


def test_a_difference_is_noticed() -> None:
    """A fuzzer that sees nothing finds nothing."""
    one, other = (run(Recipe(optimizer=f"SGD(lr={lr})"), "sequential") for lr in (0.1, 0.100001))
    assert difference(one, run(Recipe(), "sequential"), 0.0) is None
    assert "tensors.on_inputs.weight" in str(difference(one, other, 1e-8))
    changed = dataclasses.replace(one, logged=[*one.logged[:-1], {**one.logged[-1], "loss": 3.0}])
    assert "logged[3]" in str(difference(one, changed, 1e-8))


def test_clients_that_went_sequential_are_not_counted_as_vectorized() -> None:
    assert run(Recipe(), "vectorized").vectorized
    assert not run(Recipe(loss="branch"), "vectorized").vectorized
    assert not run(Recipe(), "sequential").vectorized
