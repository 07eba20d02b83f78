"""What all scaling laws have in common: allocations of compute, clients' shares of it, and where a law holds."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, TypeVar

from scipy.optimize import minimize_scalar


class Allocation(NamedTuple):
    """How a law would spend compute.

    Attributes:
        params: model size, in parameters.
        tokens: training tokens (or samples) of each client.
        loss: predicted loss there; NaN for a law that predicts none.
        flops: training compute of all clients together.
        clients: number of clients.
    """

    params: float
    tokens: float
    loss: float
    flops: float
    clients: int = 1


class Range(NamedTuple):
    """Where a law was fitted.

    Attributes:
        task: kind of data and model, such as "text".
        params: smallest and largest model.
        flops: smallest and largest compute.
        clients: fewest and most clients.
    """

    task: str
    params: tuple[float, float] = (0.0, math.inf)
    flops: tuple[float, float] = (0.0, math.inf)
    clients: tuple[int, int] = (1, 1)


class Unfitted(ValueError):
    """A law was asked for a prediction whose constants nobody has published."""


_Self = TypeVar("_Self", bound="Law")


@dataclass(frozen=True)
class Law:
    """A scaling law: loss by model size and data, and the sizes that are best for a given compute.

    A law without a closed form for its optimum finds it by a line search. Fields are its constants; laws whose
    constants are not published take them as arguments, from a fit, and refuse to predict without.

    Attributes:
        source: where form and constants are from.
        holds: where it was fitted; outside of it, predictions come with a warning.
        flops_per: FLOPs that one token costs per parameter in training, forward and backward; 6 for transformers and
            multilayer perceptrons, more where weights are used several times.
    """

    source: ClassVar[str] = ""
    holds: ClassVar[Range] = Range("any")
    flops_per: float = field(default=6.0, kw_only=True)

    @property
    def name(self) -> str:
        """The law's name."""
        return type(self).__name__

    @property
    def constants(self) -> dict[str, Any]:
        """The law's constants by name."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if not each.kw_only}

    def check(self) -> None:
        """Raise `Unfitted` if a constant is unknown."""
        unknown = [name for name, value in self.constants.items() if value is None]
        if unknown:
            raise Unfitted(
                f"{self.name}: its constants are not published ({', '.join(unknown)} unknown): fit them to runs of your"
                f" own, or pass them, {self.name}({', '.join(f'{name}=...' for name in unknown)})."
            )

    def loss(self, params: float, tokens: float) -> float:
        """Loss of a model of ``params`` parameters after ``tokens`` training tokens.

        Raises:
            Unfitted: for a law without constants.
            ValueError: for numbers that are not positive.
        """
        self.check()
        positive("params", params)
        positive("tokens", tokens)
        self.warn_outside(params=params)
        return self._loss(params, tokens)

    def optimal(self, flops: float) -> Allocation:
        """The best model for so much compute on a single client, from ``flops = 6 params tokens``."""
        self.check()
        positive("flops", flops)
        params = self._best_params(flops)
        tokens = flops / (self.flops_per * params)
        self.warn_outside(params=params, flops=flops)
        return Allocation(params, tokens, self._loss(params, tokens), flops)

    def optimal_federated(self, flops: float, clients: int, rho: float = 1.0) -> Allocation:
        """The best model for so much compute of all clients together.

        Federated compute counts as ``flops * clients**-rho`` of a single client's: all of it for data parallelism
        (``rho=0``), the average client's for ``rho=1``, as arXiv 2511.12188 says that the optimal size is to be
        estimated; what `DiLoCo` replicas lose in loss amounts to about 0.24.

        Args:
            flops: of all clients together.
            clients: number of clients.
            rho: how much of the compute division among clients costs, in [0, 1] as a rule.

        Example:
            >>> from lightning_fedscale.scaling import Chinchilla
            >>> [f"{Chinchilla().optimal_federated(1e20, clients).params:.3e}" for clients in (1, 10, 100)]
            ['8.535e+08', '2.622e+08', '8.053e+07']
        """
        effective = effective_flops(flops, clients, rho)
        best = self.optimal(effective)
        tokens = flops / (self.flops_per * best.params * clients)
        return Allocation(best.params, tokens, best.loss, flops, clients)

    def warn_outside(self, *, params: float = math.nan, flops: float = math.nan, clients: float = math.nan) -> None:
        """Warn if one of these lies outside of what the law was fitted on."""
        for what, value in (("params", params), ("flops", flops), ("clients", clients)):
            low, high = getattr(self.holds, what)
            if value < low or value > high:
                warnings.warn(
                    f"{self.name}: {what}={value:.3g} lies outside of {low:.3g} to {high:.3g}, where the law was"
                    " fitted: this is an extrapolation.",
                    stacklevel=3,
                )

    def replace(self: _Self, **constants: Any) -> _Self:
        """The law with other constants."""
        return dataclasses.replace(self, **constants)

    def _loss(self, params: float, tokens: float) -> float:
        raise NotImplementedError

    def _best_params(self, flops: float) -> float:
        return minimiser(
            lambda params: self._loss(params, flops / (self.flops_per * params)), 1.0, flops / self.flops_per
        )


def minimiser(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one positive number is smallest, searched on a logarithmic scale.

    Example:
        >>> round(minimiser(lambda x: x + 4 / x, 1e-3, 1e3), 6)
        2.0
    """
    result = minimize_scalar(
        lambda log: function(math.exp(log)),
        bounds=(math.log(low), math.log(high)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return math.exp(float(result.x))


def effective_flops(flops: float, clients: int, rho: float = 1.0) -> float:
    """The single client's compute that is worth as much as ``flops`` of so many clients: ``flops * clients**-rho``.

    Example:
        >>> effective_flops(1e20, 10), effective_flops(1e20, 10, rho=0.0)
        (1e+19, 1e+20)
    """
    positive("flops", flops)
    if isinstance(clients, bool) or clients != int(clients) or clients < 1:
        raise ValueError(f"clients={clients!r}: pass a whole number, at least 1.")
    if not isinstance(rho, (int, float)) or not math.isfinite(rho):
        raise ValueError(f"rho={rho!r}: pass a number, 1 for the average client, 0 for data parallelism.")
    return float(flops * clients**-rho)


def mean_flops(flops: Sequence[float], how: str = "mean") -> float:
    """One client's compute that stands for unequal ones.

    Args:
        flops: of each client.
        how: "mean", the arithmetic mean, is what arXiv 2511.12188 names. "uniform" and "by_compute" are exact for the
            square-root bound of `FederatedPACBayes`, with clients weighted alike, ``(mean C_k^-1/2)^-2``, or by their
            compute, ``(sum C_k)^2 / (sum C_k^1/2)^2`` (derived, see there).

    Example:
        >>> [round(mean_flops([1.0, 4.0], how), 3) for how in ("uniform", "mean", "by_compute")]
        [1.778, 2.5, 2.778]
    """
    if not len(flops):
        raise ValueError("flops=[]: pass the compute of one client or more.")
    numbers = [positive("flops", value) for value in flops]
    if how == "mean":
        return math.fsum(numbers) / len(numbers)
    if how == "uniform":
        return (math.fsum(value**-0.5 for value in numbers) / len(numbers)) ** -2
    if how == "by_compute":
        return (math.fsum(numbers) / math.fsum(map(math.sqrt, numbers))) ** 2
    raise ValueError(f"how={how!r}: choose 'mean', 'uniform' or 'by_compute'.")


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
