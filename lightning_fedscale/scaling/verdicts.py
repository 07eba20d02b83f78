"""Reasons why a fit gives no best size: too few or too similar runs, undetermined constants, contradicting runs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.form import EXPONENT, Form, Interval
from lightning_fedscale.scaling.made_for import Best
from lightning_fedscale.scaling.runs import decades
from lightning_fedscale.scaling.tuning import SAME

_WIDE = 10.0
"""A best size is not determined if the ends of its interval are further apart than this factor."""

APART = 3.0
"""An exponent is not determined if the ends of its interval are further apart than this factor."""

_FLOOR = 0.05
"""An irreducible loss is not determined if its interval goes from 0 to more than this fraction of the least loss."""

CONTRADICTED = 0.05
"""Largest relative difference between the best run and the law's loss for the best size at the same compute."""

_REFITS = 20
"""Fewest refits with which intervals are evaluated."""


def problems_of(
    table: pd.DataFrame, law: Form, condition: float, rho: float, intervals: Mapping[str, Interval]
) -> list[str]:
    """Return why the runs do not determine a best size: too few, too similar, or with too wide intervals."""
    problems = []
    if (sizes := table["params"].nunique()) < 4:
        problems.append(f"only {sizes} sizes")
    for name in ("params", "tokens"):
        if (span := decades(table[name])) < 0.9:
            problems.append(f"{name} span only {span:.1f} powers of ten")
    if float(np.corrcoef(np.log(table["params"]), np.log(table["tokens"]))[0, 1]) > 0.995:
        problems.append("size and data always grow together")
    if not condition < 1e12:
        problems.append("the runs do not distinguish the constants (the Hessian is nearly singular)")
    if problems or not isinstance(law, Law) or law.missing or len(law.refits) < _REFITS:
        return problems
    largest = table.iloc[int((table["flops"] * table["clients"]).to_numpy().argmax())]
    flops, clients = float(largest["flops"] * largest["clients"]), int(largest["clients"])
    size = law.interval_of_size(flops, clients, rho)
    if not size.high < _WIDE * size.low:
        problems.append(
            f"at the largest compute the best size lies anywhere from {size.low:.2g} to {size.high:.2g} parameters"
        )
    return [*problems, *_left_open(law, intervals, float(table["loss"].min()))]


def contradictions(table: pd.DataFrame, law: Law, best: tuple[Best, ...], rho: float) -> tuple[list[str], list[str]]:
    """Compare the best run of the largest compute with the law's loss for the best size there.

    Returns:
        the contradictions where the best size lies among the sizes of the runs, which are problems; and those where it
        lies beyond all of them, which are notes.
    """
    problems, notes = list[str](), list[str]()
    largest = {each.clients: each for each in best}  # in the order of compute
    for run in largest.values():
        flops = law._effective(run.flops, run.clients, rho)
        size = law._best_params(flops)
        promised = law._loss(size, flops / (law.flops_per * size))
        if not promised > 0 or abs(math.log(run.loss / promised)) < CONTRADICTED:
            continue
        total = table["flops"] * table["clients"]
        rows = table[(table["clients"] == run.clients) & (np.abs(np.log(total / run.flops)) < SAME)]
        tried = rows["params"].min() <= size <= rows["params"].max()
        said = (
            f"at {run.flops:.3g} FLOPs and {run.clients} client{'' if run.clients == 1 else 's'}, the law predicts a"
            f" loss of {promised:.4g} for the best size ({size:,.0f} parameters), but the best run measured"
            f" {run.loss:.4g} ({run.params:,.0f} parameters)"
        )
        if tried:
            problems.append(said)
        else:
            notes.append(f"{said}; no run is as {'small' if size < rows['params'].min() else 'large'} as that size")
    return problems, notes


def _left_open(law: Law, intervals: Mapping[str, Interval], least: float) -> list[str]:
    """Return the constants that the refits do not determine: the irreducible loss and exponents."""
    found = []
    for name, each in intervals.items():
        is_exponent = name == "exponent" or law.unknowns.get(name) == EXPONENT
        if is_exponent and not 0 < each.high <= APART * each.low:
            found.append(
                f"{name} is not determined: {each.low:.2g} to {each.high:.2g}, more than {APART:g} times apart"
            )
        elif name in ("E", "floor") and each.low < 0.01 * least and not each.high < _FLOOR * least:
            found.append(f"{name}, the irreducible loss, is not determined: 0 to {each.high:.2g}")
    return found
