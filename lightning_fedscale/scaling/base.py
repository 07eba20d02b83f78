"""The base class of laws of size and data: allocations of compute, clients' shares of it, and intervals."""

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
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"Spread": "ConstantsCovariance"})


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


class ConstantsCovariance(NamedTuple):
    """How far published constants may be off.

    Attributes:
        constants: the values of the constants.
        covariance: covariance of these, on the scale on which a fit searches them.
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
        fitted_rho: cost of dividing the compute among clients, if it was fitted as well.
        counts: which parameters its sizes count: "all", with embedding tables; "head", without the tables of the
            input; "blocks", without both tables of the vocabulary; "active", as `ComputeAccounting` counts them.
        knows_clients: whether its formula contains the number of clients, so that ``rho`` has no effect.
        problems: why its runs do not determine a best size, in words; with any problem no best size is given.
        made_for: how the runs trained that it was fitted to, as far as that is recorded.
        error: root mean square of the log-loss residuals, on the held-out runs if there are any; 0 if it is not
            known.
        spread: uncertainty of the published constants, if it is known.
        no_optimum: why the law has no best size, if it has none.
        no_loss: why the law does not predict the loss of every run; empty if it does.
    """

    columns: ClassVar[tuple[str, ...]] = ("params", "tokens")
    spread: ClassVar[ConstantsCovariance | None] = None
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
        """Number of clients that the formula is for: the one that all its runs had in common, else 1."""
        is_one = self.fitted_on is not None and self.fitted_rho is None and not self.knows_clients
        low, high = self.domain.clients if is_one else (1, 1)
        return low if low == high else 1

    def tokens_factor(self, clients: int, rho: float) -> float:
        """Return the factor from a client's tokens, among ``clients``, to the tokens in the formula."""
        own = self.own_clients
        return effective_flops(clients, clients, rho) / effective_flops(own, own, rho)

    def loss(self, params: float, tokens: float) -> float:
        """Predict the loss of a model of ``params`` parameters after ``tokens`` training tokens.

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
        """Return the best model for this compute on a single client, from ``flops = 6 params tokens``.

        Raises:
            Unfitted: for a law without constants.
            ValueError: for numbers that are not positive, and for a law that has no best size or whose runs do not
                determine one.
        """
        self.check()
        if self.no_optimum:
            raise ValueError(f"{self.name} has no best size: {self.no_optimum}. Name another law.")
        if self.problems:
            raise ValueError(
                f"{self.name}: its runs do not determine a best size ({'; '.join(self.problems)}). Add sizes, data or"
                " compute to the runs and fit the law again, or name another law."
            )
        positive("flops", flops)
        params = self._best_params(flops)
        tokens = flops / (self.flops_per * params)
        self.warn_outside(params=params, flops=flops)
        return Allocation(params, tokens, self._loss(params, tokens), flops)

    def optimal_federated(
        self, flops: float | Sequence[float], clients: int | None = None, rho: float = 1.0, mean: str = "mean"
    ) -> Allocation:
        """Return the best model for this compute of all clients together.

        Federated compute is worth ``flops * clients**-rho`` on a single client: all of it for data parallelism
        (``rho=0``), the average client's for ``rho=1``, which is how arXiv 2511.12188 estimates the optimal size. The
        loss of `DiLoCo` replicas corresponds to ``rho=0.24`` at their 20 tokens per parameter, see `federated`.

        Args:
            flops: compute of all clients together, or a sequence with that of each client if they are unequal.
            clients: number of clients; not needed if ``flops`` is a sequence.
            rho: cost of dividing the compute among clients, usually in [0, 1].
            mean: which mean represents unequal clients, see `mean_flops`.

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
                raise ValueError(
                    f"clients={clients!r}: flops= has the compute of {len(flops)} clients. Leave clients out."
                )
            clients, total = len(flops), math.fsum(flops)
            average = average * clients
        else:
            clients, total = 1 if clients is None else clients, flops
            average = flops
        best = self.optimal(self._effective(average, clients, rho))
        return Allocation(best.params, total / (self.flops_per * best.params * clients), best.loss, total, clients)

    def loss_federated(self, params: float, tokens: float, clients: int = 1, rho: float = 1.0) -> float:
        """Predict the loss if each client trains on ``tokens`` tokens.

        This is the law's loss at one client's data for ``rho=1``, and at the data of all clients for ``rho=0``.
        """
        return self.loss(params, positive("tokens", tokens) * self.tokens_factor(clients, rho))

    def alternatives(self, rho: float) -> Iterator[tuple[Law, float]]:
        """Yield laws and ``rho`` as other samples of the runs would give them; nothing if these are not known.

        Args:
            rho: replaced by the value of each refit if it is the fitted one, else taken as exact.
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
        """Predict the loss if each client trains on ``tokens`` tokens, with its uncertainty as far as it is known.

        The uncertainty of the constants comes from the fit's refits or the published ``spread``. For a law that was
        fitted to runs, the error of its predictions (``error``) is added in quadrature. The uncertainty of an
        extrapolation is not included.

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
        """Return the best model size, with its uncertainty as far as it is known."""
        found = self.optimal_federated(flops, clients, rho).params
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = [
                _finite(law._best_params, law._effective(flops, clients, own)) for law, own in self.alternatives(rho)
            ]
        return Interval.of(found, draws)

    def warn_outside(self, *, params: float = math.nan, flops: float = math.nan, clients: float = math.nan) -> None:
        """Warn about each number that lies outside the range that the law was fitted on."""
        for said in self.outside(params=params, flops=flops, clients=clients):
            warnings.warn(
                f"{self.name}: {said}, the range that the law was fitted on, so this is an extrapolation.", stacklevel=3
            )

    def outside(self, **given: float) -> list[str]:
        """Return a sentence for each of ``params``, ``flops``, ``clients`` that lies outside the fitted range.

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
        """Compute `loss_federated` without checks; NaN where the law does not apply."""
        return self._loss(params, tokens * self.tokens_factor(clients, rho))

    def _effective(self, flops: float, clients: int, rho: float) -> float:
        """Return the compute that the formula expects, for ``flops`` of all clients together."""
        own = self.own_clients
        return effective_flops(flops, clients, rho) * effective_flops(1.0, own, 1.0 - rho)

    def _best_params(self, flops: float) -> float:
        return minimiser(
            lambda params: self._loss(params, flops / (self.flops_per * params)), 1.0, flops / self.flops_per
        )


def _finite(function: Callable[..., float], *arguments: float) -> float:
    """Call the function; return infinity if unlikely constants make it overflow or divide by zero."""
    try:
        return function(*arguments)
    except (OverflowError, ZeroDivisionError):
        return math.inf


def minimiser(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function of one positive number is smallest, searched on a logarithmic scale.

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
    """Return the compute of a single client that is worth ``flops`` of ``clients`` clients: ``flops * clients**-rho``.

    Example:
        >>> effective_flops(1e20, 10), effective_flops(1e20, 10, rho=0.0)
        (1e+19, 1e+20)
    """
    if isinstance(clients, bool) or not isinstance(clients, (int, float)) or clients != clients // 1 or clients < 1:
        raise ValueError(f"clients={clients!r}: pass a whole number, at least 1.")
    positive("flops", flops)
    if not isinstance(rho, (int, float)) or not math.isfinite(rho):
        raise ValueError(f"rho={rho!r}: pass a number (1 counts the average client's compute, 0 that of all clients).")
    return float(flops * clients**-rho)


def mean_flops(flops: Sequence[float], how: str = "mean") -> float:
    """Return the compute of one client that represents unequal clients.

    Args:
        flops: compute of each client.
        how: "mean", the arithmetic mean, is the one of arXiv 2511.12188. "uniform" and "by_compute" are exact for the
            square-root bound of `FederatedPACBayes`, with clients weighted equally, ``(mean C_k^-1/2)^-2``, or by their
            compute, ``(sum C_k)^2 / (sum C_k^1/2)^2`` (derived, see `FederatedPACBayes`).

    Example:
        >>> [round(mean_flops([1.0, 4.0], how), 3) for how in ("uniform", "mean", "by_compute")]
        [1.778, 2.5, 2.778]
    """
    if not len(flops):
        raise ValueError("flops=[]: pass the compute of at least one client.")
    numbers = [positive("flops", value) for value in flops]
    if how == "mean":
        return math.fsum(numbers) / len(numbers)
    if how == "uniform":
        return (math.fsum(value**-0.5 for value in numbers) / len(numbers)) ** -2
    if how == "by_compute":
        return (math.fsum(numbers) / math.fsum(map(math.sqrt, numbers))) ** 2
    raise ValueError(f"how={how!r}: choose 'mean', 'uniform' or 'by_compute'.")
