"""Samplers with unavailable clients: by a trace, by the time of day, or because they drop out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_fedscale.samplers.base import Sampler, check_sampler, wrapping
from lightning_fedscale.types import IntArray
from lightning_fedscale.utils import checks, randomness


def available(sampler: Sampler, trace: npt.ArrayLike | str | Path) -> Sampler:
    """Draw among the clients that are available in the round by a trace; the trace repeats after its last round.

    If fewer are available than requested, all of them take part; if none is, the cohort is empty.

    Args:
        sampler: the sampler that draws among them.
        trace: booleans, or 0 and 1, (rounds, clients); or a file of them: CSV without a header, one round a line, or
            JSON, a list of lists.

    Raises:
        TypeError: if ``sampler`` is not a sampler, or is a custom one without the argument ``among``.
        ValueError: if the trace is invalid; when called, if it has another number of clients.

    Example:
        >>> from lightning_fedscale.samplers import uniform
        >>> sampler = available(uniform, [[1, 1, 0, 0], [0, 0, 0, 1]])
        >>> [sampler(seed=0, round=r, num_clients=4, clients_per_round=2).tolist() for r in range(3)]
        [[0, 1], [3], [0, 1]]
    """
    check_sampler(sampler, takes_among=True)
    return wrapping(sampler, partial(_available, sampler=sampler, trace=_read(trace)))


def daily_cycle(sampler: Sampler, period: int, share: float = 0.5) -> Sampler:
    """Draw among the clients for which it is night: each is available for a share of every ``period`` rounds.

    Each client has its own time zone, drawn once from the seed, so that about ``share`` of the clients are available in
    every round, but not always the same ones.

    Args:
        sampler: the sampler that draws among them.
        period: rounds in a day, at least 2.
        share: fraction of the day for which a client is available, in (0, 1].

    Raises:
        TypeError: if ``sampler`` is not a sampler, or is a custom one without the argument ``among``.
        ValueError: if another argument is out of range.

    Example:
        >>> from lightning_fedscale.samplers import uniform
        >>> sampler = daily_cycle(uniform, period=24, share=0.25)
        >>> day = [sampler(seed=0, round=r, num_clients=100, clients_per_round=100) for r in range(24)]
        >>> set(np.bincount(np.concatenate(day)).tolist())  # each for a quarter of the day
        {6}
    """
    check_sampler(sampler, takes_among=True)
    period = checks.integer("period", period, minimum=2)
    share = checks.in_interval("share", share, 0.0, 1.0)
    return wrapping(
        sampler, partial(_daily_cycle, sampler=sampler, period=period, share=checks.positive("share", share))
    )


def drop_out(sampler: Sampler, probability: float) -> Sampler:
    """Drop each drawn client with a given probability, as if its connection broke.

    Args:
        sampler: the sampler that draws the clients.
        probability: probability for each client in each round, in [0, 1).

    Raises:
        TypeError: if ``sampler`` is not a sampler.
        ValueError: if ``probability`` is out of range.

    Example:
        >>> from lightning_fedscale.samplers import uniform
        >>> left = drop_out(uniform, 0.5)(seed=0, round=0, num_clients=1000, clients_per_round=1000)
        >>> 400 < len(left) < 600
        True
    """
    check_sampler(sampler)
    probability = checks.in_interval("probability", probability, 0.0, 1.0, closed_end=False)
    return wrapping(sampler, partial(_drop_out, sampler=sampler, probability=probability))


def _available(
    *,
    sampler: Any,
    trace: npt.NDArray[np.bool_],
    seed: int,
    round: int,
    num_clients: int,
    clients_per_round: int,
    among: IntArray | None = None,
    **losses: Any,
) -> IntArray:
    if trace.shape[1] != num_clients:
        raise ValueError(f"trace has {trace.shape[1]} columns for {num_clients} clients: pass one column per client.")
    return _among(sampler, trace[round % len(trace)], among, seed, round, clients_per_round, losses)


def _daily_cycle(
    *,
    sampler: Any,
    period: int,
    share: float,
    seed: int,
    round: int,
    num_clients: int,
    clients_per_round: int,
    among: IntArray | None = None,
    **losses: Any,
) -> IntArray:
    zones = randomness.generator(seed, randomness.DAYTIME).random(num_clients) * period
    awake = (round + zones) % period < share * period
    return _among(sampler, awake, among, seed, round, clients_per_round, losses)


def _among(
    sampler: Any,
    there: npt.NDArray[np.bool_],
    among: IntArray | None,
    seed: int,
    round: int,
    clients_per_round: int,
    losses: dict[str, Any],
) -> IntArray:
    clients = np.flatnonzero(there) if among is None else among[there[among]]
    drawn: IntArray = sampler(
        seed=seed,
        round=round,
        num_clients=len(there),
        clients_per_round=clients_per_round,
        among=clients.astype(np.int64),
        **losses,
    )
    return drawn


def _drop_out(*, sampler: Any, probability: float, seed: int, round: int, **others: Any) -> IntArray:
    drawn: IntArray = sampler(seed=seed, round=round, **others)
    return drawn[randomness.generator(seed, randomness.DROP_OUT, round).random(len(drawn)) >= probability]


def _read(trace: npt.ArrayLike | str | Path) -> npt.NDArray[np.bool_]:
    shown = f"trace={str(trace)!r}" if isinstance(trace, str | Path) else "trace"
    remedy = "pass 0 and 1, or False and True, one row per round and one column per client."
    try:
        if isinstance(trace, str | Path):
            path = Path(trace)
            if path.suffix == ".json":
                trace = json.loads(path.read_text(encoding="utf-8"))
            else:
                trace = np.loadtxt(path, delimiter=",", ndmin=2)
        values = np.asarray(trace)
    except (ValueError, OSError) as error:
        raise ValueError(f"{shown} cannot be read ({error}): {remedy}") from error
    if values.ndim != 2 or not values.size or not np.isin(values, (0, 1)).all():
        raise ValueError(f"{shown} has shape {values.shape}, or values other than 0 and 1: {remedy}")
    return values.astype(np.bool_)
