"""DP-FedAvg: every client's influence is bounded by clipping and hidden by noise."""

from __future__ import annotations

import math
from typing import Literal

from lightning_fedscale.privacy.accounting import Accountant
from lightning_fedscale.privacy.base import AdaptiveClipping, Privacy
from lightning_fedscale.utils import checks


def dp_fed_avg(
    clip_norm: float,
    noise_multiplier: float | None = None,
    *,
    delta: float,
    target_epsilon: float | None = None,
    rounds: int | None = None,
    adaptive: AdaptiveClipping | None = None,
    weight_cap: float | None = None,
    noise: Literal["server", "client"] = "server",
    accountant: Accountant = "pld",
    max_epsilon: float | None = None,
) -> Privacy:
    r"""Train with differential privacy of whole clients (McMahan et al., arXiv 1710.06963).

    .. math:: \Delta = \frac{\sum_k w_k \Delta_k \min(1, S / \lVert \Delta_k \rVert) + \mathcal N(0, (z S)^2 I)}{q W}

    The sum is over the round's clients. Each takes part with probability :math:`q`, independently of the others
    (Poisson sampling). :math:`W` is the sum of the weights :math:`w_k \le 1` of all clients.

    The guarantee is (epsilon, ``delta``) for adding or removing a client: whoever sees all global models learns little
    about whether any single client took part. It assumes Poisson sampling; for cohorts of fixed size epsilon is an
    approximation. Either the server is trusted, or clients add the noise under secure aggregation. Privacy of single
    samples, as in Opacus, is out of scope. This is a simulation of the cost of privacy in accuracy: to release a model,
    draw the noise from a cryptographic generator in exact arithmetic.

    Args:
        clip_norm: largest norm of a client's delta; longer ones are scaled down to it.
        noise_multiplier: standard deviation of the noise on the sum of deltas, over ``clip_norm``; or give
            ``target_epsilon`` and ``rounds``.
        delta: probability with which the guarantee may fail; should be well below 1 / number of clients.
        target_epsilon: epsilon after ``rounds`` rounds, instead of ``noise_multiplier``.
        rounds: number of rounds for ``target_epsilon``.
        adaptive: makes the clip norm follow a quantile of the clients' norms, starting at ``clip_norm``.
        weight_cap: a client's weight is its number of samples over this, at most 1; None gives all clients weight 1.
        noise: ``"server"`` adds it once; with ``"client"`` every client adds its share, with the same distribution.
        accountant: ``"pld"`` is tight; ``"rdp"`` is faster and a little higher.
        max_epsilon: training ends before a round would exceed it.

    Raises:
        TypeError: if ``adaptive`` is not an `AdaptiveClipping`, or an argument is not a number.
        ValueError: if a value or combination is invalid; names the argument, the value and the remedy.

    Example:
        >>> import numpy as np, torch
        >>> from lightning_fedscale.types import Cohort
        >>> private = dp_fed_avg(clip_norm=1.0, noise_multiplier=0.0, delta=1e-5)
        >>> delta, state = torch.tensor([3.0, 4.0], dtype=torch.float64), private.init()
        >>> private.clip(delta, state), delta.tolist()
        (False, [0.6000000000000001, 0.8])
        >>> cohort = Cohort(0, np.arange(1), num_clients=10, trainable=2, seed=0)
        >>> mean, state = private.finish(delta, 0.0, state, cohort, expected=2.0, generator=np.random.default_rng(0))
        >>> mean.tolist(), state["rounds"]
        ([0.30000000000000004, 0.4], 1)
    """
    checks.positive("clip_norm", clip_norm)
    remedy = "pass a probability in (0, 1), well below 1 / number of clients."
    checks.number("delta", delta, remedy, lambda probability: 0 < probability < 1)
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ValueError(
            f"noise_multiplier={noise_multiplier} and target_epsilon={target_epsilon}: pass exactly one of them."
        )
    if noise_multiplier is not None:
        remedy = "pass a number of at least 0."
        checks.number("noise_multiplier", noise_multiplier, remedy, lambda number: 0 <= number < math.inf)
    if (target_epsilon is None) != (rounds is None):
        raise ValueError(f"target_epsilon={target_epsilon} and rounds={rounds}: pass both, or neither.")
    for name, value in (
        ("target_epsilon", target_epsilon),
        ("rounds", rounds),
        ("weight_cap", weight_cap),
        ("max_epsilon", max_epsilon),
    ):
        if value is not None:
            checks.positive(name, value)
    _check_adaptive(adaptive, weight_cap)
    checks.one_of("noise", noise, ("server", "client"))
    checks.one_of("accountant", accountant, ("pld", "rdp"))
    return Privacy(
        clip_norm,
        delta,
        noise_multiplier,
        target_epsilon,
        rounds,
        adaptive,
        weight_cap,
        noise,
        accountant,
        max_epsilon,
    )


def _check_adaptive(adaptive: AdaptiveClipping | None, weight_cap: float | None) -> None:
    if adaptive is None:
        return
    if not isinstance(adaptive, AdaptiveClipping):
        raise TypeError(f"adaptive={adaptive!r}: pass privacy.AdaptiveClipping(), or None.")
    remedy = "pass a share of the clients in [0, 1]."
    checks.number("adaptive: quantile", adaptive.quantile, remedy, lambda share: 0 <= share <= 1)
    checks.positive("adaptive: rate", adaptive.rate)
    if adaptive.count_noise is not None:
        checks.positive("adaptive: count_noise", adaptive.count_noise)
    if weight_cap is not None:
        raise ValueError(
            f"weight_cap={weight_cap} with adaptive={adaptive!r}: adaptive clipping weighs all clients equally: pass"
            " only one of them."
        )
