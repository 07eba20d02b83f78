"""The search behind `fit`: a sum of Huber losses of log-loss residuals, exact gradients, many starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear, minimize

from lightning_fedscale.scaling.dual import Dual, FloatArray, exp, log
from lightning_fedscale.scaling.form import Form, Unknown, duals, gathered

HUBER = 1e-3
"""Size of log-loss residuals above which they count linearly, as in arXiv 2203.15556."""
_POLISHED = 12
_SHARE = 1e-3
_BEYOND = 1e6  # residual where the formula is not a number
_RHO = Unknown(0.0, 1.0, positive=False)


@dataclass(frozen=True)
class Problem:
    """A form, and the runs that its constants are fitted to.

    Attributes:
        form: the form whose constants are fitted.
        columns: what the formula needs of the runs, by name.
        log_loss: logarithm of the measured loss of each run.
        log_clients: logarithm of the clients of each run, if ``rho`` is fitted as well: a client's data count as
            ``D clients**(1 - rho)``.
    """

    form: Form
    columns: Mapping[str, Any]
    log_loss: FloatArray
    log_clients: FloatArray | None = None

    @cached_property
    def unknowns(self) -> dict[str, Unknown]:
        """The constants that are fitted, with ``rho`` last if it is one of them."""
        found = dict(self.form.sought(self.columns))
        return found if self.log_clients is None else {**found, "rho": _RHO}

    def rows(self, which: Any) -> Problem:
        """Return the problem of a subset or a resample of the runs."""
        columns = {
            name: tuple(part[which] for part in column) if isinstance(column, tuple) else column[which]
            for name, column in self.columns.items()
        }
        clients = None if self.log_clients is None else self.log_clients[which]
        return Problem(self.form, columns, self.log_loss[which], clients)

    def losses(self, constants: Mapping[str, Any]) -> Any:
        """Compute the losses by the formula with these constants."""
        known, columns = dict(constants), self.columns
        rho = known.pop("rho", None)
        if rho is not None:
            columns = {**columns, "tokens": exp((1.0 - rho) * self.log_clients) * columns["tokens"]}
        return self.form.formula(SimpleNamespace(**gathered(known)), SimpleNamespace(**columns))

    def constants(self, theta: Any) -> dict[str, Any]:
        """Convert places on the search scales to constants by name."""
        return {name: each.value(place) for (name, each), place in zip(self.unknowns.items(), theta, strict=True)}

    def theta(self, constants: Mapping[str, float]) -> FloatArray:
        """Convert constants by name to places on the search scales."""
        return np.array([each.theta(constants[name]) for name, each in self.unknowns.items()])

    def residuals(self, theta: FloatArray) -> FloatArray:
        """Compute the residuals of the log-loss."""
        with np.errstate(all="ignore"):
            found = np.log(self.losses(self.constants(theta))) - self.log_loss
        return np.where(np.isfinite(found), found, _BEYOND)

    def jacobian(self, theta: FloatArray) -> FloatArray:
        """Compute the derivatives of the residuals, one row per run."""
        return self._with_jacobian(theta)[1]

    def _with_jacobian(self, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Compute residuals and their derivatives by one evaluation of the formula."""
        with np.errstate(all="ignore"):
            losses: Dual = log(self.losses(self.constants(duals(theta))))
            found = losses.value - self.log_loss
        slope = np.broadcast_to(losses.slope, (len(theta), len(found))).T
        return np.where(np.isfinite(found), found, _BEYOND), np.where(np.isfinite(slope), slope, 0.0)

    def objective(self, theta: FloatArray) -> float:
        """Sum the Huber losses; a mean would fall below the search's tolerance long before the minimum."""
        return float(huber(self.residuals(theta)).sum())

    def projected(self, nonlinear: Mapping[str, float]) -> dict[str, float] | None:
        """Solve for the linear constants by least squares of relative residuals (variable projection)."""
        matrix, target = self._linear(nonlinear)
        size = np.linalg.norm(matrix, axis=0)
        if not (np.isfinite(matrix).all() and np.isfinite(target).all() and (size > 0).all()):
            return None
        linear = {name: each for name, each in self.unknowns.items() if each.linear}
        low = [0.0 if each.positive else -np.inf for each in linear.values()]
        found = lsq_linear(matrix / size, target, (low, np.inf), method="bvls").x / size
        return self.eased({**nonlinear, **dict(zip(linear, found.tolist(), strict=True))})

    def eased(self, constants: Mapping[str, float]) -> dict[str, float]:
        """Raise linear constants whose terms vanished to a small fraction of the loss, so that they can grow again."""
        linear = [name for name, each in self.unknowns.items() if each.linear]
        if not linear:
            return dict(constants)
        matrix, _ = self._linear({name: value for name, value in constants.items() if name not in linear})
        least = _SHARE / np.maximum(np.abs(matrix).mean(0), 1e-300)
        raised = {
            name: max(constants[name], float(each))
            for name, each in zip(linear, least, strict=True)
            if self.unknowns[name].positive
        }
        return {**constants, **raised}

    def solve(self, start: FloatArray, steps: int = 200) -> FloatArray:
        """Search the minimum from a start."""
        found: FloatArray = minimize(
            self.with_gradient, start, jac=True, method="BFGS", options={"maxiter": steps, "gtol": 1e-6}
        ).x
        return found

    def with_gradient(self, theta: FloatArray) -> tuple[float, FloatArray]:
        """Compute the objective and its gradient, scaled so that a small objective does not stop the search early."""
        residuals, jacobian = self._with_jacobian(theta)
        gradient = np.clip(residuals, -HUBER, HUBER) @ jacobian
        return float(huber(residuals).sum()) / HUBER**2, gradient / HUBER**2

    def starts(self) -> FloatArray:
        """Return the best of many points, since the objective has many minima."""
        free = {name: each for name, each in self.unknowns.items() if not each.linear}
        points = [dict[str, float]()]
        if free:
            low, high = np.array([sorted(_ends(each)) for each in free.values()]).T
            from scipy.stats import qmc  # only when needed: no prediction of a law takes all of scipy.stats

            cube = qmc.Sobol(len(free), seed=0).random(256 if len(free) <= 3 else 1024)
            places = low + cube * (high - low)
            points = [
                {name: float(each.value(place)) for (name, each), place in zip(free.items(), row, strict=True)}
                for row in places
            ]
        if len(free) < len(self.unknowns):
            points = [full for point in points if (full := self.projected(point)) is not None]
        thetas = np.array([self.theta(point) for point in points])
        values = np.array([self.objective(theta) for theta in thetas])
        found: FloatArray = thetas[np.argsort(values)[:_POLISHED]]
        return found

    def best(self) -> FloatArray:
        """Return the lowest of the minima."""
        minima = [self.solve(start) for start in self.starts()]
        least = min(minima, key=self.objective)
        return min(least, self.solve(least, 2000), key=self.objective)

    def again(self, theta: FloatArray) -> FloatArray:
        """Return the minimum near that of other runs."""
        return self.solve(self.theta(self.eased(self.constants(theta))))

    def condition(self, theta: FloatArray) -> float:
        """Return the condition number of the Gauss-Newton Hessian, scaled to a unit diagonal."""
        jacobian = self.jacobian(theta)
        size = np.linalg.norm(jacobian, axis=0)
        return float("inf") if (size == 0).any() else float(np.linalg.cond(jacobian / size) ** 2)

    def _linear(self, nonlinear: Mapping[str, float]) -> tuple[FloatArray, FloatArray]:
        """Return what a unit of each linear constant adds to the loss, and the loss they must explain, as fractions."""
        linear = [name for name, each in self.unknowns.items() if each.linear]
        nothing = {**nonlinear, **dict.fromkeys(linear, 0.0)}
        with np.errstate(all="ignore"):
            weight = np.exp(-self.log_loss)
            rest = np.broadcast_to(self.losses(nothing), weight.shape)
            columns = [(self.losses({**nothing, name: 1.0}) - rest) * weight for name in linear]
        return np.stack(np.broadcast_arrays(*columns), -1), 1.0 - rest * weight


def huber(residuals: FloatArray) -> FloatArray:
    """Compute half the square up to `HUBER`, and linear growth beyond."""
    size = np.abs(residuals)
    found: FloatArray = np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2))
    return found


def _ends(each: Unknown) -> tuple[float, float]:
    return each.theta(each.low), each.theta(each.high)
