"""Fits of scaling laws to runs, with Huber losses, many starts and intervals, and checks of what the runs support."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.chinchilla import Chinchilla, Rosenfeld
from lightning_fedscale.scaling.dual import FloatArray
from lightning_fedscale.scaling.form import Form, Interval, Range, Refit, closest, gathered
from lightning_fedscale.scaling.isoflop import IsoFlop, isoflop
from lightning_fedscale.scaling.made_for import MadeFor
from lightning_fedscale.scaling.registry import FORMS
from lightning_fedscale.scaling.rho import Rho
from lightning_fedscale.scaling.runs import columns_of, runs_to_fit
from lightning_fedscale.scaling.search import Problem
from lightning_fedscale.scaling.tuning import NOT_RECORDED, NOT_TUNED
from lightning_fedscale.scaling.units import doubt_of_rho, doubts_of_flops
from lightning_fedscale.scaling.verdicts import contradictions, problems_of

_MOST_HELD_OUT = 0.4
"""Largest fraction of the runs that are held out; with more, too few runs would remain for the fit."""

_ONE_RATE = (
    "rho was measured at one learning rate, which says little: clients take fewer steps each, and if the rate is too"
    " small, the loss depends on the number of steps alone, which makes rho 1; try several rates, as fedscale sweep"
    " does"
)


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    Attributes:
        law: the law with the fitted constants.
        intervals: intervals of all constants and, as "exponent", of ``N* ~ C^exponent``, for laws that have one.
        rho: cost of dividing the compute among clients, ``C_eff = C clients**-rho``; None if all runs have the same
            number of clients.
        runs: number of fitted runs, which includes the held-out ones.
        error: root mean square of the log-loss residuals, about the relative error of the loss.
        held_out: the same for the runs of the largest compute, by a fit without them; NaN if none were held out.
        problems: why the runs do not determine a best size, in words; with any problem `optimal` raises.
        isoflop: the best sizes by parabolas, to compare; None if the runs have no such profiles.
        table: the runs, with a column "held_out" that marks the held-out ones.
        condition: condition number of the scaled Hessian: high if the constants are hard to distinguish.
        bootstrap: number of refits behind the intervals.
        learning_rate: whether the learning rate was tuned, in words; this affects ``rho`` most.
        notes: doubts about the runs, in words, that do not rule out a best size.
        made_for: how the runs trained, as far as their table records it.
    """

    law: Any
    intervals: dict[str, Interval]
    rho: Interval | None
    runs: int
    error: float
    held_out: float
    problems: tuple[str, ...]
    isoflop: IsoFlop | None
    table: pd.DataFrame = field(repr=False)
    condition: float
    bootstrap: int
    learning_rate: str = NOT_RECORDED
    notes: tuple[str, ...] = ()
    made_for: MadeFor = field(default_factory=MadeFor)

    def optimal(self, flops: float, clients: int = 1) -> Interval:
        """Return the best model size for this compute of all clients together, with its interval.

        Raises:
            ValueError: if the runs do not determine a best size, or the law has none.
        """
        if not isinstance(self.law, Law):
            raise ValueError(
                f"law={self.law.name!r} has no best size: it is not a law of size and data. Fit another law."
            )
        return self.law.interval_of_size(flops, clients, 1.0 if self.rho is None else self.rho.value)

    def save(self, path: str | Path) -> None:
        """Write the law to a JSON file that can be passed as ``law=``."""
        law = self.law
        document = {
            "law": law.name,
            "constants": {**law.constants, **({"flops_per": law.flops_per} if isinstance(law, Law) else {})},
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "rho": None if self.rho is None else list(self.rho),
            "fitted_on": law.domain._asdict(),
            "refits": [list(each) for each in law.refits] if isinstance(law, Law) else [],
            "runs": self.runs,
            "error": self.error,
            "held_out": self.held_out,
            "problems": list(self.problems),
            "learning_rate": self.learning_rate,
            "notes": list(self.notes),
            "made_for": self.made_for.as_dict(),
        }
        Path(path).write_text(json.dumps(_plain(document), indent=1), encoding="utf-8")


def fit(
    runs: Any,
    law: str | type[Form] | Form = Rosenfeld,
    *,
    holdout: bool = True,
    bootstrap: int = 200,
    seed: int = 0,
    loss: str | None = None,
    task: str = "this task",
    flops_per: float | None = None,
    partition: Any = None,
    method: str | None = None,
    batch_size: int | None = None,
    local_steps: int | None = None,
) -> Fit:
    """Fit a law to runs.

    The fit minimises the sum of Huber losses of log-loss residuals, as in arXiv 2203.15556 with the correction of arXiv
    2404.10102 (a mean would stop the search too early), from many starts, with exact gradients. Constants in which the
    form is linear need no starts (variable projection). Runs with several numbers of clients determine ``rho`` as well:
    a client's data count as ``D clients**(1 - rho)``, from its own data only (1) to the data of all clients (0).

    The runs of the largest compute are first held out, to measure the error on a scale that was not fitted. The
    constants and their intervals then come from a fit to all runs.

    Args:
        runs: a table (DataFrame, or mapping of columns), a CSV file, or directories of runs that were trained with
            `ComputeAccounting`. The columns are ``loss``, what the law needs (usually ``params`` and ``tokens``;
            ``flops`` can replace tokens), and ``clients``, the number that train in a round; tokens and FLOPs are those
            of one client. With ``learning_rate`` (or ``lr``) and ``seed``, only the runs at the best rate of each size
            and number of clients count. Other columns of a sweep (``method``, ``partition``, ``batch_size``,
            ``local_steps``, ``rounds``, ``passes``, ``size`` and ``argument``, ...) record how the runs trained.
        law: `Rosenfeld` (any task), `Chinchilla` (text), or any form with constants to be fitted: a class, its name, or
            an object whose other constants are kept.
        holdout: first measure the error on the runs of the largest compute, by a fit without them.
        bootstrap: number of refits to resampled runs, for the intervals.
        seed: seed of the resampling.
        loss: name of the logged loss, for directories.
        task: the task of the runs, for which the law will hold.
        flops_per: expected FLOPs per parameter and token if these are far from 6, as with convolutions over large
            images; with None, values far from 6 are a problem. The law takes its own value from the runs.
        partition: fit only the runs of this partition: the name of a partitioner, the file of a saved partition, or a
            Partition.
        method: fit only the runs of this method.
        batch_size: fit only the runs with this batch size.
        local_steps: fit only the runs with this number of local steps.

    Raises:
        ValueError: for runs with missing columns or with numbers that are not positive, too few runs, runs of one size
            only, or no run that matches ``partition``, ``method``, ``batch_size`` or ``local_steps``.

    Example:
        >>> truth = Rosenfeld(E=1.0, A=20.0, B=30.0, alpha=0.4, beta=0.3)
        >>> rows = [(n, d, truth.loss(n, d)) for n in (1e4, 3e4, 1e5, 3e5) for d in (1e5, 3e5, 1e6, 1e7)]
        >>> table = dict(zip(("params", "tokens", "loss"), zip(*rows)))
        >>> found = fit(table, bootstrap=2)
        >>> round(found.law.alpha, 3), round(found.law.beta, 3)
        (0.4, 0.3)
    """
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int) or bootstrap < 0:
        raise ValueError(f"bootstrap={bootstrap!r}: pass a number of refits, at least 0.")
    form = form_of(law)
    found = runs_to_fit(
        runs, form, loss, partition=partition, method=method, batch_size=batch_size, local_steps=local_steps
    )
    table = found.table
    by_size = {"params", "tokens"} <= set(form.columns)
    has_best = by_size and isinstance(form, Law) and not form.no_optimum
    if by_size and isinstance(form, Law):
        form = form.replace(flops_per=float((table["flops"] / (table["params"] * table["tokens"])).median()))
    several = "tokens" in form.columns and "clients" not in form.columns and table["clients"].nunique() > 1
    is_held_out = _largest(table) if holdout and by_size else table["loss"] < 0
    problem = _problem(table, form, several)
    _enough(table, _problem(table[~is_held_out], form, several), has_best)
    held_out = math.nan
    if is_held_out.any():
        before = _problem(table[~is_held_out], form, several).best()
        held_out = _rms(_problem(table[is_held_out], form, several).residuals(before))
    best = problem.best()
    condition, draws = problem.condition(best), _bootstrap(problem, best, bootstrap, seed)
    fitted, error = _law(form, problem, best, draws, _range(table, task, by_size)), _rms(problem.residuals(best))
    intervals = _intervals(fitted, problem.constants(best), draws)
    rho = intervals.pop("rho", None)
    if isinstance(fitted, Law):
        fitted = fitted.replace(made_for=found.made_for, error=error if math.isnan(held_out) else held_out)
        if rho is not None:
            fitted = fitted.replace(fitted_rho=_measured(rho, found.said))
    problems, notes, second = list[str](), list(found.notes), None
    if rho is not None and isinstance(fitted, Law) and found.said == NOT_TUNED:
        notes.append(_ONE_RATE)
    if has_best and isinstance(fitted, Law):
        problems, unsure, second = _verdict(table, fitted, condition, rho, intervals, flops_per, seed)
        notes += unsure
    if rho is not None and (doubt := doubt_of_rho(rho)) is not None:
        problems.append(doubt)
    return Fit(
        fitted.replace(problems=tuple(problems)) if isinstance(fitted, Law) else fitted, intervals, rho,
        len(problem.log_loss), error, held_out, tuple(problems), second, table.assign(held_out=is_held_out), condition,
        bootstrap, found.said, tuple(notes), found.made_for,
    )  # fmt: skip


def form_of(law: str | type[Form] | Form) -> Form:
    """Return the form that is to be fitted.

    Raises:
        ValueError: for an unknown name, or a law without constants to be fitted.
    """
    if isinstance(law, str):
        known = {name.lower(): name for name in FORMS}
        if law.lower() not in known:
            raise closest("law", law, [name for name, form in FORMS.items() if form().fits()])
        law = FORMS[known[law.lower()]]
    if isinstance(law, type) and issubclass(law, Form):
        law = law()
    if not isinstance(law, Form):
        raise ValueError(f"law={law!r}: pass a law, its class or its name.")
    if not law.fits():
        hint = "isoflop(runs).law is that law of your runs" if law.name == "Porian" else "choose another law"
        raise ValueError(f"law={law.name!r} has no constants to be fitted: {hint}.")
    return law


def law_from_file(path: str | Path) -> tuple[Law, float | None]:
    """Return the law and ``rho`` that `Fit.save` wrote.

    Raises:
        ValueError: if the file is none of those.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        constants = {name: tuple(v) if isinstance(v, list) else v for name, v in document["constants"].items()}
        kind: Any = FORMS[document["law"]]
        law = kind(**constants)
        assert isinstance(law, Law)
        if where := document.get("fitted_on"):
            ends: dict[str, Any] = {name: tuple(where[name]) for name in ("params", "flops", "clients")}
            refits = [Refit(each, math.nan if rho is None else rho) for each, rho in document.get("refits", [])]
            law = law.replace(fitted_on=Range(where["task"], **ends), refits=tuple(refits))
        error = document.get("error") if document.get("held_out") is None else document["held_out"]
        law = law.replace(
            problems=tuple(document.get("problems", ())), fitted_rho=_rho_of(document),
            made_for=MadeFor.from_dict(document.get("made_for")), error=error or 0.0,
        )  # fmt: skip
    except FileNotFoundError:
        raise ValueError(f"law={str(path)!r}: there is no such file.") from None
    except (AssertionError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"law={str(path)!r}: this is not a law file ({error!r}). Write one with Fit.save.") from error
    return law, None if law.fitted_rho is None else law.fitted_rho.value


# ---- parts


def _measured(rho: Interval, learning_rate: str) -> Rho:
    return Rho(*rho, f"measured, {learning_rate}", is_measured=True)


def _rho_of(document: dict[str, Any]) -> Rho | None:
    if document.get("rho") is None:
        return None
    ends = [math.nan if end is None else float(end) for end in document["rho"]]
    return _measured(Interval(*ends), document.get("learning_rate", NOT_RECORDED))


def _problem(table: pd.DataFrame, form: Form, several: bool) -> Problem:
    clients = np.log(table["clients"].to_numpy(dtype=np.float64)) if several else None
    return Problem(form, columns_of(table, form), np.log(table["loss"].to_numpy(dtype=np.float64)), clients)


def _largest(table: pd.DataFrame) -> pd.Series[bool]:
    """Mark the runs of the largest compute, if enough others remain."""
    total = table["flops"] * table["clients"]
    largest = total >= total.max() * 0.5  # the last round may exceed the requested compute
    few: pd.Series[bool] = largest if largest.sum() <= _MOST_HELD_OUT * len(table) else largest & False
    return few


def _enough(table: pd.DataFrame, problem: Problem, has_best: bool) -> None:
    number = len(problem.unknowns)
    if len(problem.log_loss) < number:
        raise ValueError(
            f"runs: {len(problem.log_loss)} runs cannot determine {number} constants. Pass {2 * number} or more."
        )
    if has_best and table["params"].nunique() == 1:
        raise ValueError(
            f"runs: all models have {table['params'].iloc[0]:,.0f} parameters. Pass runs of several sizes."
        )


def _bootstrap(problem: Problem, best: FloatArray, number: int, seed: int) -> list[dict[str, float]]:
    rng, found = np.random.default_rng(seed), []
    size = len(problem.log_loss)
    for _ in range(number):
        resampled = problem.rows(rng.integers(0, size, size))
        constants = resampled.constants(resampled.again(best))
        found.append({name: float(value) for name, value in constants.items()})
    return found


def _law(form: Form, problem: Problem, best: FloatArray, draws: list[dict[str, float]], where: Range) -> Form:
    constants = {name: float(value) for name, value in problem.constants(best).items() if name != "rho"}
    fitted = form.replace(**gathered(constants), fitted_on=where)
    refits = [Refit({k: v for k, v in draw.items() if k != "rho"}, draw.get("rho", math.nan)) for draw in draws]
    return fitted.replace(refits=tuple(refits))


def _range(table: pd.DataFrame, task: str, by_size: bool) -> Range:
    clients = (int(table["clients"].min()), int(table["clients"].max()))
    if not by_size:
        return Range(task, clients=clients)
    params, flops = ((float(table[name].min()), float(table[name].max())) for name in ("params", "flops"))
    return Range(task, params, flops, clients)


def _intervals(law: Form, best: dict[str, Any], draws: list[dict[str, float]]) -> dict[str, Interval]:
    """Return the intervals of all constants and, for laws that have one, of the exponent of the best size."""
    found = {name: Interval.of(float(value), [float(draw[name]) for draw in draws]) for name, value in best.items()}
    if isinstance(law, Chinchilla):
        shares = [float(draw["beta"] / (draw["alpha"] + draw["beta"])) for draw in draws]
        found["exponent"] = Interval.of(law.exponent, shares)
    return found


def _verdict(
    table: pd.DataFrame,
    law: Law,
    condition: float,
    rho: Interval | None,
    intervals: dict[str, Interval],
    flops_per: float | None,
    seed: int,
) -> tuple[list[str], list[str], IsoFlop | None]:
    """Return why the runs do not determine a best size, other doubts, and the best sizes by parabolas."""
    price, notes = 1.0 if rho is None else rho.value, list[str]()
    known = None if law.missing else law
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problems = problems_of(table, law, condition, price, intervals) + doubts_of_flops(table, flops_per)
        if known is not None:
            wrong, notes = contradictions(table, known, law.made_for.best, price)
            problems += wrong
        return problems, notes, isoflop(table, known, price, seed)


def _rms(residuals: FloatArray) -> float:
    return float(np.sqrt(np.mean(residuals**2)))


def _plain(value: Any) -> Any:
    """Convert to JSON values: NaN and infinity become None."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
