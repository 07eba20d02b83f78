"""Clients on heterogeneous hardware: their devices, and which of them finish in time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from lightning_fedscale.devices.classes import DeviceClass, device_class
from lightning_fedscale.types import FloatArray, IntArray
from lightning_fedscale.utils import checks, randomness

RULES = "largest", "fastest", "proportional", "loader"

BatchRule = Literal["largest", "fastest", "proportional", "loader"]


class Population:
    """The hardware of a federation's clients, simulated.

    Each client gets a device class by a seed, trains with a batch that fits it, and takes as long as its device would.
    Time is simulated, so there is no waiting: clients that are unavailable, miss the deadline or come too late are
    known before the round and do not train.

    Args:
        shares: share of the clients with each class, by the class's name or the class itself; they need not add up to
            one.
        batch_size: batch size of clients: "largest" that fits their class; "fastest" to the target
            (`PerformanceModel.best_batch`); "proportional" to their speed, with the train loader's batch size as the
            mean over clients; "loader" for the loader's, if it fits; or numbers by class.
        over_selection: factor by which more clients are sampled than needed; the fastest of them count.
        deadline: seconds after which the server closes a round; None waits for all.
        min_clients: number of clients that it waits for in any case, so that no round is empty.
        noise_scale: the gradient noise scale in samples, if known; for "fastest".
        headroom: share of every device's memory to leave free.
        seed: seed of the assignment of devices.

    Raises:
        TypeError, ValueError: if an argument is invalid; names the argument, the value and the remedy.

    Example:
        >>> population = Population({"phone": 0.7, "jetson": 0.3})
        >>> np.bincount(population.assign(10)).tolist()
        [7, 3]
    """

    def __init__(
        self,
        shares: Mapping[str | DeviceClass, float],
        *,
        batch_size: BatchRule | Mapping[str, int] = "largest",
        over_selection: float = 1.0,
        deadline: float | None = None,
        min_clients: int = 1,
        noise_scale: float | None = None,
        headroom: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not isinstance(shares, Mapping) or not shares:
            raise TypeError(f"shares={shares!r}: pass shares by device class, such as {{'phone': 0.7, 'jetson': 0.3}}.")
        self.classes: tuple[DeviceClass, ...] = tuple(map(device_class, shares))
        names = [each.name for each in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"shares: device classes {', '.join(names)}: give each of them its own name.")
        for name, share in zip(names, shares.values(), strict=True):
            if not checks.is_number(share) or not 0 < share < math.inf:
                raise ValueError(f"shares[{name!r}]={share!r}: pass a share above 0, or leave this device class out.")
        amounts = np.array([float(share) for share in shares.values()])
        self.shares: FloatArray = amounts / amounts.sum()
        self.batch_size = _checked_rule(batch_size, names)
        if not checks.is_number(over_selection) or not 1 <= over_selection < math.inf:
            raise ValueError(f"over_selection={over_selection!r}: pass a factor of at least 1, such as 1.3.")
        if deadline is not None and (not checks.is_number(deadline) or not deadline > 0):
            raise ValueError(f"deadline={deadline!r}: pass a number of seconds above 0, or None.")
        if isinstance(min_clients, bool) or not isinstance(min_clients, int) or min_clients < 1:
            raise ValueError(f"min_clients={min_clients!r}: pass a number of clients, at least 1.")
        if noise_scale is not None and (not checks.is_number(noise_scale) or not noise_scale > 0):
            raise ValueError(f"noise_scale={noise_scale!r}: pass a number of samples above 0, or None.")
        if not checks.is_number(headroom) or not 0 <= headroom < 1:
            raise ValueError(f"headroom={headroom!r}: pass the share of memory to leave free, in [0, 1).")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r}: pass an integer of at least 0.")
        self.over_selection = float(over_selection)
        self.deadline = deadline
        self.min_clients = min_clients
        self.noise_scale = noise_scale
        self.headroom = float(headroom)
        self.seed = seed

    @property
    def may_drop(self) -> bool:
        """Whether fewer clients than requested may train in a round."""
        return self.deadline is not None or any(each.availability < 1 for each in self.classes)

    def assign(self, num_clients: int) -> IntArray:
        """Return the class of each client, as an index into ``classes``.

        Shares are as exact as whole clients allow (largest remainders); the assignment is drawn from the seed.

        Args:
            num_clients: number of clients.
        """
        exact = self.shares * num_clients
        counts = np.floor(exact).astype(np.int64)
        rest = num_clients - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
        of_client: IntArray = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        randomness.generator(self.seed, randomness.HARDWARE).shuffle(of_client)
        return of_client

    def asked(self, wanted: int, num_clients: int) -> int:
        """Return how many clients are sampled if this many are needed."""
        return min(num_clients, math.ceil(self.over_selection * wanted - 1e-9))

    def description(self) -> dict[str, Any]:
        """Return the population as primitives, for comparison."""
        return {
            "classes": [
                [getattr(each, field) for field in DeviceClass.__dataclass_fields__ if field != "source"]
                for each in self.classes
            ],
            "shares": self.shares.tolist(),
            "batch_size": self.batch_size if isinstance(self.batch_size, str) else dict(self.batch_size),
            "over_selection": self.over_selection,
            "deadline": self.deadline,
            "min_clients": self.min_clients,
            "noise_scale": self.noise_scale,
            "headroom": self.headroom,
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        shares = {each.name: round(share, 4) for each, share in zip(self.classes, self.shares.tolist(), strict=True)}
        return f"Population({shares})"


class Selection(NamedTuple):
    """The sampled clients that count in a round, and the round's time.

    Attributes:
        clients: the clients whose updates arrive, ascending.
        seconds: simulated time of each of them, from the first byte sent to the last byte received.
        dropped: the other clients, ascending.
        round_seconds: simulated time until the server closes the round.
    """

    clients: IntArray
    seconds: FloatArray
    dropped: IntArray
    round_seconds: float


def select(
    clients: IntArray,
    seconds: FloatArray,
    unavailability: FloatArray,
    *,
    wanted: int,
    deadline: float | None = None,
    min_clients: int = 1,
) -> Selection:
    """Close a round when enough updates have arrived, or at the deadline.

    Args:
        clients: the sampled clients, ascending.
        seconds: time at which each of them would finish.
        unavailability: below 1 for available clients; of the others, smaller ones come sooner.
        wanted: number of updates that suffice; the first to arrive count.
        deadline: latest time of the round, except to wait for ``min_clients``.
        min_clients: number of clients to wait for: late ones first, then unavailable ones.

    Example:
        >>> done = select(np.array([3, 5, 8]), np.array([9.0, 1.0, 4.0]), np.zeros(3), wanted=2)
        >>> done.clients.tolist(), done.dropped.tolist(), done.round_seconds
        ([5, 8], [3], 4.0)
    """
    silent = unavailability >= 1
    in_time = ~silent & (seconds <= (math.inf if deadline is None else deadline))
    # Available clients come first, by their time; then the others, by how soon they would have been available.
    order = np.lexsort((clients, np.where(silent, unavailability, seconds), silent))
    count = min(max(min(int(in_time.sum()), wanted), min_clients), len(clients))
    chosen = np.zeros(len(clients), dtype=bool)
    chosen[order[:count]] = True
    last = float(seconds[chosen].max())
    waited_in_vain = deadline is not None and count < min(wanted, len(clients))
    closed = max(last, float(deadline)) if waited_in_vain and deadline is not None else last
    return Selection(clients[chosen], seconds[chosen], clients[~chosen], closed)


def _checked_rule(rule: object, names: list[str]) -> BatchRule | dict[str, int]:
    if isinstance(rule, Mapping):
        if set(rule) != set(names):
            raise ValueError(f"batch_size={dict(rule)!r}: pass one number for each of {', '.join(map(repr, names))}.")
        for name, size in rule.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"batch_size[{name!r}]={size!r}: pass a number of samples, at least 1.")
        return dict(rule)
    if rule not in RULES:
        raise ValueError(
            f"batch_size={rule!r}: pass one of {', '.join(map(repr, RULES))}, or a dict of numbers by device class."
        )
    return rule  # type: ignore[return-value]
