"""Fits of scaling laws to runs: robust, from many starts, with intervals, and refusals where data say too little."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize

from lightning_fedscale.scaling.base import Law, closest
from lightning_fedscale.scaling.chinchilla import Chinchilla, Rosenfeld

FloatArray: TypeAlias = npt.NDArray[np.float64]

HUBER = 1e-3
"""Residuals of the log-loss beyond which they count linearly, as in arXiv 2203.15556."""


class Interval(NamedTuple):
    """A number and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    Attributes:
        law: with the fitted constants.
        intervals: of every constant and, as "exponent", of ``N* ~ C^exponent``.
        rho: what division among clients costs, ``C_eff = C clients**-rho``; None if all runs have as many clients.
        runs: how many runs were fitted.
        error: root mean square of the log-loss residuals.
        held_out: the same on the largest scale, which was not fitted; NaN without.
        problems: what the data cannot support, in words; with one of them `optimal` refuses.
        samples: constants of the bootstrap, one row each.
    """

    law: Law
    intervals: dict[str, Interval]
    rho: Interval | None
    runs: int
    error: float
    held_out: float
    problems: tuple[str, ...]
    samples: FloatArray = field(repr=False)

    def optimal(self, flops: float, clients: int = 1) -> Interval:
        """The best model size with its interval.

        Raises:
            ValueError: if the data cannot support an optimum.
        """
        if self.problems:
            raise ValueError(f"fit: these runs do not determine a best size: {'; '.join(self.problems)}.")
        rho = 1.0 if self.rho is None else self.rho.value

        def best(law: Law, rho: float) -> float:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return law.optimal_federated(flops, clients, rho).params

        sizes = [
            best(self.law.replace(**dict(zip(_NAMES, row[:5], strict=True))), row[5] if self.rho else 1.0)
            for row in self.samples.tolist()
        ]
        return Interval(best(self.law, rho), *np.quantile(sizes, [0.025, 0.975]).tolist())

    def save(self, path: str | Path) -> None:
        """Write the law to a JSON file, to be used as ``law=``."""
        document = {
            "law": self.law.name,
            "constants": {**self.law.constants, "flops_per": self.law.flops_per},
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "rho": None if self.rho is None else list(self.rho),
            "runs": self.runs,
            "error": self.error,
            "held_out": None if math.isnan(self.held_out) else self.held_out,
            "problems": list(self.problems),
        }
        Path(path).write_text(json.dumps(document, indent=1), encoding="utf-8")


def fit(
    runs: Any, law: str | type[Chinchilla] = Rosenfeld, *, holdout: bool = True, bootstrap: int = 200, seed: int = 0
) -> Fit:
    """Fit ``L = E + A / N^alpha + B / D^beta`` to runs.

    Minimises the sum of Huber losses of log-loss residuals, as arXiv 2203.15556 does and arXiv 2404.10102 corrects (a
    mean would stop the search too early), from many starts, with analytic gradients. Runs with several numbers of
    clients give ``rho`` as well: a client's data count as ``D clients**(1 - rho)``, from none shared (1) to all (0).

    Args:
        runs: a table (DataFrame, or mapping of columns) with ``loss``, ``params`` and ``tokens`` or ``flops``; if there
            are ``clients``, tokens and FLOPs are those of one client.
        law: `Rosenfeld` (any task), `Chinchilla` (text), or its name.
        holdout: keep the runs of the largest compute out and report their error.
        bootstrap: number of refits to resampled runs, for the intervals.
        seed: of the resampling.

    Raises:
        ValueError: for runs without the columns, with numbers that are not positive, or of one size only.

    Example:
        >>> truth = Rosenfeld(E=1.0, A=20.0, B=30.0, alpha=0.4, beta=0.3)
        >>> rows = [(n, d, truth.loss(n, d)) for n in (1e4, 3e4, 1e5, 3e5) for d in (1e5, 3e5, 1e6, 1e7)]
        >>> table = dict(zip(("params", "tokens", "loss"), zip(*rows)))
        >>> found = fit(table, bootstrap=2)
        >>> round(found.law.alpha, 3), round(found.law.beta, 3)
        (0.4, 0.3)
    """
    kind = _kind(law)
    table = runs_table(runs)
    problems = _problems(table)
    several = table["clients"].nunique() > 1
    largest = table["flops"] * table["clients"] >= (table["flops"] * table["clients"]).max() * 0.9
    kept_out = largest if holdout and 0 < largest.sum() <= len(table) // 4 else largest & False
    data = _Data.of(table[~kept_out], several)
    best = _solve(data, _starts(data))
    if not several and not problems and np.linalg.cond(data.curvature(best)) > 1e12:
        problems.append("the constants are not told apart (a nearly singular Hessian)")
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(bootstrap):
        resampled = data.rows(rng.integers(0, len(data.loss), len(data.loss)))
        samples.append(_constants(_solve(resampled, best[None])))
    draws = np.array(samples).reshape(-1, 6)
    constants = _constants(best)
    intervals = {
        name: _interval(value, draws[:, i]) for i, (name, value) in enumerate(zip(_NAMES, constants, strict=False))
    }
    shares = draws[:, 4] / (draws[:, 3] + draws[:, 4])
    intervals["exponent"] = _interval(constants[4] / (constants[3] + constants[4]), shares)
    # Both errors are of log-losses: about the share of the loss.
    return Fit(
        kind(**dict(zip(_NAMES, constants[:5].tolist(), strict=True)), flops_per=_flops_per(table)),
        intervals,
        _interval(constants[5], draws[:, 5]) if several else None,
        len(data.loss),
        _rms(data.residuals(best)),
        _rms(_Data.of(table[kept_out], several).residuals(best)) if kept_out.any() else math.nan,
        tuple(problems),
        draws,
    )


def law_from_file(path: str | Path) -> tuple[Law, float | None]:
    """The law and ``rho`` that `Fit.save` wrote.

    Raises:
        ValueError: if the file is none of those.
    """
    from lightning_fedscale.scaling import LAWS

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        law = LAWS[document["law"]](**document["constants"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"law={str(path)!r} is not a law file ({error!r}): write one with Fit.save.") from error
    return law, None if document.get("rho") is None else document["rho"][0]


def runs_table(runs: Any) -> pd.DataFrame:
    """Runs as a table with params, tokens, flops, loss and clients; the last three made up from the others.

    Raises:
        ValueError: for missing columns, numbers that are not positive, or too few runs.
    """
    table = pd.DataFrame(dict(runs) if isinstance(runs, Mapping) else runs).copy()
    if missing := {"params", "loss"} - set(table):
        raise ValueError(
            f"runs: the column {', '.join(sorted(missing))} is missing; there are {', '.join(map(str, table))}."
        )
    if not {"tokens", "flops"} & set(table):
        raise ValueError(f"runs: a column tokens or flops is missing; there are {', '.join(map(str, table))}.")
    if "tokens" not in table:
        table["tokens"] = table["flops"] / (6.0 * table["params"])
    if "flops" not in table:
        table["flops"] = 6.0 * table["params"] * table["tokens"]
    if "clients" not in table:
        table["clients"] = 1
    for column in ("params", "tokens", "flops", "loss", "clients"):
        numbers = table[column].to_numpy(dtype=np.float64)
        wrong = ~(np.isfinite(numbers) & (numbers > 0))
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"runs: {column}={numbers[row]:g} in row {row}: leave out runs without a finite {column} above 0."
            )
    if len(table) < 5:
        raise ValueError(f"runs: {len(table)} runs for five constants: fit ten or more.")
    if table["params"].nunique() == 1:
        raise ValueError(f"runs: all have {table['params'].iloc[0]:,.0f} parameters: a best size takes several sizes.")
    return table.reset_index(drop=True)


# ---- the objective


_NAMES = ("E", "A", "B", "alpha", "beta")


class _Data(NamedTuple):
    """Logarithms of what was measured; ``clients`` are zeros unless ``rho`` is to be fitted."""

    params: FloatArray
    tokens: FloatArray
    clients: FloatArray
    loss: FloatArray
    several: bool

    @classmethod
    def of(cls, table: pd.DataFrame, several: bool) -> _Data:
        params, tokens, clients, loss = (
            np.log(table[name].to_numpy(dtype=np.float64)) for name in ("params", "tokens", "clients", "loss")
        )
        return cls(params, tokens, clients, loss, several)

    def rows(self, which: Any) -> _Data:
        return _Data(self.params[which], self.tokens[which], self.clients[which], self.loss[which], self.several)

    def terms(self, theta: FloatArray) -> FloatArray:
        """Logarithms of the law's three terms, for one or many ``theta = (ln E, ln A, ln B, alpha, beta, rho)``."""
        e, a, b, alpha, beta, rho = np.moveaxis(theta[..., None], -2, 0)
        tokens = self.tokens + (1.0 - rho) * self.clients
        return np.stack(np.broadcast_arrays(e, a - alpha * self.params, b - beta * tokens))

    def residuals(self, theta: FloatArray) -> FloatArray:
        found: FloatArray = np.logaddexp.reduce(self.terms(theta), axis=0) - self.loss
        return found

    def objective(self, theta: FloatArray) -> FloatArray:
        size = np.abs(self.residuals(theta))
        found: FloatArray = np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(-1)
        return found

    def with_gradient(self, theta: FloatArray) -> tuple[float, FloatArray]:
        terms = self.terms(theta)
        total = np.logaddexp.reduce(terms, axis=0)
        residuals = total - self.loss
        pull = np.clip(residuals, -HUBER, HUBER)
        e, a, b = np.exp(terms - total) * pull
        tokens = self.tokens + (1.0 - theta[5]) * self.clients
        gradient = np.array([
            e.sum(), a.sum(), b.sum(), -(a * self.params).sum(), -(b * tokens).sum(),
            (b * self.clients).sum() * theta[4] if self.several else 0.0,
        ])  # fmt: skip
        size = np.abs(residuals)
        value = np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum()
        # In units of the tolerance, so that the search does not stop where it is flat only by its smallness.
        return float(value) / HUBER**2, gradient / HUBER**2

    def curvature(self, theta: FloatArray) -> FloatArray:
        """The Gauss-Newton Hessian over the five constants, scaled to a unit diagonal."""
        terms = self.terms(theta)
        e, a, b = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
        jacobian = np.stack([e, a, b, -a * self.params, -b * self.tokens])
        hessian = jacobian @ jacobian.T
        scale = np.sqrt(np.diag(hessian))
        found: FloatArray = hessian / np.outer(scale, scale)
        return found


def _starts(data: _Data) -> FloatArray:
    """The best points of a grid: the objective has many minima."""
    level = data.loss.min()
    grid = np.array(
        np.meshgrid(
            [level - 1.5, level - 0.5, level - 0.1],
            [0.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0],
            [0.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0],
            [0.1, 0.25, 0.4, 0.6, 1.0],
            [0.1, 0.25, 0.4, 0.6, 1.0],
            [0.5] if data.several else [1.0],
        )
    ).reshape(6, -1)
    values = data.objective(grid.T)
    best: FloatArray = grid.T[np.argsort(values)[:60]]
    return best


def _solve(data: _Data, starts: FloatArray) -> FloatArray:
    def attempt(start: FloatArray) -> Any:
        return minimize(data.with_gradient, start, jac=True, method="BFGS", options={"maxiter": 2000, "gtol": 1e-6})

    results = [attempt(start) for start in starts]
    best = min(results, key=lambda result: result.fun)
    again = attempt(best.x)
    found: FloatArray = again.x if again.fun < best.fun else best.x
    return found


def _constants(theta: FloatArray) -> FloatArray:
    found: FloatArray = np.concatenate([np.exp(theta[:3]), theta[3:]])
    return found


def _flops_per(table: pd.DataFrame) -> float:
    return float((table["flops"] / (table["params"] * table["tokens"])).median())


def _kind(law: str | type[Chinchilla]) -> type[Chinchilla]:
    known: dict[str, type[Chinchilla]] = {"Chinchilla": Chinchilla, "Rosenfeld": Rosenfeld}
    if isinstance(law, str):
        if law not in known:
            raise closest("law", law, list(known))
        return known[law]
    if law not in known.values():
        raise ValueError(f"law={law!r}: choose {' or '.join(known)}.")
    return law


def _problems(table: pd.DataFrame) -> list[str]:
    """What the runs are too few or too alike for."""
    problems = []
    sizes, spans = (
        table["params"],
        {name: math.log10(table[name].max() / table[name].min()) for name in ("params", "tokens")},
    )
    if sizes.nunique() < 4:
        problems.append(f"only {sizes.nunique()} sizes")
    for name, decades in spans.items():
        if decades < 0.9:
            problems.append(f"{name} span {decades:.1f} decades only")
    together = float(np.corrcoef(np.log(table["params"]), np.log(table["tokens"]))[0, 1]) if len(table) > 2 else 1.0
    if together > 0.995:
        problems.append("size and data always grow together")
    return problems


def _interval(value: float, draws: FloatArray) -> Interval:
    if not len(draws):
        return Interval(float(value), math.nan, math.nan)
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return Interval(float(value), low, high)


def _rms(residuals: FloatArray) -> float:
    return float(np.sqrt(np.mean(residuals**2)))
