"""Simulated secure aggregation: the server learns the sum of the clients' updates and no single update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.aggregators import Aggregator, mean
from lightning_fedscale.aggregators.rows import needing
from lightning_fedscale.privacy import shamir
from lightning_fedscale.types import ClientUpdate, Cohort, FloatArray, IntArray
from lightning_fedscale.utils import checks, randomness
from lightning_fedscale.utils.factory_repr import record_call

FIELD = (1 << 31) - 1
"""Masked values are numbers below this prime, so that float64 sums those of 2^22 clients without rounding."""

_BASE = 3  # base of the key agreement


@record_call
def secure_mean(clip: float, bits: int = 16, threshold: float = 2 / 3) -> Aggregator:
    """Compute the uniform mean under masks that cancel in the sum (Bonawitz et al., CCS 2017, as a simulation).

    Every client rounds its update to ``bits`` bits an element and hides it by adding random numbers of a finite field:
    one pairwise mask for every other client of the round, which that client subtracts, and one private mask. The seeds
    are shared by Shamir's scheme. If a client's update is missing (not finite), its pairwise masks remain in the sum;
    the others' shares reveal its key, which gives these masks. **The result is the exact mean of the rounded updates.**

    All parts of the protocol run (key agreement, masks, shares, recovery), but in one process, with keys derived from
    the strategy's seed and small groups: this simulates the effect on training, and it protects nothing. Averaged
    buffers are rounded like parameters, within the same ``clip``; others keep the server's values. Time grows with the
    square of the cohort.

    Args:
        clip: largest absolute value of an element of an update; larger ones are clipped to it.
        bits: bits per element. ``clients * 2**bits`` must stay below 2^31: up to 32768 clients with 16 bits.
        threshold: share of the round's clients that must send an update, so that the masks can be recovered.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is invalid; a cohort with too many clients for ``bits`` is found at the beginning of a
            round, a round with too few updates at its end.

    Example:
        >>> from lightning_fedscale.aggregators import aggregate
        >>> rows = torch.tensor([[0.5, 1.0], [0.25, -1.0], [0.75, 1.0]])
        >>> aggregate(secure_mean(clip=1.0), rows).round(decimals=4).tolist()
        [0.5, 0.3333]
    """
    remedy = "pass the largest absolute value of an element, above 0."
    checks.number("clip", clip, remedy, lambda value: 0 < value < math.inf)
    checks.integer("bits", bits, 1, 30)
    remedy = "pass a share of the round's clients in (0, 1]."
    checks.number("threshold", threshold, remedy, lambda share: 0 < share <= 1)
    given: dict[str, Any] = {"clip": clip, "bits": bits, "threshold": threshold}
    return needing(
        Aggregator(
            mean("uniform").weigh,
            partial(_init, bits=bits),
            partial(_accumulate, **given),
            partial(_finish, **given),
            hides_clients=True,
        ),
        2,
        f"secure_mean(clip={clip:g})",
    )


def _init(like: Tensor, cohort: Cohort, *, bits: int) -> Tensor:
    if len(cohort.clients) * ((1 << bits) - 1) >= FIELD:
        raise ValueError(
            f"secure_mean: bits={bits}: the sum of {len(cohort.clients)} clients does not fit into 31 bits: pass at"
            f" most {int(math.log2(FIELD / len(cohort.clients)))}, or sample fewer clients per round."
        )
    # The last elements mark the clients that sent an update.
    return torch.zeros(like.numel() + len(cohort.clients), dtype=like.dtype, device=like.device)


def _accumulate(
    total: Tensor, update: ClientUpdate, weight: float, cohort: Cohort, *, clip: float, bits: int, threshold: float
) -> Tensor:
    place, length = cohort.place(update.client), total.numel() - len(cohort.clients)
    sent = masked(quantized(update.delta, clip, bits), place, cohort, _needed(cohort, threshold))
    total[:length] += torch.from_numpy(sent).to(total)
    total[length + place] = 1.0
    return total


def _finish(total: Tensor, cohort: Cohort, *, clip: float, bits: int, threshold: float) -> Tensor:
    length = total.numel() - len(cohort.clients)
    present: list[int] = total[length:].nonzero().flatten().tolist()
    summed = total[:length].cpu().numpy().astype(np.int64) % FIELD
    plain = unmasked(summed, present, cohort, _needed(cohort, threshold))
    return torch.from_numpy(dequantized(plain, len(present), clip, bits)).to(total).div_(len(present))


def quantized(delta: Tensor, clip: float, bits: int) -> IntArray:
    """Quantize values from -clip to clip as integers from 0 to ``2**bits - 1``."""
    steps = (1 << bits) - 1
    return delta.clamp(-clip, clip).add(clip).mul(steps / (2 * clip)).round().long().cpu().numpy()


def dequantized(total: IntArray, clients: int, clip: float, bits: int) -> FloatArray:
    """Return the sum of values that a sum of this many clients' integers represents."""
    steps = (1 << bits) - 1
    values: FloatArray = (2.0 * total.astype(np.float64) - clients * steps) * (clip / steps)
    return values


def masked(values: IntArray, place: int, cohort: Cohort, needed: int) -> IntArray:
    """Return the masked values that a client of the cohort sends.

    Args:
        values: the client's values, below `FIELD`.
        place: position of the client in the cohort.
        cohort: the round's clients.
        needed: number of shares that reveal a secret.
    """
    key, own = (coefficients[0] for coefficients in _secrets(cohort, place, needed))
    sent = values + _mask(own, len(values))
    for other in range(len(cohort.clients)):
        if other != place:
            sent += _sign(place, other) * _mask(_agreed(key, _public(cohort, other, needed)), len(values))
    return sent % FIELD


def unmasked(total: IntArray, present: Sequence[int], cohort: Cohort, needed: int) -> IntArray:
    """Remove the masks from the sum of masked values.

    Args:
        total: the sum, modulo `FIELD`.
        present: positions in the cohort of the clients that sent an update.
        cohort: the round's clients.
        needed: number of shares that reveal a secret.

    Raises:
        RuntimeError: if fewer clients than ``needed`` sent an update.
    """
    if len(present) < needed:
        raise RuntimeError(
            f"secure_mean: {len(present)} of {len(cohort.clients)} clients sent a finite update in round"
            f" {cohort.round}, and removing their masks takes {needed}: pass a lower threshold, or find out why updates"
            " are not finite."
        )
    total = total.copy()
    for place in present:
        total -= _mask(_recovered(cohort, place, needed, present, which=1), len(total))
    for place in set(range(len(cohort.clients))) - set(present):
        key = _recovered(cohort, place, needed, present, which=0)
        for other in present:
            total -= _sign(other, place) * _mask(_agreed(key, _public(cohort, other, needed)), len(total))
    return total % FIELD


def _needed(cohort: Cohort, threshold: float) -> int:
    return max(1, math.ceil(threshold * len(cohort.clients) - 1e-9))


@lru_cache(maxsize=4096)
def _polynomials(seed: int, round: int, client: int, needed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    draws = randomness.generator(seed, randomness.MASK, round, client)

    def number() -> int:
        high, low = (int(value) for value in draws.integers(0, 1 << 63, 2))
        return (high << 63 | low) % shamir.PRIME

    first, second = (tuple(number() for _ in range(needed)) for _ in range(2))
    return first, second


def _secrets(cohort: Cohort, place: int, needed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the client's polynomials, whose constant terms are its private key and the seed of its private mask."""
    return _polynomials(cohort.seed, cohort.round, int(cohort.clients[place]), needed)


def _recovered(cohort: Cohort, place: int, needed: int, by: Iterable[int], which: int) -> int:
    """Recover a client's secret from the shares that the clients in ``by`` hold."""
    coefficients = _secrets(cohort, place, needed)[which]
    holders = list(by)[:needed]
    return shamir.secret({holder: shamir.share(coefficients, holder) for holder in holders})


def _public(cohort: Cohort, place: int, needed: int) -> int:
    return pow(_BASE, _secrets(cohort, place, needed)[0][0], shamir.PRIME)


def _agreed(private: int, public: int) -> int:
    """Return the Diffie-Hellman secret of two clients, which is the same from either side."""
    return pow(public, private, shamir.PRIME)


def _sign(place: int, other: int) -> int:
    return 1 if place < other else -1


def _mask(seed: int, length: int) -> IntArray:
    return np.random.default_rng(seed).integers(0, FIELD, length)
