"""Where a run stands against the best size for its compute and its number of clients."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from scipy.optimize import brentq

from lightning_fedscale.scaling.base import Law, effective_flops
from lightning_fedscale.scaling.federated import federated
from lightning_fedscale.scaling.form import Interval, positive
from lightning_fedscale.scaling.project import needed_law

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 0.01
"""Share of the predicted loss by which a size may be worse than the best one and still counts as good."""

_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Position:
    """A run and the best size for what it costs, under a law.

    Attributes:
        law: the law's name.
        params: model size.
        tokens: tokens, or samples, that all clients trained on.
        flops: training FLOPs of all clients.
        clients: number of clients.
        rho: what division among clients costs, ``C_eff = C clients**-rho``.
        optimal_params: the best size for this compute and so many clients.
        low: smallest size whose predicted loss is within 1 % of the best.
        high: largest such size.
        predicted_loss: of this run.
        optimal_loss: of the best size.
        catch_up: how many times the compute would make this very size the best; NaN where the law does not say.
        uncertainty: the best size with its 95 % interval by the law's constants; its ends are NaN where nothing is
            known of these.
        outside: which numbers of the run lie outside of what the law was fitted on.
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

    @property
    def size_ratio(self) -> float:
        """How many times larger than best the model is."""
        return self.params / self.optimal_params

    @property
    def excess_loss(self) -> float:
        """What the size costs in predicted loss."""
        return self.predicted_loss - self.optimal_loss

    @property
    def ends(self) -> tuple[float, float]:
        """Of the 95 % interval of the best size."""
        return self.uncertainty.low, self.uncertainty.high

    def advice(self) -> str:
        """One sentence.

        Example:
            >>> from lightning_fedscale.scaling import Chinchilla
            >>> print(position_of(Chinchilla(), params=1e9, tokens=1e20 / 6e9, flops=1e20, clients=10).advice())
            3.8 times (3.4 to 4.2) too large for 10 clients; a 262 M model would reach 2.93 instead of 3.06; or raise
            compute 13.6 times
        """
        among = "one client" if self.clients == 1 else f"{self.clients:,} clients"
        if self.low <= self.params <= self.high:
            best = _short(self.optimal_params)
            return f"the size is right for {among}: within {TOLERANCE:.0%} of the loss of the best, {best}"
        large = self.size_ratio > 1
        factor, low, high = ((self.params / size) ** (1 if large else -1) for size in (self.optimal_params, *self.ends))
        known = f" ({min(low, high):.1f} to {max(low, high):.1f})" if math.isfinite(low + high) else ""
        sentence = f"{factor:.1f} times{known} too {'large' if large else 'small'} for {among}"
        best = _short(self.optimal_params)
        article = "an" if re.match(r"8|1[18]\b", best) else "a"
        sentence += f"; {article} {best}{'' if best[-1].isalpha() else '-parameter'} model would "
        known_loss = math.isfinite(self.optimal_loss)
        sentence += f"reach {self.optimal_loss:.3g} instead of {self.predicted_loss:.3g}" if known_loss else "be best"
        if not math.isfinite(self.catch_up):
            return sentence
        if large:
            return f"{sentence}; or raise compute {self.catch_up:.1f} times"
        return f"{sentence}; this size is best for {1 / self.catch_up:.1f} times less compute"

    def sentences(self) -> str:
        """The advice, and whether it is an extrapolation."""
        return in_sentences(self.advice(), self.law, self.outside)

    def as_dict(self) -> dict[str, Any]:
        """All of it, with ratio, excess and advice; None for what is not finite."""
        found = {
            **{name: value for name, value in asdict(self).items() if name != "uncertainty"},
            "outside": list(self.outside),
            "optimal_params_95": [_finite(end) for end in self.ends],
            "size_ratio": self.size_ratio,
            "excess_loss": self.excess_loss,
            "advice": self.advice(),
        }
        return {name: _finite(value) if isinstance(value, float) else value for name, value in found.items()}


def position_of(
    law: Any,
    *,
    params: float,
    tokens: float,
    flops: float,
    clients: int = 1,
    rho: float = 1.0,
    full: bool = True,
) -> Position:
    """Where a run stands under a law.

    What a token costs per parameter is taken from the run, ``flops / (params tokens)``, so that other sizes of the same
    kind of model are compared at the same compute.

    Args:
        law: any law with a best size, its name, or a file of `Fit.save`.
        params: model size.
        tokens: tokens of all clients together.
        flops: training FLOPs of all clients together.
        clients: number of clients.
        rho: see `lightning_fedscale.scaling.Law.optimal_federated`.
        full: whether to find ``catch_up`` and ``uncertainty`` too, which takes as long as a few hundred best sizes.

    Raises:
        Unfitted: for a law without constants.
        TypeError: for something else than a law.
        ValueError: for numbers that are not positive, or an unknown name.
    """
    for name, value in (("params", params), ("tokens", tokens), ("flops", flops)):
        positive(name, value)
    own = needed_law(law).replace(flops_per=flops / (params * tokens))
    seen = federated(own, rho, clients)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best, worth = seen.optimal(flops), effective_flops(flops, clients, rho)

        def loss(size: float) -> float:
            # As `Law.loss_federated` has it, whose checks of its arguments would take most of the time here.
            return own._loss(size, worth / (own.flops_per * size))

        def best_for(factor: float) -> float:
            return seen.optimal(flops * factor).params

        low, high = _band(loss, best.params, best.loss)
        here = Position(
            own.name, params, tokens, flops, clients, rho, best.params, low, high, loss(params), best.loss,
            outside=tuple(own.outside(params=params, flops=flops)),
        )  # fmt: skip
        if not full:
            return here
        catch_up = _solve(lambda factor: best_for(factor) - params, 1e-12, 1e12)
        return replace(here, catch_up=catch_up, uncertainty=own.interval_of_size(flops, clients, rho))


def in_sentences(advice: str, law: str, outside: Sequence[str]) -> str:
    """Advice as it is shown, with the numbers that lie outside of what the law was fitted on, if any.

    Example:
        >>> in_sentences("a 2 M model would be best", "Kaplan", ["params=97 lies outside of 768 to 1.5e+09"])
        'A 2 M model would be best. This is an extrapolation of Kaplan: params=97 lies outside of 768 to 1.5e+09, where
        it was fitted.'
    """
    words = f"{advice[0].upper()}{advice[1:]}."
    return (
        f"{words} This is an extrapolation of {law}: {' and '.join(outside)}, where it was fitted."
        if outside
        else words
    )


def plot(position: Position, law: Law) -> Figure:
    """Predicted loss over model size at the run's compute, with the run and the best size marked."""
    from matplotlib.figure import Figure

    law = law.replace(flops_per=position.flops / (position.params * position.tokens))
    seen = federated(law, position.rho, position.clients)
    span = max(10.0, 2 * max(position.size_ratio, 1 / position.size_ratio))
    sizes = [position.optimal_params * span ** (i / 50 - 1) for i in range(101)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [seen.loss(size, position.flops / (law.flops_per * size * position.clients)) for size in sizes]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(position.low, position.high, color="tab:green", alpha=0.15, label="within 1 % of the best")
    axes.plot(sizes, losses, color="tab:blue")
    axes.plot(position.optimal_params, position.optimal_loss, "o", color="tab:green", label="best size")
    if all(map(math.isfinite, position.ends)):
        axes.hlines(position.optimal_loss, *position.ends, color="tab:green", label="its 95 % interval")
    axes.plot(position.params, position.predicted_loss, "D", color="tab:red", label="this run")
    axes.set(xscale="log", xlabel="parameters", ylabel="predicted loss")
    axes.set_title(f"{position.law}: {position.flops:.2g} FLOPs on {position.clients:,} client(s)")
    axes.legend(frameon=False)
    return figure


def _band(loss: Callable[[float], float], best: float, least: float) -> tuple[float, float]:
    limit = least * (1 + TOLERANCE)

    def excess(size: float) -> float:
        return loss(size) - limit

    return _solve(excess, best / 1e6, best), _solve(excess, best, best * 1e6)


def _solve(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one positive number is zero; NaN if it is not in between."""
    try:
        return math.exp(float(brentq(lambda log: function(math.exp(log)), math.log(low), math.log(high), xtol=1e-5)))
    except ValueError:
        return math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(number: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f}" if number >= 1 else f"{number:.3g}"
