"""Values that the parts of the package exchange. They have no behaviour beyond being read."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Params: TypeAlias = Mapping[str, "Tensor"]
"""Trainable parameters by name, as float64 tensors of the parameters' own shapes."""

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]

NAMESPACES = ("round", "client", "clients", "personal", "phase", "probe", "compute")
"""Prefixes of the logged values that are not the user's."""

_T = TypeVar("_T")

Cursor: TypeAlias = tuple[int, int]
"""Where a client resumes its data: (pass over its data, batch within that pass)."""


SIDE = 7
"""Length of `RoundRecord.side`."""


def renamed_field(old: str, new: str) -> Callable[[type[_T]], type[_T]]:
    """Let a field still be read and passed by its old name, with a warning, for one release."""

    def decorate(kind: type[_T]) -> type[_T]:
        def warn() -> None:
            text = f"{kind.__name__}.{old} is {new} now: use that; the old name goes after one release."
            warnings.warn(text, DeprecationWarning, stacklevel=3)

        def accepting(function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function)
            def call(owner: Any, *args: Any, **fields: Any) -> Any:
                if old in fields:
                    warn()
                    fields[new] = fields.pop(old)
                return function(owner, *args, **fields)

            return call

        def read(self: Any) -> Any:
            warn()
            return getattr(self, new)

        for name in ("__new__", "_replace"):
            setattr(kind, name, accepting(getattr(kind, name)))
        setattr(kind, old, property(read))
        return kind

    return decorate


class ClientCost(NamedTuple):
    """The cost of a client's local training, as reported by a meter.

    Attributes:
        forward: FLOPs of its forward passes, including those for further gradients that a local rule needs.
        backward: FLOPs of its backward passes, likewise.
        optimizer: operations of its optimizer, and of additions to its gradients.
        tokens: tokens, or samples, that it trained on.
    """

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    tokens: float = 0.0

    def plus(self, other: ClientCost) -> ClientCost:
        """Add two costs.

        Example:
            >>> ClientCost(forward=2.0, tokens=1.0).plus(ClientCost(backward=4.0))
            ClientCost(forward=2.0, backward=4.0, optimizer=0.0, tokens=1.0)
        """
        return ClientCost(*(mine + more for mine, more in zip(self, other, strict=True)))


class PendingDelta(ABC):
    """A client's delta that is computed when somebody asks for it, from the model that the module holds until then."""

    @abstractmethod
    def vector(self) -> Tensor:
        """Return the whole delta, always the same tensor."""

    @abstractmethod
    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the parts of the delta in order, each with its place; a part is valid until the next one."""

    @abstractmethod
    def clear(self, elements: Iterable[slice]) -> None:
        """Have these elements be zero from now on."""


class _Fields(NamedTuple):
    client: int
    delta: Tensor | PendingDelta
    norm: float
    num_samples: int
    samples: int
    steps: int
    loss: float
    seconds: float
    cost: ClientCost | None = None
    optimizer_steps: int = 0


@renamed_field("held", "num_samples")
class ClientUpdate(_Fields):
    """The update that a client sends to the server at the end of its local training.

    Attributes:
        client: index of the client, 0 to ``num_clients - 1``.
        delta: pseudo-gradient ``server - client`` as one float64 vector over everything that is exchanged; the
            first ``trainable`` elements belong to trainable parameters, the rest to buffers and frozen parameters.
            It is a scratch buffer: copy it to keep it. `parts` takes less memory.
        norm: L2 norm of the trainable part; not finite when any element of ``delta`` is not, or when the client had no
            batch to train on.
        num_samples: number of samples of the client (FedAvg's weight).
        samples: number of samples that it trained on in this round, every pass counted.
        steps: number of local batches.
        loss: mean training loss per sample over the round, NaN when ``training_step`` returned none.
        seconds: time the client took on its rank.
        cost: cost of its training; None without a meter.
        optimizer_steps: number of optimizer steps; 0 in manual optimization, where they are not counted.
    """

    __slots__ = ()

    @property
    def source(self) -> Tensor | PendingDelta:
        """The delta, or what computes it."""
        source: Tensor | PendingDelta = tuple.__getitem__(self, 1)  # type: ignore[assignment]
        return source

    @property
    def delta(self) -> Tensor:
        """The whole delta."""
        source = self.source
        return source.vector() if isinstance(source, PendingDelta) else source

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the parts of ``delta`` in order, each with its place in it, without holding the whole.

        A part is valid until the next one, and may not be changed.

        Example:
            >>> import torch
            >>> update = ClientUpdate(0, torch.tensor([3.0, 4.0]), 5.0, 1, 1, 1, 0.0, 0.0)
            >>> [(place.start, place.stop, part.tolist()) for place, part in update.parts()]
            [(0, 2, [3.0, 4.0])]
        """
        source = self.source
        if isinstance(source, PendingDelta):
            yield from source.parts()
        else:
            yield slice(0, len(source)), source

    def __iter__(self) -> Iterator[Any]:
        return iter((self.client, self.delta, *tuple.__getitem__(self, slice(2, None))))

    def __getitem__(self, place: Any) -> Any:
        return tuple(self)[place] if isinstance(place, slice) else getattr(self, self._fields[place])

    def _replace(self, **fields: Any) -> ClientUpdate:
        kept = zip(self._fields, tuple.__iter__(self), strict=True)
        return ClientUpdate(**{**dict(kept), **fields})

    @property
    def finite(self) -> bool:
        """Whether the server may use the update; a non-finite one is left out of the round."""
        return math.isfinite(self.norm)

    @property
    def without_batches(self) -> bool:
        """Whether the client could not train, since all its batches are None; it is left out too."""
        return not self.finite and not self.steps


@renamed_field("registered", "num_clients")
class Cohort(NamedTuple):
    """The clients that take part in a round.

    Attributes:
        round: index of the round, from 0.
        clients: the clients, ascending, including those whose update is not finite; possibly empty.
        num_clients: number of all clients, most of which may not take part.
        trainable: number of elements of a delta that belong to trainable parameters; they come first.
        seed: the strategy's seed.
    """

    round: int
    clients: IntArray
    num_clients: int
    trainable: int
    seed: int

    def place(self, client: int) -> int:
        """Return the position of a client in ``clients``."""
        return int(np.searchsorted(self.clients, client))


class SimulatedRound(NamedTuple):
    """A round on the clients' own hardware, as simulated by a population.

    Attributes:
        seconds: simulated time until the server closed the round.
        total: the same, summed over all rounds so far.
        batch_sizes: batch size of each client of the cohort.
        client_seconds: time of each client of the cohort, from the first byte received to the last byte sent.
        dropped: clients that were selected but did not answer, were late, or were no longer needed.
    """

    seconds: float
    total: float
    batch_sizes: IntArray
    client_seconds: FloatArray
    dropped: tuple[int, ...]


@dataclass(frozen=True)
class RoundRecord:
    """The record of a finished round, ``trainer.strategy.last_round``; it is the same on every rank.

    Arrays have one entry per client of the cohort, in the order of ``clients``; they are empty if no client took part.

    Attributes:
        round: index of the round, from 0.
        clients: the cohort, ascending.
        ranks: rank that trained each client.
        weights: weight of each client in the aggregate; they sum to 1, and rejected clients have zero.
        samples: samples each client trained on, every pass counted.
        local_steps: local batches of each client.
        losses: mean training loss of each client, NaN when unknown.
        delta_norms: L2 norm of each client's pseudo-gradient over trainable parameters; NaN when rejected.
        client_seconds: time each client took.
        rejected: clients left out because their update was not finite, or all their batches were None.
        loss: mean training loss per sample over accepted clients, NaN when unknown.
        delta_norm: L2 norm of the aggregated pseudo-gradient.
        drift: root-mean-square distance of client deltas from their mean, relative to the mean's norm:
            ``sqrt(sum_k p_k |delta_k|^2 - |mean|^2) / |mean|``; below about 1e-7 it is rounding.
        upload_bytes: bytes that all clients would send: compressed, or in the precision of the model.
        download_bytes: bytes that the server would send to them.
        seconds: time from the first batch to the collective, on the slowest rank.
        padding: fraction of unused slots in vectorized training, where clients have unequal numbers of batches; 0 when
            clients train sequentially.
        idle: fraction of the ranks' time spent waiting for the slowest one, 0 to 1.
        simulated: the round on the clients' own hardware; None without a population.
        forward_flops: FLOPs of each client's forward passes, including those of its local rule or personal model; like
            all costs here, zeros without a meter.
        backward_flops: FLOPs of its backward passes.
        optimizer_flops: operations of its optimizer, and of what a local rule adds to its gradients.
        tokens: tokens, or samples, that it trained on.
        operations: element-wise operations of the local rule, compressors and privacy on all updates.
        side: FLOPs of all ranks for evaluation, and for probing, since the previous round; the standard error of the
            FLOPs of clients' training; the number of their batches that were counted, and of all their batches; the sum
            of active parameters times tokens, and of these tokens.
        epsilon: privacy budget spent so far; None without differential privacy.
        staleness: number of rounds since each client started; None unless training is asynchronous.
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
        """Whether no update counts, because no client took part or all were left out."""
        return not (self.weights > 0).any()

    @property
    def spare(self) -> tuple[int, ...]:
        """Always empty, since a rank without a client trains none; goes after one release."""
        text = "RoundRecord.spare is always empty and goes after one release: there are no placeholder clients."
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return ()

    @property
    def flops(self) -> FloatArray:
        """Training FLOPs of each client, forward and backward."""
        return self.forward_flops + self.backward_flops

    def metrics(self) -> dict[str, float]:
        """Return the scalars that are logged every round, by logged name; an unknown loss is left out."""
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
