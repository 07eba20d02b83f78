"""Asynchronous federated learning in simulated time: when clients finish, and from which global model they started."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lightning_fedscale.types import FloatArray, IntArray
from lightning_fedscale.utils import checks, randomness
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"Arrivals": "AsyncSimulation", "Flush": "BufferedRound"})

Staleness = Literal["polynomial", "constant"]


class FedBuff:
    r"""Buffered asynchronous aggregation (FedBuff, arXiv 2106.06639), for ``FederatedStrategy(mode=FedBuff(...))``.

    A constant number of clients train at any time. A client that finishes sends its update into a buffer, and another
    one starts from the current global model. When the buffer has ``clients_per_round`` updates, the server takes a
    step; this is a round. An update that started :math:`\tau` rounds ago is scaled by :math:`s(\tau)`.

    Time is simulated: it determines the order of updates without any waiting. A client takes as long as its device
    would (``population=``), or the seconds given here.

    Args:
        concurrency: number of clients that train at once; None is twice ``clients_per_round``, or as many as possible.
        staleness: "polynomial", :math:`s(\tau) = (1 + \tau)^{-a}`, or "constant", :math:`s = 1`.
        exponent: :math:`a`; the paper's is 1/2.
        seconds: each client's time for local training and communication; None takes it from the population.

    Raises:
        TypeError, ValueError: if an argument is invalid; names the argument, the value and the remedy.

    Example:
        >>> [round(FedBuff().scale(rounds), 3) for rounds in (0, 1, 3)]
        [1.0, 0.707, 0.5]
    """

    def __init__(
        self,
        concurrency: int | None = None,
        staleness: Staleness = "polynomial",
        exponent: float = 0.5,
        seconds: Sequence[float] | None = None,
    ) -> None:
        if staleness not in ("polynomial", "constant"):
            raise ValueError(
                f"staleness={staleness!r}: pass 'polynomial', by which an older update counts less (exponent=0.5 sets"
                " how much), or 'constant', by which all count alike."
            )
        remedy = "pass a number of at least 0; the paper's is 0.5."
        self.concurrency = None if concurrency is None else checks.integer("concurrency", concurrency)
        self.staleness = staleness
        self.exponent = checks.number("exponent", exponent, remedy, lambda number: 0 <= number < math.inf)
        self.seconds = None if seconds is None else _checked_seconds(seconds)

    def scale(self, rounds: int) -> float:
        """Return the factor of an update that started this many rounds ago."""
        return 1.0 if self.staleness == "constant" else float((1 + rounds) ** -self.exponent)

    def concurrent(self, buffer: int, num_clients: int) -> int:
        """Return how many clients train at once, for a buffer of this many updates.

        Raises:
            ValueError: if there are not enough clients; those whose updates wait in the buffer do not start again.
        """
        most = num_clients - buffer + 1
        wanted = min(2 * buffer, max(1, most)) if self.concurrency is None else self.concurrency
        if wanted > most:
            raise ValueError(
                f"concurrency={wanted} with clients_per_round={buffer}: this needs {wanted + buffer - 1} clients, since"
                f" clients with an update in the buffer do not train, and there are {num_clients}: lower one of them."
            )
        return wanted

    def description(self) -> list[object]:
        """Return the settings as primitives, for comparison."""
        seconds = None if self.seconds is None else self.seconds.tolist()
        return [self.concurrency, self.staleness, self.exponent, seconds]

    def __repr__(self) -> str:
        given = "" if self.seconds is None else f", seconds of {len(self.seconds)} clients"
        return f"FedBuff(concurrency={self.concurrency}, staleness={self.staleness!r}{given})"


class BufferedRound(NamedTuple):
    """An asynchronous round: the clients whose updates filled the buffer.

    Attributes:
        clients: the clients whose updates it has, ascending.
        versions: index of the round whose initial global model each of them started from.
        durations: seconds that each of them took.
        time: simulated seconds since the start of the run.
        waiting: the oldest version from which a client in training started; it may be the next version.
    """

    clients: IntArray
    versions: IntArray
    durations: FloatArray
    time: float
    waiting: int


class AsyncSimulation:
    """The simulation of asynchronous clients: a pure function of its arguments that computes rounds on demand.

    Args:
        seed: the strategy's seed.
        num_clients: number of clients.
        buffer: updates in a round.
        concurrency: clients that train at once.
        seconds: ``(client, version)``: returns the time of a client that starts from this version.
        available: ``(start, client)``: returns whether a client is available for the attempt of this number.

    Example:
        >>> simulation = AsyncSimulation(0, 4, buffer=2, concurrency=2, seconds=lambda client, _: 1.0 + client)
        >>> [len(simulation.of_round(number).clients) for number in range(3)]
        [2, 2, 2]
    """

    def __init__(
        self,
        seed: int,
        num_clients: int,
        buffer: int,
        concurrency: int,
        seconds: Callable[[int, int], float],
        available: Callable[[int, int], bool] = lambda start, client: True,
    ) -> None:
        self._seed = seed
        self._num_clients = num_clients
        self._buffer = buffer
        self._seconds = seconds
        self._available = available
        self._rounds: list[BufferedRound] = []
        self._training: list[tuple[float, int, int, int, float]] = []  # done at, start, client, version, duration
        self._waiting: dict[int, tuple[int, float]] = {}  # in the buffer: client -> version, duration
        self._busy: set[int] = set()
        self._starts = 0
        for _ in range(concurrency):
            self._start(0.0)

    def of_round(self, round: int) -> BufferedRound:
        """Return the buffer of a round."""
        while len(self._rounds) <= round:
            self._rounds.append(self._next())
        return self._rounds[round]

    def _next(self) -> BufferedRound:
        while True:
            now, _, client, version, duration = heapq.heappop(self._training)
            self._waiting[client] = version, duration
            if len(self._waiting) < self._buffer:
                self._start(now)
                continue
            clients = sorted(self._waiting)
            versions, durations = zip(*(self._waiting[each] for each in clients), strict=True)
            self._busy -= self._waiting.keys()
            self._waiting = {}
            # The next client starts from the model that this round produces.
            self._start(now, version=len(self._rounds) + 1)
            oldest = min(entry[3] for entry in self._training)
            return BufferedRound(np.array(clients), np.array(versions), np.array(durations), now, oldest)

    def _start(self, now: float, version: int | None = None) -> None:
        version = len(self._rounds) if version is None else version
        rng = randomness.generator(self._seed, randomness.COHORT, self._starts)
        free = None
        for attempt in range(1000):
            client = int(rng.integers(self._num_clients))
            if client in self._busy:
                continue
            free = client
            if self._available(self._starts * 1000 + attempt, client):
                break
        if free is None:  # nearly all are busy
            free = next(client for client in range(self._num_clients) if client not in self._busy)
        duration = self._seconds(free, version)
        self._busy.add(free)
        heapq.heappush(self._training, (now + duration, self._starts, free, version, duration))
        self._starts += 1


def _checked_seconds(seconds: Sequence[float]) -> FloatArray:
    try:
        values = np.asarray(seconds, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"seconds={seconds!r}: pass one number above 0 per client.")
    return values
