"""What can be fitted: a formula with constants, which are known, published, or found by `fit`."""

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
        linear: whether the formula is linear in it: then no start is needed (variable projection).
        below: what it stays below, if anything; then ``positive`` plays no part.
    """

    low: float = 0.0
    high: float = 0.0
    positive: bool = True
    linear: bool = False
    below: float | None = None

    def value(self, theta: Any) -> Any:
        """The constant by its place on the scale that is searched."""
        if self.below is not None:
            return self.below - exp(theta)
        return exp(theta) if self.positive else theta

    def theta(self, value: float) -> float:
        """The place of a constant on the scale that is searched."""
        if self.below is not None:
            return math.log(self.below - value)
        return math.log(max(value, 1e-300)) if self.positive else value


_ANYTHING = 1e4
"""Ends of an interval that are so many times apart tell nothing."""


class Interval(NamedTuple):
    """A number and the ends of its 95 % interval; these are NaN where nothing is known of them."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> str:
        """Both ends in words; a value outside of them, or ends that are many times apart, say that it may be anything.

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
        """With an error of the logarithm, a standard deviation, in quadrature; as it is where that is not known.

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
        """From a bootstrap's values."""
        found = [draw for draw in draws if not math.isnan(draw)]
        if len(found) < 2:
            return cls(float(value), math.nan, math.nan)
        low, high = np.quantile(found, [0.025, 0.975], method="nearest").tolist()  # some may be infinite
        return cls(float(value), low, high)


class Refit(NamedTuple):
    """The constants that another sample of the same runs gave.

    Attributes:
        constants: by name.
        rho: what division among clients costs; NaN if that was not fitted.
    """

    constants: dict[str, float]
    rho: float = math.nan


LINEAR = Unknown(linear=True)
SIGNED = Unknown(positive=False, linear=True)
EXPONENT = Unknown(0.05, 1.5)


class Range(NamedTuple):
    """Where a law was fitted.

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
    """A law was asked for a prediction whose constants nobody has published."""


_NUMBERS = ("float", "int", "tuple[float, ...]")
_Self = TypeVar("_Self", bound="Form")


@dataclass(frozen=True)
class Form:
    """A formula with constants.

    Fields are the constants; one that nobody has published is None, and predictions are refused until it is passed or
    fitted.

    Attributes:
        source: where form and constants are from.
        units: of what goes in and comes out.
        holds: where the published constants were fitted.
        columns: what the formula needs of every run, beside its constants.
        unknowns: the constants that `fit` finds.
        fitted_on: where these constants were fitted, if not where ``holds`` says.
        refits: what the bootstrap of a fit gave, for intervals.
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
        """Where the law was fitted."""
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
                f"{self.name}: its constants are not published ({', '.join(unknown)} unknown): fit them to runs of your"
                f" own, or pass them, {self.name}({', '.join(f'{name}=...' for name in unknown)})."
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
        """The law with other constants."""
        return dataclasses.replace(self, **constants)

    def formula(self, c: Any, run: Any) -> Any:
        """The loss, by constants and by what is known of a run; both may be arrays, constants may be `Dual`."""
        raise NotImplementedError

    def predict(self, **run: Any) -> Any:
        """The formula with the law's own constants, for numbers or arrays of each of ``columns``."""
        self.check()
        return self.formula(SimpleNamespace(**self.constants), SimpleNamespace(**run))

    def interval_of(self, **run: float) -> Interval:
        """What the formula says of one run, with its 95 % interval by the fit's refits."""
        if not self.refits:
            self.check()
        of_run, known = SimpleNamespace(**run), self.constants
        samples = [known, *({**known, **gathered(each.constants)} for each in self.refits)]
        with np.errstate(all="ignore"):
            value, *draws = [float(self.formula(SimpleNamespace(**constants), of_run)) for constants in samples]
        return Interval.of(value, draws)

    def fits(self) -> bool:
        """Whether there are constants to be fitted."""
        return bool(self.unknowns) or type(self).sought is not Form.sought

    def sought(self, run: Mapping[str, Any]) -> Mapping[str, Unknown]:
        """The constants that a fit to these runs looks for; "name.0", "name.1", ... are parts of one."""
        return self.unknowns


@cache
def _constants_of(form: type[Any]) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(form) if not each.kw_only)


@cache
def _numbers_of(form: type[Any]) -> tuple[str, ...]:
    """Fields that hold a number, several, or None."""
    return tuple(each.name for each in dataclasses.fields(form) if str(each.type).removesuffix(" | None") in _NUMBERS)


def gathered(values: Mapping[str, Any]) -> dict[str, Any]:
    """Constants by name, with the parts of one in a tuple.

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
    """One number for each unknown, which carries a derivative of 1 by itself."""
    return [Dual(value, unit[:, None]) for value, unit in zip(theta, np.eye(len(theta)), strict=True)]


def positive(name: str, value: float) -> float:
    """The number, if it is finite and above 0.

    Raises:
        ValueError: if not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: pass a finite number above 0.")
    return float(value)


def closest(kind: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for an unknown name, with the closest match."""
    near = get_close_matches(name.lower(), [each.lower() for each in known], 1)
    match = next((each for each in known if near and each.lower() == near[0]), None)
    hint = f" Did you mean {match!r}?" if match else ""
    return ValueError(f"{kind}={name!r} is not known.{hint} Known: {', '.join(map(repr, known))}.")
