"""Comparison of a run with the best size for its compute and its number of clients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from scipy.optimize import brentq

from lightning_fedscale.scaling.agreement import Agreement
from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.form import Interval, positive
from lightning_fedscale.scaling.project import needed_law
from lightning_fedscale.scaling.rho import Rho, rho_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 0.01
"""A size is good if its predicted loss exceeds that of the best size by at most this fraction."""

_FLAT = 2.0
"""Under a law that does not predict the loss, sizes within this factor of the best are good. Under Chinchilla's law,
1 % of the loss is a factor of 1.8 in both directions at 1e18 FLOPs, and 2.7 at 1e22."""

_UNKNOWN = Interval(math.nan, math.nan, math.nan)
_ENDS = {0.0: "all compute counts, as in data parallelism", 1.0: "only the average client's compute counts"}


@dataclass(frozen=True)
class Position:
    """A run and the best size for its compute, under a law.

    If ``rho`` is known only as an interval, the numbers here are those for its upper end, `readings` has both ends, and
    `advice` gives a verdict only if both ends agree.

    Attributes:
        law: the law's name.
        params: model size, as the law counts it.
        tokens: tokens, or samples, that all clients trained on.
        flops: training FLOPs of all clients.
        clients: number of clients that train in a round.
        rho: cost of dividing the compute among clients, ``C_eff = C clients**-rho``.
        optimal_params: the best size for this compute and number of clients.
        low: smallest size whose predicted loss is within 1 % of the best.
        high: largest such size.
        predicted_loss: predicted loss of this run.
        optimal_loss: predicted loss of the best size.
        catch_up: factor of the compute at which this size would be the best; NaN if there is none.
        uncertainty: the best size with its 95 % interval by the law's constants and by ``rho``; the ends are NaN if
            they are not known.
        outside: sentences on numbers of the run that lie outside the range that the law was fitted on.
        no_loss: why the law does not predict this run's loss; empty if it does.
        known_rho: ``rho`` with its ends, and how it is known.
        readings: the positions at both ends of ``rho``, lower end first; empty if ``rho`` is one number, and for one
            client.
        agreement: comparison of the run with the law's runs; None if they were not compared.
    """

    law: str
    params: float
    tokens: float
    flops: float
    clients: int
    rho: float
    optimal_params: float
    low: float
    high: float
    predicted_loss: float
    optimal_loss: float
    catch_up: float = math.nan
    uncertainty: Interval = _UNKNOWN
    outside: tuple[str, ...] = ()
    no_loss: str = ""
    known_rho: Rho | None = None
    readings: tuple[Position, ...] = ()
    agreement: Agreement | None = None

    @property
    def size_ratio(self) -> float:
        """Model size over the best size."""
        return self.params / self.optimal_params

    @property
    def excess_loss(self) -> float:
        """Predicted loss of this size minus that of the best size."""
        return self.predicted_loss - self.optimal_loss

    @property
    def ends(self) -> tuple[float, float]:
        """Ends of the 95 % interval of the best size."""
        return self.uncertainty.low, self.uncertainty.high

    @property
    def verdict(self) -> str | None:
        """The verdict on the size: "too large", "too small" or "right".

        It is None if the uncertainty of the constants or of ``rho`` leaves it open, or if the law is for another method
        or partition.
        """
        if self.agreement is not None and not self.agreement.is_same_task:
            return None
        if self.readings and self.known_rho is not None and self.known_rho.is_span:
            found = {each.verdict for each in self.readings}
            return found.pop() if len(found) == 1 else None
        verdict, (low, high) = self._verdict(self.optimal_params), self.ends
        if verdict == "right":
            is_open = any(math.isfinite(end) and self._verdict(end) != "right" for end in (low, high))
        else:
            is_open = low <= self.params <= high
        return None if is_open else verdict

    def _verdict(self, best: float) -> str:
        # The range of good sizes scales with the best size.
        low = 1 / _FLAT if math.isnan(self.low) else self.low / self.optimal_params
        high = _FLAT if math.isnan(self.high) else self.high / self.optimal_params
        ratio = self.params / best
        return "too large" if ratio > high else "too small" if ratio < low else "right"

    def advice(self) -> str:
        """Describe the position in one sentence.

        Example:
            >>> from lightning_fedscale.scaling import Chinchilla
            >>> run = {"params": 1e9, "tokens": 1e20 / 6e9, "flops": 1e20, "clients": 10}
            >>> print(position_of(Chinchilla(), **run, rho=1.0).advice())
            the model is 3.8 times (3.4 to 4.2) too large for 10 clients (rho 1); a model of 262 M parameters would
            reach a loss of 2.93 instead of 3.06; with 13.6 times the compute, this size would be the best
            >>> print(position_of(Chinchilla(), **run).advice())
            no verdict for 10 clients, since the cost of dividing the compute among them is not known (rho 0 to 1):
            with rho 0 (all compute counts, as in data parallelism) the size is right (best: 853 M parameters); with rho
            1 (only the average client's compute counts) it is 3.8 times (3.4 to 4.2) too large (best: 262 M
            parameters); measure rho with fedscale sweep
        """
        best = _parameters(self.optimal_params)
        if self.agreement is not None and not self.agreement.is_same_task:
            of = " and ".join(name for name in ("method", "partition") if name in self.agreement.others)
            return f"no verdict: the law was fitted to runs with another {of}; under it, {best} would be the best size"
        if self.known_rho is not None and self.known_rho.is_span and self.readings:
            return self._over_the_span(self.known_rho)
        among, verdict = self._among(), self.verdict
        if verdict == "right":
            return f"the size is right for {among}: {self._good()}, {best}"
        if verdict is None:
            return f"no verdict for {among}: the best size lies anywhere between {self._between()}"
        sentence = f"the model is {self._factor()} {verdict} for {among}; a model of {best} would {self._gain()}"
        if not math.isfinite(self.catch_up):
            return sentence
        if verdict == "too large":
            return f"{sentence}; with {self.catch_up:.1f} times the compute, this size would be the best"
        return f"{sentence}; this size would be the best for {1 / self.catch_up:.1f} times less compute"

    def _over_the_span(self, rho: Rho) -> str:
        lower, upper = self.readings
        clients, span = _clients(self.clients), f"{rho.low:g} to {rho.high:g}"
        sizes = " to ".join(f"{_parameters(each.optimal_params)} (rho {each.rho:g})" for each in self.readings)
        if self.verdict == "right":
            return f"the size is right for {clients} at any rho from {span}: {self._good()}, {sizes}"
        if self.verdict is None:
            return (
                f"no verdict for {clients}, since the cost of dividing the compute among them is not known ({rho}):"
                f" {lower._at_end()}; {upper._at_end()}; measure rho with fedscale sweep"
            )
        factors = sorted(max(each.size_ratio, 1 / each.size_ratio) for each in self.readings)
        sentence = (
            f"the model is {factors[0]:.1f} to {factors[1]:.1f} times {self.verdict} for {clients}, depending on rho"
            f" ({span}; measure it with fedscale sweep)"
        )
        if not math.isfinite(self.optimal_loss):
            return f"{sentence}; {sizes} would be best"
        gains = " to ".join(
            f"{_parameters(each.optimal_params)} (rho {each.rho:g}: {each._losses()})" for each in self.readings
        )
        return f"{sentence}; best would be {gains}"

    def _at_end(self) -> str:
        """Describe the position at one end of ``rho``'s interval."""
        named = f" ({_ENDS[self.rho]})" if self.rho in _ENDS else ""
        verdict = self.verdict
        if verdict is None:
            return f"with rho {self.rho:g}{named} the best size lies anywhere between {self._between()}"
        found = "the size is right" if verdict == "right" else f"it is {self._factor()} {verdict}"
        return f"with rho {self.rho:g}{named} {found} (best: {_parameters(self.optimal_params)})"

    def _between(self) -> str:
        return f"{_short(self.ends[0])} and {_parameters(self.ends[1])}"

    def _among(self) -> str:
        among = _clients(self.clients)
        return among if self.clients == 1 or self.known_rho is None else f"{among} ({self.known_rho})"

    def _factor(self) -> str:
        sign = 1 if self.size_ratio > 1 else -1
        factor, *ends = ((self.params / size) ** sign for size in (self.optimal_params, *self.ends))
        known = f" ({min(ends):.1f} to {max(ends):.1f})" if math.isfinite(sum(ends)) and min(ends) < max(ends) else ""
        return f"{factor:.1f} times{known}"

    def _good(self) -> str:
        if math.isfinite(self.optimal_loss + self.low + self.high):
            return f"its predicted loss is within {TOLERANCE:.0%} of that of the best size"
        return f"it is within a factor of {_FLAT:g} of the best size"

    def _gain(self) -> str:
        return f"reach {self._losses()}" if math.isfinite(self.optimal_loss) else "be the best"

    def _losses(self) -> str:
        if not math.isfinite(self.predicted_loss):
            return f"a loss of {self.optimal_loss:.3g}"
        return f"a loss of {self.optimal_loss:.3g} instead of {self.predicted_loss:.3g}"

    def sentences(self) -> str:
        """Return the advice, with notes on extrapolation, on differences from the law's runs, and on a missing loss."""
        said = in_sentences(self.advice(), self.law, self.outside)
        if self.agreement is not None:
            said = " ".join([said, *(f"Note: {note}." for note in self.agreement.notes)])
        return f"{said} {self.law} does not predict the loss of this run: {self.no_loss}." if self.no_loss else said

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes, with ratio, excess and advice; numbers that are not finite become None."""
        plain = asdict(replace(self, readings=(), agreement=None))
        found = {
            **{name: value for name, value in plain.items() if name not in _NESTED},
            "outside": list(self.outside),
            "optimal_params_95": [_finite(end) for end in self.ends],
            "rho_ends": None if self.known_rho is None else [_finite(end) for end in self.known_rho[1:3]],
            "rho_source": None if self.known_rho is None else self.known_rho.source or "passed",
            "size_ratio": self.size_ratio,
            "excess_loss": self.excess_loss,
            "verdict": self.verdict,
            "differs": None if self.agreement is None else self.agreement.notes,
            "advice": self.advice(),
            "readings": [each.as_dict() for each in self.readings],
        }
        return {name: _finite(value) if isinstance(value, float) else value for name, value in found.items()}


_NESTED = ("uncertainty", "known_rho", "readings", "agreement")


def position_of(
    law: Any,
    *,
    params: float,
    tokens: float,
    flops: float,
    clients: int = 1,
    rho: float | tuple[float, float] | Rho | str | None = "auto",
    full: bool = True,
) -> Position:
    """Compare a run with the best size under a law.

    The FLOPs per parameter and token are taken from the run, ``flops / (params tokens)``, so that other sizes of the
    same kind of model are compared at the same compute.

    Args:
        law: any law with a best size, its name, or a file of `Fit.save`.
        params: model size, as the law counts it (`Law.counts`).
        tokens: tokens of all clients together.
        flops: training FLOPs of all clients together.
        clients: number of clients that train in a round.
        rho: cost of dividing the compute among clients: a number, the two ends of an interval, or "auto" for the value
            that was measured with the law, with its interval, else 0 to 1.
        full: whether to compute ``catch_up`` and ``uncertainty`` too, which takes as long as a few hundred best sizes.

    Raises:
        Unfitted: for a law without constants.
        TypeError: for anything that is not a law.
        ValueError: for numbers that are not positive, or an unknown name.
    """
    for name, value in (("params", params), ("tokens", tokens), ("flops", flops)):
        positive(name, value)
    own = needed_law(law).replace(flops_per=flops / (params * tokens))
    # rho has no effect at the number of clients of the law's runs, or if the law's formula contains the clients.
    known = None if clients == own.own_clients or own.knows_clients else rho_of(rho, own.fitted_rho)

    def reading(at: float) -> Position:
        return _reading(own, params, tokens, flops, clients, at, full)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = reading(0.0 if known is None else known.value)
        if known is None or not known.low < known.high:
            return replace(here, known_rho=known)
        readings = tuple(replace(reading(end), known_rho=Rho(end, end, end)) for end in (known.low, known.high))
    ends = here.ends
    if not (known.is_measured and own.refits):  # each refit has its own rho, so the interval includes its uncertainty
        sizes = [size for each in readings for size in (each.optimal_params, *each.ends) if math.isfinite(size)]
        ends = min(sizes), max(sizes)
    return replace(
        here, known_rho=known, readings=readings, uncertainty=Interval(here.optimal_params, *ends) if full else _UNKNOWN
    )


def _reading(own: Law, params: float, tokens: float, flops: float, clients: int, rho: float, full: bool) -> Position:
    """Compute the position for one ``rho``."""
    has_clients = bool(own.made_for.clients) and own.fitted_on is not None and not own.knows_clients
    best = own.optimal_federated(flops, clients, rho)

    def loss(size: float) -> float:
        return own._loss_federated(size, flops / (own.flops_per * size * clients), clients, rho)

    low, high = _band(loss, best.params, best.loss)
    here = Position(
        own.name, params, tokens, flops, clients, rho, best.params, low, high, loss(params), best.loss,
        outside=tuple(own.outside(params=params, flops=flops, **({"clients": clients} if has_clients else {}))),
    )  # fmt: skip
    if math.isnan(here.predicted_loss):
        here = replace(here, no_loss=own.no_loss)
    if not full:
        return here
    catch_up = _solve(lambda factor: own.optimal_federated(flops * factor, clients, rho).params - params, 1e-12, 1e12)
    return replace(here, catch_up=catch_up, uncertainty=own.interval_of_size(flops, clients, rho))


def in_sentences(advice: str, law: str, outside: Sequence[str]) -> str:
    """Write advice as a sentence, followed by a note on numbers outside the fitted range, if any.

    Example:
        >>> in_sentences("a model of 2 M would be best", "Kaplan", ["params=97 lies outside of 768 to 1.5e+09"])
        'A model of 2 M would be best. This is an extrapolation of Kaplan: params=97 lies outside of 768 to 1.5e+09,
        where it was fitted.'
    """
    words = f"{advice[0].upper()}{advice[1:]}."
    return (
        f"{words} This is an extrapolation of {law}: {' and '.join(outside)}, where it was fitted."
        if outside
        else words
    )


def plot(position: Position, law: Law) -> Figure:
    """Plot predicted loss over model size at the run's compute, and mark the run and the best size."""
    from matplotlib.figure import Figure

    law = law.replace(flops_per=position.flops / (position.params * position.tokens))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    is_span = position.known_rho is not None and position.known_rho.is_span
    for each, color in zip(position.readings if is_span else (position,), ("tab:cyan", "tab:blue"), strict=False):
        span = max(10.0, 2 * max(each.size_ratio, 1 / each.size_ratio))
        sizes = [each.optimal_params * span ** (i / 50 - 1) for i in range(101)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = [position.flops / (law.flops_per * size * position.clients) for size in sizes]
            losses = [
                law._loss_federated(size, data, position.clients, each.rho)
                for size, data in zip(sizes, tokens, strict=True)
            ]
        named = f" (rho {each.rho:g})" if is_span else ""
        axes.axvspan(each.low, each.high, color="tab:green", alpha=0.15, label=f"within 1 % of the best{named}")
        axes.plot(sizes, losses, color=color)
        axes.plot(each.optimal_params, each.optimal_loss, "o", color="tab:green", label=f"best size{named}")
        if all(map(math.isfinite, each.ends)):
            axes.hlines(each.optimal_loss, *each.ends, color="tab:green", label=f"its 95 % interval{named}")
        axes.plot(each.params, each.predicted_loss, "D", color="tab:red", label=f"this run{named}")
    axes.set(xscale="log", xlabel="parameters", ylabel="predicted loss")
    axes.set_title(f"{position.law}: {position.flops:.2g} FLOPs on {position._among()}")
    axes.legend(frameon=False)
    return figure


def _band(loss: Callable[[float], float], best: float, least: float) -> tuple[float, float]:
    limit = least * (1 + TOLERANCE)

    def excess(size: float) -> float:
        return loss(size) - limit

    return _solve(excess, best / 1e6, best), _solve(excess, best, best * 1e6)


def _solve(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function of one positive number is zero; NaN if it has no sign change between the ends."""
    try:
        return math.exp(float(brentq(lambda log: function(math.exp(log)), math.log(low), math.log(high), xtol=1e-5)))
    except ValueError:
        return math.nan


def _clients(number: int) -> str:
    return "one client" if number == 1 else f"{number:,} clients"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parameters(number: float) -> str:
    return f"{_short(number)} parameters"


def _short(number: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f}" if number >= 1 else f"{number:.3g}"
