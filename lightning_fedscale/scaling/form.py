"""The base class of everything that can be fitted: a formula whose constants are passed, published or fitted."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from lightning_fedscale.scaling.dual import Dual, exp


class Unknown(NamedTuple):
    """A constant that a fit looks for.

    Attributes:
        low: least value to start from.
        high: largest value to start from.
        positive: whether the constant is above 0 (and is searched on a logarithmic scale).
        linear: whether the formula is linear in it, so that no start is needed (variable projection).
        below: upper limit of the constant, if it has one; ``positive`` is then ignored.
    """

    low: float = 0.0
    high: float = 0.0
    positive: bool = True
    linear: bool = False
    below: float | None = None

    def value(self, theta: Any) -> Any:
        """Return the constant at a place on the search scale."""
        if self.below is not None:
            return self.below - exp(theta)
        return exp(theta) if self.positive else theta

    def theta(self, value: float) -> float:
        """Return the place of a constant on the search scale."""
        if self.below is not None:
            return math.log(self.below - value)
        return math.log(max(value, 1e-300)) if self.positive else value


_ANYTHING = 1e4
"""Ends of an interval that are further apart than this factor do not determine the number."""


class Interval(NamedTuple):
    """A number and the ends of its 95 % interval; the ends are NaN if they are not known."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> str:
        """Both ends in words; "not determined" if the value lies outside of them or they are too far apart.

        Example:
            >>> Interval(0.35, 0.31, 0.4).ends, Interval(0.07, 2e20, 2e48).ends, Interval(1.0, math.nan, math.nan).ends
            ('0.31 to 0.4', 'not determined', 'not known')
        """
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "not known" if math.isnan(self.low) else "not determined"
        holds = self.low <= self.value <= self.high
        apart = self.low > 0 and self.high > _ANYTHING * self.low
        return f"{self.low:.4g} to {self.high:.4g}" if holds and not apart else "not determined"

    def __str__(self) -> str:
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})" if known else f"{self.value:.4g}"

    def widened(self, error: float) -> Interval:
        """Add an error of the logarithm (a standard deviation) in quadrature; without a known error nothing changes.

        Example:
            >>> print(Interval(2.0, 1.9, 2.1).widened(0.0), Interval(2.0, math.nan, math.nan).widened(0.05))
            2 (1.9 to 2.1) 2 (1.813 to 2.206)
        """
        if not (math.isfinite(error) and error > 0 and self.value > 0):
            return self
        below, above = (
            math.hypot(1.96 * error, 0.0 if math.isnan(end) else math.log(max(1.0, ratio)) if ratio > 0 else math.inf)
            for end, ratio in (
                (self.low, self.value / self.low if self.low else 0.0),
                (self.high, self.high / self.value),
            )
        )
        return Interval(self.value, self.value * math.exp(-below), self.value * math.exp(above))

    @classmethod
    def of(cls, value: float, draws: Sequence[float]) -> Interval:
        """Return the interval of a value from the values of a bootstrap."""
        found = [draw for draw in draws if not math.isnan(draw)]
        if len(found) < 2:
            return cls(float(value), math.nan, math.nan)
        low, high = np.quantile(found, [0.025, 0.975], method="nearest").tolist()  # some may be infinite
        return cls(float(value), low, high)


class Refit(NamedTuple):
    """The constants of a refit to a resample of the same runs.

    Attributes:
        constants: constants by name.
        rho: cost of dividing the compute among clients; NaN if it was not fitted.
    """

    constants: dict[str, float]
    rho: float = math.nan


LINEAR = Unknown(linear=True)
SIGNED = Unknown(positive=False, linear=True)
EXPONENT = Unknown(0.05, 1.5)


class Range(NamedTuple):
    """The range on which a law was fitted.

    Attributes:
        task: kind of data and model, such as "text".
        params: smallest and largest model.
        flops: smallest and largest compute of one client.
        clients: fewest and most clients.
    """

    task: str
    params: tuple[float, float] = (0.0, math.inf)
    flops: tuple[float, float] = (0.0, math.inf)
    clients: tuple[int, int] = (1, 1)


class Unfitted(ValueError):
    """Raised for a prediction by a law whose constants are neither published, passed nor fitted."""


_NUMBERS = ("float", "int", "tuple[float, ...]")
_Self = TypeVar("_Self", bound="Form")


@dataclass(frozen=True)
class Form:
    """A formula with constants.

    The fields are the constants. A constant that is not published is None, and predictions raise `Unfitted` until it is
    passed or fitted.

    Attributes:
        source: source of the form and the constants.
        units: units of the inputs and of the loss.
        holds: range on which the published constants were fitted.
        columns: what the formula needs of every run, besides its constants.
        unknowns: the constants that `fit` determines.
        fitted_on: range on which these constants were fitted, if it is not ``holds``.
        refits: the constants of the bootstrap's refits, for intervals.
    """

    source: ClassVar[str] = ""
    units: ClassVar[str] = "parameters, tokens, nats per token"
    holds: ClassVar[Range] = Range("any")
    columns: ClassVar[tuple[str, ...]] = ()
    unknowns: ClassVar[Mapping[str, Unknown]] = {}
    fitted_on: Range | None = field(default=None, kw_only=True, compare=False)
    refits: tuple[Refit, ...] = field(default=(), kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that constants are numbers."""
        self._check_numbers()

    @property
    def name(self) -> str:
        """The law's name."""
        return type(self).__name__

    @property
    def domain(self) -> Range:
        """Range on which the law was fitted."""
        return self.fitted_on or self.holds

    @property
    def constants(self) -> dict[str, Any]:
        """The law's constants by name."""
        form: Any = type(self)
        return {name: getattr(self, name) for name in _constants_of(form)}

    @property
    def missing(self) -> list[str]:
        """Names of the constants that are not known."""
        return [name for name, value in self.constants.items() if value is None]

    def check(self) -> None:
        """Raise `Unfitted` if a constant is unknown."""
        if unknown := self.missing:
            raise Unfitted(
                f"{self.name}: its constants are not published ({', '.join(unknown)} unknown): fit them to your own"
                f" runs, or pass them: {self.name}({', '.join(f'{name}=...' for name in unknown)})."
            )

    def _check_numbers(self) -> None:
        form: Any = type(self)
        for name in _numbers_of(form):
            value = getattr(self, name)
            several = isinstance(value, Sequence) and not isinstance(value, str)
            for each in value if several else (value,):
                if each is not None and (isinstance(each, bool) or not isinstance(each, numbers.Real)):
                    raise TypeError(f"{self.name}: {name}={value!r}: pass {'numbers' if several else 'a number'}.")

    def replace(self: _Self, **constants: Any) -> _Self:
        """Return the law with other constants."""
        return dataclasses.replace(self, **constants)

    def formula(self, c: Any, run: Any) -> Any:
        """Compute the loss from constants and a run's ``columns``; both may be arrays, constants may be `Dual`."""
        raise NotImplementedError

    def predict(self, **run: Any) -> Any:
        """Compute the formula with the law's own constants, for numbers or arrays of each of ``columns``."""
        self.check()
        return self.formula(SimpleNamespace(**self.constants), SimpleNamespace(**run))

    def interval_of(self, **run: float) -> Interval:
        """Predict one run, with the 95 % interval of the fit's refits."""
        if not self.refits:
            self.check()
        of_run, known = SimpleNamespace(**run), self.constants
        samples = [known, *({**known, **gathered(each.constants)} for each in self.refits)]
        with np.errstate(all="ignore"):
            value, *draws = [float(self.formula(SimpleNamespace(**constants), of_run)) for constants in samples]
        return Interval.of(value, draws)

    def fits(self) -> bool:
        """Return whether there are constants to be fitted."""
        return bool(self.unknowns) or type(self).sought is not Form.sought

    def sought(self, run: Mapping[str, Any]) -> Mapping[str, Unknown]:
        """Return the unknowns of a fit to these runs; "name.0", "name.1", ... are the elements of one tuple."""
        return self.unknowns


@cache
def _constants_of(form: type[Any]) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(form) if not each.kw_only)


@cache
def _numbers_of(form: type[Any]) -> tuple[str, ...]:
    """Return the fields that hold a number, several numbers, or None."""
    return tuple(each.name for each in dataclasses.fields(form) if str(each.type).removesuffix(" | None") in _NUMBERS)


def gathered(values: Mapping[str, Any]) -> dict[str, Any]:
    """Collect "name.0", "name.1", ... in one tuple under "name".

    Example:
        >>> gathered({"E": 1.0, "gains.0": 2.0, "gains.1": 3.0})
        {'E': 1.0, 'gains': (2.0, 3.0)}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        whole, dot, _ = name.partition(".")
        found[whole] = (*found.get(whole, ()), value) if dot else value
    return found


def duals(theta: np.ndarray[Any, np.dtype[np.float64]]) -> list[Dual]:
    """Return a number for each unknown, whose derivative by that unknown is 1."""
    return [Dual(value, unit[:, None]) for value, unit in zip(theta, np.eye(len(theta)), strict=True)]


def positive(name: str, value: float) -> float:
    """Return the number if it is finite and above 0.

    Raises:
        ValueError: if not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: pass a finite number above 0.")
    return float(value)


def closest(kind: str, name: str, known: Sequence[str]) -> ValueError:
    """Return the error for an unknown name, with the closest match."""
    near = get_close_matches(name.lower(), [each.lower() for each in known], 1)
    match = next((each for each in known if near and each.lower() == near[0]), None)
    hint = f" Did you mean {match!r}?" if match else ""
    return ValueError(f"{kind}={name!r} is not known.{hint} Known: {', '.join(map(repr, known))}.")
