"""Learning rates of a table of runs: the best for each size, number of clients and compute, and whether it was tuned.

Clients that share a budget take fewer steps each. At a rate that is too small, the loss depends on the number of steps
alone, which makes ``rho`` 1 by construction. The rate must therefore be tuned for every number of clients; otherwise a
note says that it was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"NOT_TOLD": "NOT_RECORDED"})

RATES = ("learning_rate", "lr")
"""Names of the column."""

NOT_RECORDED = "it is not recorded whether the learning rate was tuned"
NOT_TUNED = "at one learning rate, not tuned"
AS_GIVEN = "one learning rate for each size and number of clients, as given"
TUNED = "learning rate tuned for each size and number of clients"

_APART = ("partition", "method", "batch_size", "local_steps", "optimizer")
"""Columns of settings whose values have separate best rates."""

SAME = 0.2
"""Runs whose compute differs by less than this fraction count as equal in compute."""


class Tuned(NamedTuple):
    """Runs that count, and what is known about their learning rates.

    Attributes:
        table: the runs at the best rates.
        said: one of `NOT_RECORDED`, `NOT_TUNED`, `AS_GIVEN` and `TUNED`.
        notes: doubts about the learning rates, in words.
    """

    table: pd.DataFrame
    said: str = NOT_RECORDED
    notes: tuple[str, ...] = ()


def tuned(table: pd.DataFrame) -> Tuned:
    """Keep the runs at the best learning rate of their size, number of clients and amount of compute.

    If all seeds tried the same rates, the best rate is that of the lowest mean loss, and all seeds count. If one seed
    tried more rates than the others, it chooses the rate, and the others count.

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
        f"in {at_end} of {len(kept)} cases the best learning rate is the smallest or the largest that was tried; try"
        " rates beyond it"
    )
    return Tuned(found.loc[sorted(found.index)], TUNED, (note,) if at_end else ())


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, bool]:
    """Return the rate with the least loss, and whether it is the lowest or highest rate that was tried.

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
    """Return a key of the size, the number of clients, the compute and the settings of each run."""
    compute = table["share"] if "share" in table else (np.log(table["flops"].astype(float)) / SAME).round()
    size = table["size"] if "size" in table else table["params"]
    clients = table["clients"] if "clients" in table else pd.Series(1, table.index)
    parts = [size, clients, compute, *(table[each] for each in _APART if each in table)]
    names = ["/".join(map(str, each)) for each in zip(*parts, strict=True)]
    return pd.Series(names, table.index)
