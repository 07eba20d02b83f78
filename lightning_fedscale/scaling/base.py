"""What laws of size and data have in common: allocations of compute, clients' shares of it, and intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from lightning_fedscale.scaling.form import Form, Interval, gathered, positive
from lightning_fedscale.scaling.made_for import MadeFor
from lightning_fedscale.scaling.rho import Rho


class Allocation(NamedTuple):
    """How a law would spend compute.

    Attributes:
        params: model size, in parameters.
        tokens: training tokens (or samples) of each client, on average.
        loss: predicted loss there; NaN for a law that predicts none.
        flops: training compute of all clients together.
        clients: number of clients.
    """

    params: float
    tokens: float
    loss: float
    flops: float
    clients: int = 1


class Spread(NamedTuple):
    """How far published constants may be off.

    Attributes:
        constants: the values that it belongs to.
        covariance: of these, on the scale on which a fit searches them.
    """

    constants: Mapping[str, float]
    covariance: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Law(Form):
    """A scaling law: loss by model size and data, and the sizes that are best for a given compute.

    A law without a closed form for its optimum finds it by a line search.

    Attributes:
        flops_per: FLOPs that one token costs per parameter in training, forward and backward; 6 for transformers and
            multilayer perceptrons, more where weights are used several times.
        fitted_rho: what division among clients costs, if that was fitted along.
        counts: which parameters its sizes count: "all", with embedding tables; "head", without the tables of the
            input; "blocks", without both tables of the vocabulary; "active", as `ComputeAccounting` counts them.
        knows_clients: whether the number of clients is in its formula, so that ``rho`` plays no part.
        problems: why the runs that it was fitted to determine no best size, in words; then none is given.
        made_for: how the runs trained that it was fitted to, as far as they say.
        error: root mean square of the log-loss residuals of what it predicts: of runs that were held out, if
            any were; 0 where it is not known.
        spread: how far the published constants may be off, if that is known.
        no_optimum: why the law prefers no size, if it does not.
        no_loss: why the law does not predict the loss of every run, if so.
    """

    columns: ClassVar[tuple[str, ...]] = ("params", "tokens")
    spread: ClassVar[Spread | None] = None
    no_optimum: ClassVar[str] = ""
    no_loss: ClassVar[str] = ""
    counts: ClassVar[str] = "active"
    knows_clients: ClassVar[bool] = False
    flops_per: float = field(default=6.0, kw_only=True)
    fitted_rho: Rho | None = field(default=None, kw_only=True, repr=False, compare=False)
    problems: tuple[str, ...] = field(default=(), kw_only=True, repr=False, compare=False)
    made_for: MadeFor = field(default=MadeFor(), kw_only=True, repr=False, compare=False)
    error: float = field(default=0.0, kw_only=True, repr=False, compare=False)

    @property
    def own_clients(self) -> int:
        """The number of clients whose tokens the formula means: that of all its runs, if these had one, else 1."""
        is_one = self.fitted_on is not None and self.fitted_rho is None and not self.knows_clients
        low, high = self.domain.clients if is_one else (1, 1)
        return low if low == high else 1

    def tokens_factor(self, clients: int, rho: float) -> float:
        """How many times its own tokens those of each of so many clients are worth, where the formula means them."""
        own = self.own_clients
        return effective_flops(clients, clients, rho) / effective_flops(own, own, rho)

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
        """The best model for so much compute on a single client, from ``flops = 6 params tokens``.

        Raises:
            Unfitted: for a law without constants.
            ValueError: for numbers that are not positive, a law that prefers no size, or one whose runs determine none.
        """
        self.check()
        if self.no_optimum:
            raise ValueError(f"{self.name}: {self.no_optimum}: choose another law for a best size.")
        if self.problems:
            raise ValueError(
                f"{self.name}: no verdict: its runs do not determine a best size: {'; '.join(self.problems)}: add"
                " sizes, data or compute to them and fit anew, or name another law."
            )
        positive("flops", flops)
        params = self._best_params(flops)
        tokens = flops / (self.flops_per * params)
        self.warn_outside(params=params, flops=flops)
        return Allocation(params, tokens, self._loss(params, tokens), flops)

    def optimal_federated(
        self, flops: float | Sequence[float], clients: int | None = None, rho: float = 1.0, mean: str = "mean"
    ) -> Allocation:
        """The best model for so much compute of all clients together.

        Federated compute counts as ``flops * clients**-rho`` of a single client's: all of it for data parallelism
        (``rho=0``), the average client's for ``rho=1``, as arXiv 2511.12188 says that the optimal size is to be
        estimated. What `DiLoCo` replicas lose reads as 0.24 along its own 20 tokens per parameter, see `federated`.

        Args:
            flops: of all clients together, or of each of them if they are unequal.
            clients: number of clients; not needed with the compute of each.
            rho: how much of the compute division among clients costs, in [0, 1] as a rule.
            mean: which mean stands for unequal clients, see `mean_flops`.

        Example:
            >>> from lightning_fedscale.scaling import Chinchilla
            >>> [f"{Chinchilla().optimal_federated(1e20, clients).params:.3e}" for clients in (1, 10, 100)]
            ['8.535e+08', '2.622e+08', '8.053e+07']
            >>> f"{Chinchilla().optimal_federated([1e18, 4e18, 25e18]).params:.3e}"  # as three of 1e19
            '2.622e+08'
        """
        if isinstance(flops, Sequence) and not isinstance(flops, str):
            average = mean_flops(flops, mean)
            if clients not in (None, len(flops)):
                raise ValueError(f"clients={clients!r}: there is compute of {len(flops)}: leave clients out.")
            clients, total = len(flops), math.fsum(flops)
            average = average * clients
        else:
            clients, total = 1 if clients is None else clients, flops
            average = flops
        best = self.optimal(self._effective(average, clients, rho))
        return Allocation(best.params, total / (self.flops_per * best.params * clients), best.loss, total, clients)

    def loss_federated(self, params: float, tokens: float, clients: int = 1, rho: float = 1.0) -> float:
        """Loss if each client trains on so many tokens.

        With ``rho=1`` that of the law at one client's data, with ``rho=0`` at all clients' together.
        """
        return self.loss(params, positive("tokens", tokens) * self.tokens_factor(clients, rho))

    def alternatives(self, rho: float) -> Iterator[tuple[Law, float]]:
        """The law as other samples of its runs would have it, with ``rho``; nothing if that is not known.

        Args:
            rho: its other values are those of the refits if this is the fitted one, else it is taken as known.
        """
        if self.refits:
            for refit in self.refits:
                law = self.replace(**gathered(refit.constants), refits=())
                yield law, refit.rho if self.fitted_rho is not None and rho == self.fitted_rho.value else rho
        elif self.spread is not None and all(self.constants[k] == v for k, v in self.spread.constants.items()):
            unknowns = [self.unknowns[name] for name in self.spread.constants]
            centre = [each.theta(value) for each, value in zip(unknowns, self.spread.constants.values(), strict=True)]
            for draw in np.random.default_rng(0).multivariate_normal(centre, self.spread.covariance, 200):
                found = [float(each.value(theta)) for each, theta in zip(unknowns, draw, strict=True)]
                yield self.replace(**dict(zip(self.spread.constants, found, strict=True))), rho

    def interval_of_loss(self, params: float, tokens: float, clients: int = 1, rho: float = 1.0) -> Interval:
        """Predicted loss if each client trains on so many tokens, with what is known of its uncertainty.

        That of the constants by a fit's refits, and for a law that was fitted to runs also how far its predictions of
        these were off (``error``), both in quadrature; not that of an extrapolation.

        Example:
            >>> from lightning_fedscale.scaling import Chinchilla
            >>> print(Chinchilla().interval_of_loss(8.535e8, 1.953e10))
            2.553 (2.532 to 2.564)
        """
        found = self.loss_federated(params, tokens, clients, rho)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = [_finite(law.loss_federated, params, tokens, clients, own) for law, own in self.alternatives(rho)]
        return Interval.of(found, draws).widened(self.error)

    def interval_of_size(self, flops: float, clients: int = 1, rho: float = 1.0) -> Interval:
        """The best model size, with what is known of its uncertainty."""
        found = self.optimal_federated(flops, clients, rho).params
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = [
                _finite(law._best_params, law._effective(flops, clients, own)) for law, own in self.alternatives(rho)
            ]
        return Interval.of(found, draws)

    def warn_outside(self, *, params: float = math.nan, flops: float = math.nan, clients: float = math.nan) -> None:
        """Warn if one of these lies outside of what the law was fitted on."""
        for said in self.outside(params=params, flops=flops, clients=clients):
            warnings.warn(f"{self.name}: {said}, where the law was fitted: this is an extrapolation.", stacklevel=3)

    def outside(self, **given: float) -> list[str]:
        """Which of these, ``params``, ``flops`` and ``clients``, lie outside of what the law was fitted on.

        Example:
            >>> from lightning_fedscale.scaling import Chinchilla
            >>> Chinchilla().outside(params=97.0, flops=1e20)
            ['params=97 lies outside of 4e+07 to 2e+10']
        """
        ends = {what: getattr(self.domain, what) for what in given}
        return [
            f"{what}={value:.3g} lies outside of {ends[what][0]:.3g} to {ends[what][1]:.3g}"
            for what, value in given.items()
            if value < ends[what][0] or value > ends[what][1]
        ]

    def _loss(self, params: float, tokens: float) -> float:
        return float(self.predict(params=params, tokens=tokens))

    def _loss_federated(self, params: float, tokens: float, clients: int, rho: float) -> float:
        """As `loss_federated`, unchecked; NaN where the law says nothing."""
        return self._loss(params, tokens * self.tokens_factor(clients, rho))

    def _effective(self, flops: float, clients: int, rho: float) -> float:
        """The compute of a client that the formula means."""
        own = self.own_clients
        return effective_flops(flops, clients, rho) * effective_flops(1.0, own, 1.0 - rho)

    def _best_params(self, flops: float) -> float:
        return minimiser(
            lambda params: self._loss(params, flops / (self.flops_per * params)), 1.0, flops / self.flops_per
        )


def _finite(function: Callable[..., float], *arguments: float) -> float:
    """What a law of unlikely constants says; infinite where that is beyond all numbers."""
    try:
        return function(*arguments)
    except (OverflowError, ZeroDivisionError):
        return math.inf


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
    if isinstance(clients, bool) or not isinstance(clients, (int, float)) or clients != clients // 1 or clients < 1:
        raise ValueError(f"clients={clients!r}: pass a whole number, at least 1.")
    positive("flops", flops)
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
