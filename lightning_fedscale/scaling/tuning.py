"""Learning rates of a table of runs: the best of each size, number of clients and compute, and what is known of them.

Clients that share a budget take fewer steps each. At a rate that is too small loss depends on the steps alone, and what
division costs comes out as 1 by construction: so the rate is tuned for every number of clients, or it is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

RATES = ("learning_rate", "lr")
"""Names of the column."""

NOT_TOLD = "whether the learning rate was tuned is not told"
NOT_TUNED = "at one learning rate, not tuned"
AS_GIVEN = "one learning rate for each size and number of clients, as given"
TUNED = "learning rate tuned for each size and number of clients"

_APART = ("partition", "method", "batch_size", "local_steps", "optimizer")
"""Columns of what has best rates of its own."""

SAME = 0.2
"""Runs whose compute differs by less than this share are of one amount of compute."""


class Tuned(NamedTuple):
    """Runs that count, and what is known of their learning rates.

    Attributes:
        table: without the runs at other rates than the best.
        said: one of `NOT_TOLD`, `NOT_TUNED`, `AS_GIVEN` and `TUNED`.
        notes: what is doubtful about it.
    """

    table: pd.DataFrame
    said: str = NOT_TOLD
    notes: tuple[str, ...] = ()


def tuned(table: pd.DataFrame) -> Tuned:
    """Keep the runs at the best learning rate of their size, number of clients and amount of compute.

    Where several seeds tried the same rates, the rate is best by the mean of their losses, and all seeds count. Where
    one seed tried more rates than the others, it is there to choose the rate, and the others count.

    Example:
        >>> runs = {"params": [10, 10, 10], "clients": 1, "flops": 60.0, "lr": [0.1, 0.2, 0.4], "loss": [0.5, 0.3, 0.4]}
        >>> found = tuned(pd.DataFrame(runs))
        >>> found.table["lr"].tolist(), found.said
        ([0.2], 'learning rate tuned for each size and number of clients')
    """
    name = next((each for each in RATES if each in table), None)
    if name is None or "params" not in table or "flops" not in table:
        return Tuned(table)
    if table[name].nunique() < 2:
        return Tuned(table, NOT_TUNED)
    cells = _cells(table)
    if (table.groupby(cells)[name].nunique() < 2).all():
        return Tuned(table, AS_GIVEN)
    kept, at_end = list[pd.DataFrame](), 0
    for _, cell in table.groupby(cells, sort=False):
        rows, is_end = _best(cell, name)
        kept.append(rows)
        at_end += is_end
    found = pd.concat(kept)
    note = (
        f"in {at_end} of {len(kept)} cases the best learning rate is the least or the largest that was tried: try more"
    )
    return Tuned(found.loc[sorted(found.index)], TUNED, (note,) if at_end else ())


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, bool]:
    """The rate with the least loss, and whether it is at an end of those that were tried.

    Example:
        >>> best_rate([0.1, 0.2, 0.4], [0.5, 0.3, math.nan])
        (0.2, False)
    """
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = rates[int(np.argmin(known))]
    return best, len(set(rates)) > 1 and best in (min(rates), max(rates))


def _best(cell: pd.DataFrame, name: str) -> tuple[pd.DataFrame, bool]:
    seeds = cell["seed"] if "seed" in cell else pd.Series(0, cell.index)
    tried = {seed: sorted(set(rates)) for seed, rates in cell[name].groupby(seeds)}
    most = max(tried, key=lambda seed: len(tried[seed]))
    chooses = cell if all(rates == tried[most] for rates in tried.values()) else cell[seeds == most]
    means = chooses.groupby(name)["loss"].agg(lambda losses: losses.mean(skipna=False))
    best, is_end = best_rate(means.index.tolist(), means.tolist())
    rows = cell[cell[name] == best]
    others = rows.drop(chooses.index, errors="ignore")
    return (others if len(others) else rows), is_end


def _cells(table: pd.DataFrame) -> pd.Series[str]:
    """A name for the size, the number of clients and the compute of each run, and for how it trained."""
    compute = table["share"] if "share" in table else (np.log(table["flops"].astype(float)) / SAME).round()
    size = table["size"] if "size" in table else table["params"]
    clients = table["clients"] if "clients" in table else pd.Series(1, table.index)
    parts = [size, clients, compute, *(table[each] for each in _APART if each in table)]
    names = ["/".join(map(str, each)) for each in zip(*parts, strict=True)]
    return pd.Series(names, table.index)
