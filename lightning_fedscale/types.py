"""The values that rooms hand to each other. No behaviour beyond reading them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

Params: TypeAlias = Mapping[str, Tensor]
"""Trainable parameters by name, as float64 tensors of the parameters' own shapes."""

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]

NAMESPACES = ("round", "client", "clients", "personal", "phase", "probe", "compute")
"""What the names of logged values begin with that are not the user's."""

Cursor: TypeAlias = tuple[int, int]
"""Where a client's data goes on: (pass over its data, batch within that pass)."""


SIDE = 7
"""How many numbers there are in `RoundRecord.side`."""


class ClientCost(NamedTuple):
    """What a client's local training cost, as a meter says.

    Attributes:
        forward: FLOPs of its forward passes, those besides its training too: of a gradient that a local rule asks for.
        backward: FLOPs of its backward passes, likewise.
        optimizer: operations of its optimizer, and of what is added to its gradients.
        tokens: tokens, or samples, that it trained on.
    """

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    tokens: float = 0.0

    def plus(self, other: ClientCost) -> ClientCost:
        """Both together.

        Example:
            >>> ClientCost(forward=2.0, tokens=1.0).plus(ClientCost(backward=4.0))
            ClientCost(forward=2.0, backward=4.0, optimizer=0.0, tokens=1.0)
        """
        return ClientCost(*(mine + more for mine, more in zip(self, other, strict=True)))


class ClientUpdate(NamedTuple):
    """What a client sends to the server at the end of its local training.

    Attributes:
        client: index of the client, 0 to ``num_clients - 1``.
        delta: pseudo-gradient ``server - client`` as one float64 vector over everything that is exchanged; the
            first ``trainable`` elements belong to trainable parameters, the rest to buffers and frozen parameters.
            It is a scratch buffer: copy it to keep it.
        norm: L2 norm of the trainable part; not finite when any element of ``delta`` is not, or when the client had no
            batch to train on.
        held: number of samples that the client holds (FedAvg's weight).
        samples: number of samples that it trained on in this round, every pass counted.
        steps: number of local batches.
        loss: mean training loss per sample over the round, NaN when ``training_step`` returned none.
        seconds: time the client took on its rank.
        cost: of its training; None unless somebody meters.
        optimizer_steps: number of optimizer steps; 0 in manual optimization, where nobody counts them.
    """

    client: int
    delta: Tensor
    norm: float
    held: int
    samples: int
    steps: int
    loss: float
    seconds: float
    cost: ClientCost | None = None
    optimizer_steps: int = 0

    @property
    def finite(self) -> bool:
        """Whether the server may use the update; one that is not finite is left out of the round."""
        return math.isfinite(self.norm)

    @property
    def without_batches(self) -> bool:
        """Whether the client could not train, since all its batches are None; it is left out as well."""
        return not self.finite and not self.steps


class Cohort(NamedTuple):
    """Who takes part in a round, for rules that need to know.

    Attributes:
        round: index of the round, from 0.
        clients: the clients, ascending; those whose update is not finite among them. There may be none.
        registered: number of registered clients, most of which may not take part.
        trainable: how many of a delta's elements belong to trainable parameters: the first ones.
        seed: the strategy's seed.
    """

    round: int
    clients: IntArray
    registered: int
    trainable: int
    seed: int

    def place(self, client: int) -> int:
        """Position of a client among ``clients``."""
        return int(np.searchsorted(self.clients, client))


class SimulatedRound(NamedTuple):
    """A round on the clients' own hardware, as a population simulates it.

    Attributes:
        seconds: until the server closed the round.
        total: the same, summed over all rounds so far.
        batch_sizes: of each client of the cohort.
        client_seconds: of each client of the cohort, from the first byte received to the last byte sent.
        dropped: clients that were asked but did not answer, came too late, or were not needed any more.
    """

    seconds: float
    total: float
    batch_sizes: IntArray
    client_seconds: FloatArray
    dropped: tuple[int, ...]


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a finished round; the same on every rank, as ``trainer.strategy.last_round``.

    Arrays have one entry per client of the cohort, in the order of ``clients``; none in a round that nobody took part
    in.

    Attributes:
        round: index of the round, from 0.
        clients: the cohort, ascending.
        ranks: rank that trained each client.
        weights: share of each client in the aggregate; sums to 1, zero for rejected clients.
        samples: samples trained on, every pass counted.
        local_steps: local batches.
        losses: mean training loss of each client, NaN when unknown.
        delta_norms: L2 norm of each client's pseudo-gradient over trainable parameters; NaN when rejected.
        client_seconds: time each client took.
        rejected: clients left out because their update was not finite, or because all their batches were None.
        loss: mean training loss per sample over accepted clients, NaN when unknown.
        delta_norm: L2 norm of the aggregated pseudo-gradient.
        drift: root-mean-square distance of client deltas from their mean, relative to the mean's norm:
            ``sqrt(sum_k p_k |delta_k|^2 - |mean|^2) / |mean|``; below about 1e-7 it is rounding.
        upload_bytes: bytes that all clients would send: compressed, or in the model's own precision.
        download_bytes: bytes that the server would send to them.
        seconds: from the first batch to the collective, on the slowest rank.
        padding: share of the waves' room in which no client trained, since those side by side have unequal numbers of
            batches; 0 when clients train one after the other.
        idle: share of the ranks' time spent waiting for the slowest one, 0 to 1.
        simulated: the round on the clients' own hardware; None without a population.
        forward_flops: FLOPs of each client's forward passes, all that its local rule or personal model asks for among
            them; like all costs here zeros unless somebody meters.
        backward_flops: FLOPs of its backward passes.
        optimizer_flops: operations of its optimizer, and of what a local rule adds to its gradients.
        tokens: tokens, or samples, that it trained on.
        operations: of the local rule, compressors and privacy upon all updates, element by element.
        side: what all ranks spent on evaluation and on probing since the round before; the standard error of the FLOPs
            of clients' training; how many of their batches were counted, and how many there were; sums of active
            parameters times tokens, and of these tokens.
        epsilon: differential privacy's budget that is spent; None without.
        staleness: how many rounds ago each client had started; None unless training is asynchronous.
    """

    round: int
    clients: IntArray
    ranks: IntArray
    weights: FloatArray
    samples: IntArray
    local_steps: IntArray
    losses: FloatArray
    delta_norms: FloatArray
    client_seconds: FloatArray
    rejected: tuple[int, ...]
    loss: float
    delta_norm: float
    drift: float
    upload_bytes: int
    download_bytes: int
    seconds: float
    padding: float
    idle: float
    simulated: SimulatedRound | None = None
    forward_flops: FloatArray = field(default_factory=lambda: np.zeros(0))
    backward_flops: FloatArray = field(default_factory=lambda: np.zeros(0))
    optimizer_flops: FloatArray = field(default_factory=lambda: np.zeros(0))
    tokens: FloatArray = field(default_factory=lambda: np.zeros(0))
    operations: float = 0.0
    side: tuple[float, ...] = (0.0,) * SIDE
    epsilon: float | None = None
    staleness: IntArray | None = None

    @property
    def empty(self) -> bool:
        """Whether no client's update counts: nobody took part, or all who did were left out."""
        return not (self.weights > 0).any()

    @property
    def spare(self) -> tuple[int, ...]:
        """Always empty, since a rank without a client trains none; here for scripts that read it."""
        return ()

    @property
    def flops(self) -> FloatArray:
        """Training FLOPs of each client, forward and backward."""
        return self.forward_flops + self.backward_flops

    def metrics(self) -> dict[str, float]:
        """The scalars that are logged every round, by their logged names; an unknown loss is left out."""
        values = {
            "round/loss": self.loss,
            "round/clients": float(len(self.clients) - len(self.rejected)),
            "round/rejected": float(len(self.rejected)),
            "round/samples": float(self.samples.sum()),
            "round/local_steps": float(self.local_steps.sum()),
            "round/delta_norm": self.delta_norm,
            "round/drift": self.drift,
            "round/upload_bytes": float(self.upload_bytes),
            "round/download_bytes": float(self.download_bytes),
            "round/seconds": self.seconds,
            "round/padding": self.padding,
            "round/idle": self.idle,
        }
        if self.simulated is not None:
            values |= {
                "round/simulated_seconds": self.simulated.seconds,
                "round/simulated_total": self.simulated.total,
                "round/dropped": float(len(self.simulated.dropped)),
            }
        if self.staleness is not None:
            values["round/staleness"] = float(self.staleness.mean())
        if self.epsilon is not None:
            values["round/epsilon"] = self.epsilon
        if np.isnan(self.loss):
            del values["round/loss"]
        return values
