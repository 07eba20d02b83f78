"""Whether all ways to train a recipe agree."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import plain
from tests.fuzz.habits import WRITTEN
from tests.fuzz.known import KNOWN
from tests.fuzz.recipes import Recipe, draw
from tests.fuzz.runs import TOLERANCES, Outcome, difference, run


class Failure(NamedTuple):
    """A law that a recipe breaks, and how."""

    law: str
    how: str

    def __str__(self) -> str:
        return f"{self.law}: {self.how}"


class Verdict(NamedTuple):
    """What came of a recipe.

    Attributes:
        failures: laws that it breaks.
        vectorized: whether its clients trained vectorized.
        refused: whether the library refuses it, with a message.
        meaningless: why it says nothing, such as a module that no Trainer trains; None if it does.
        sequential: one client after the other.
    """

    failures: list[Failure]
    vectorized: bool = False
    refused: bool = False
    meaningless: str | None = None
    sequential: Outcome = Outcome()


def check(recipe: Recipe, law: str | None = None) -> Verdict:
    """Train a recipe in all ways.

    Args:
        recipe: what.
        law: look only at this one; None for all.
    """
    with tempfile.TemporaryDirectory() as folder:
        verdict = _check(recipe, law, Path(folder))
    if verdict.failures and recipe.precision.startswith("bf16") and (how := _ill_conditioned(recipe, law, verdict)):
        return Verdict([], meaningless=f"rounding alone changes {how}")
    return verdict


def _ill_conditioned(recipe: Recipe, law: str | None, verdict: Verdict) -> str | None:
    """How far single precision leads from half of it, if that is further than ways may be apart, which agree in single.

    A batch norm over two samples that are nearly equal multiplies rounding errors by thousands.
    """
    options = {name: value for name, value in recipe.trainer.items() if name != "precision"}
    with tempfile.TemporaryDirectory() as folder:
        single = _check(replace(recipe, trainer=options), law, Path(folder))
    if single.failures or single.sequential.error:
        return None
    return difference(verdict.sequential, single.sequential, TOLERANCES[recipe.precision])


def _check(recipe: Recipe, law: str | None, folder: Path) -> Verdict:
    failures: list[Failure] = []

    def compare(name: str, other: Outcome, tolerance: float) -> None:
        how = difference(sequential, other, tolerance)
        if how is not None:
            failures.append(Failure(name, f"{how}\n{other.where}" if other.error else how))

    def wanted(name: str) -> bool:
        return law in (None, name)

    # Capturing takes most of the time: in one pass one of the two does it, in a run of one law each.
    odd = recipe.seed % 2 == 1
    captures = {"vectorized": law is not None or odd, "auto": law is not None or not odd}
    near = TOLERANCES[recipe.precision]
    sequential = run(recipe, "sequential", save=folder / "sequential.ckpt")
    if sequential.error and not sequential.refused:
        alone = run(recipe, "none")
        if alone.error:
            return Verdict([], meaningless=alone.error)
        return Verdict([Failure("trains as the plain Trainer does", f"{sequential.error}\n{sequential.where}")])
    if sequential.error:
        for executor in ("vectorized", "auto"):
            if wanted(f"{executor} == sequential"):
                compare(f"{executor} == sequential", run(recipe, executor, capture=False), near)
        return Verdict(failures, refused=True, sequential=sequential)
    if wanted("plain loop == sequential") and plain.defines(recipe):
        loop = plain.fed_avg(recipe)
        how = difference(_of_loop(sequential, loop), loop, near, python=False)
        if how is not None:
            failures.append(Failure("plain loop == sequential", how))
    vectorized = Outcome()
    if wanted("vectorized == sequential") or wanted("resumed == never stopped"):
        vectorized = run(recipe, "vectorized", save=folder / "vectorized.ckpt", capture=captures["vectorized"])
        if wanted("vectorized == sequential"):
            compare("vectorized == sequential", vectorized, near)
    if wanted("auto == sequential"):
        compare("auto == sequential", run(recipe, "auto", capture=captures["auto"]), near)
    if wanted("resumed == never stopped") and resumes(recipe):
        for executor, whole in {"sequential": sequential, "vectorized": vectorized}.items():
            # One of the two, if both are looked at with everything else.
            if whole.error or (law is None and (executor == "vectorized") != odd):
                continue
            again = run(recipe, executor, resume=folder / f"{executor}.ckpt", capture=captures["vectorized"])
            how = difference(whole, again, 0.0, epochs=len(again.logged))
            if how is not None:
                failures.append(Failure("resumed == never stopped", f"{executor}: {how}\n{again.where}"))
    return Verdict(failures, vectorized.vectorized, sequential=sequential)


def resumes(recipe: Recipe) -> bool:
    """Whether everything that the training depends on is in its checkpoints."""
    return not set(WRITTEN) & set(recipe.states) and "mean_not_saved" not in recipe.blocks


def _of_loop(outcome: Outcome, loop: Outcome) -> Outcome:
    """What the plain loop knows too."""
    keys = ("clients", "losses")
    return Outcome(
        tensors={name: outcome.tensors[name] for name in loop.tensors},
        records=[{key: record[key] for key in keys} for record in outcome.records],
    )


def draw_of(seed: int) -> Recipe:
    """The recipe that a seed stands for in the tests."""
    return draw(seed, KNOWN)


def short(seed: int) -> Recipe:
    """The same in as many epochs as it takes that states change once, and a resumed training has an epoch to go."""
    return replace(draw_of(seed), epochs=3)


def spreads(recipe: Recipe) -> bool:
    """Whether the training can be the same on several ranks: what Python keeps is each rank's own."""
    return not set(WRITTEN) & set(recipe.states)


def _own(recipe: Recipe, name: str) -> bool:
    """Whether what is logged so is of the rank's own last batch."""
    return name.endswith("_step") or ("plain" in recipe.logs and name in ("loss", "own_loss"))


def rank_differences(recipe: Recipe, ranks: list[Outcome]) -> str | None:
    """How trainings on several ranks differ from one on one, None if they do not."""
    one, near = run(recipe, "sequential"), TOLERANCES[recipe.precision]
    for number, other in enumerate(ranks):
        if one.error is None and re.search(r"clients_per_round=\d+: each of the", other.error or ""):
            continue  # fewer clients than ranks
        for outcome in (one, other):
            outcome.logged = [{k: v for k, v in epoch.items() if not _own(recipe, k)} for epoch in outcome.logged]
        how = difference(one, other, near, python=False)
        if how is not None:
            return f"rank {number}: {how}\n{other.where}\n    {recipe}"
    return None
