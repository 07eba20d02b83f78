"""IsoFLOP profiles: the best size at each compute, and how it depends on compute and clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.compute import Porian
from lightning_fedscale.scaling.dual import FloatArray
from lightning_fedscale.scaling.form import Interval

_SAME = 0.2
"""Runs whose compute differs by less than this fraction belong to one profile."""


class Profile(NamedTuple):
    """The runs of one amount of compute and one number of clients, and the parabola through them.

    Attributes:
        flops: compute of all clients together.
        clients: number of clients.
        params: sizes of the runs.
        loss: losses of the runs.
        best: the size at the parabola's minimum; NaN if that lies outside the range of the sizes.
        error: standard deviation of ``ln best``, from the parabola's residuals.
    """

    flops: float
    clients: int
    params: FloatArray
    loss: FloatArray
    best: float
    error: float


@dataclass(frozen=True)
class IsoFlop:
    """``ln N* = c + p ln C - q ln K`` through the best sizes of profiles.

    A parabola is symmetric in ln N, but a law's profile is not, unless its exponents are equal. Best sizes are
    therefore biased even without noise, and more so for wider profiles (arXiv 2603.22339). ``bias`` estimates this,
    provided that the fitted law is true.

    Attributes:
        profiles: all profiles.
        p: exponent of compute.
        q: exponent of clients; None for one number of clients.
        rho: ``q / p``, the cost of dividing the compute among clients; None for one number of clients.
        scale: ``exp(c)``.
        bias: ratio of the parabola's best size to the law's, geometric mean over profiles; NaN without a law.
    """

    profiles: tuple[Profile, ...]
    p: Interval
    q: Interval | None
    rho: Interval | None
    scale: float
    bias: float = math.nan

    @property
    def law(self) -> Porian:
        """The best size by compute, as a law that does not predict the loss."""
        return Porian(size=self.scale, exponent=self.p.value)


def isoflop(table: pd.DataFrame, law: Law | None = None, rho: float = 1.0, seed: int = 0) -> IsoFlop | None:
    """Find the best sizes of runs by parabolas, to compare with a fit.

    Args:
        table: table of `runs_table`.
        law: law that was fitted to the same runs, for the bias.
        rho: ``rho`` that was fitted to the same runs.
        seed: seed of the bootstrap, which draws best sizes from their errors.

    Returns:
        the result; None if too few profiles have a minimum: fewer than two, or four with several numbers of clients.
    """
    profiles = _profiles(table)
    used = [each for each in profiles if math.isfinite(each.best)]
    several = len({each.clients for each in used}) > 1
    if len({round(math.log(each.flops) / _SAME) for each in used}) < 2 or len(used) < (4 if several else 2):
        return None
    design = np.array([(1.0, math.log(each.flops), -math.log(each.clients)) for each in used])[:, : 3 if several else 2]
    logs, errors = np.array([(math.log(each.best), each.error) for each in used]).T
    slopes = np.linalg.lstsq(design, logs, rcond=None)[0]
    draws = logs + errors * np.random.default_rng(seed).normal(size=(1000, len(used)))
    found = np.linalg.lstsq(design, draws.T, rcond=None)[0]
    p = Interval.of(slopes[1], found[1].tolist())
    q = Interval.of(slopes[2], found[2].tolist()) if several else None
    price = Interval.of(slopes[2] / slopes[1], (found[2] / found[1]).tolist()) if several else None
    bias = math.nan if law is None else _bias(used, law, rho)
    return IsoFlop(tuple(profiles), p, q, price, math.exp(slopes[0]), bias)


def vertex(params: Sequence[float] | FloatArray, loss: Sequence[float] | FloatArray) -> tuple[float, float]:
    """Return the minimum of the parabola through losses over ln N, and the standard deviation of its logarithm.

    Example:
        >>> sizes = np.array([1e3, 1e4, 1e5, 1e6])
        >>> best, error = vertex(sizes, 2.0 + (np.log(sizes) - np.log(3e4)) ** 2)
        >>> round(best), round(error, 6)
        (30000, 0.0)
    """
    x, y = np.log(params), np.asarray(loss, dtype=np.float64)
    if len(np.unique(x)) < 3:
        return math.nan, math.nan
    middle = x.mean()
    design = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], 1)
    (_, b, a), *_ = np.linalg.lstsq(design, y, rcond=None)
    place = -b / (2 * a) if a > 0 else math.inf
    if not x.min() <= place + middle <= x.max():
        return math.nan, math.nan
    spread = float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum()) / max(len(x) - 3, 1)
    slope = np.array([0.0, -1.0 / (2 * a), b / (2 * a**2)])
    variance = float(slope @ np.linalg.inv(design.T @ design) @ slope) * spread
    return math.exp(place + middle), math.sqrt(max(variance, 0.0))


def _profiles(table: pd.DataFrame) -> list[Profile]:
    total = table["flops"] * table["clients"]
    found = []
    for clients, group in table.assign(total=total).groupby("clients"):
        ordered = group.sort_values("total")
        logs = np.log(ordered["total"].to_numpy(dtype=np.float64))
        level, start = [0], logs[0]
        for value in logs[1:]:
            apart = value - start > _SAME
            level.append(level[-1] + int(apart))
            start = value if apart else start
        for _, rows in ordered.groupby(np.array(level)):
            params, loss = (rows[name].to_numpy(dtype=np.float64) for name in ("params", "loss"))
            if len(np.unique(params)) >= 3:
                best, error = vertex(params, loss)
                found.append(
                    Profile(float(rows["total"].median()), int(float(str(clients))), params, loss, best, error)
                )
    return sorted(found, key=lambda each: (each.clients, each.flops))


def _bias(profiles: Sequence[Profile], law: Law, rho: float) -> float:
    def ratio(each: Profile) -> float:
        tokens: Any = each.flops / (law.flops_per * each.params * each.clients)
        losses = [
            law.loss_federated(n, d, each.clients, rho) for n, d in zip(each.params.tolist(), tokens, strict=True)
        ]
        return vertex(each.params, losses)[0] / law.optimal_federated(each.flops, each.clients, rho).params

    logs = [math.log(found) for each in profiles if math.isfinite(found := ratio(each))]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
