"""A model of the time of a local step, sequential and vectorized, by which "auto" chooses the executor.

An executor calls operators, and each call takes time besides its arithmetic: Python, autograd, dispatch. A vectorized
step calls them once for all of its clients, but its products of small matrices and its grouped convolutions are no
faster, and what it reads and writes is the same. So it pays where calls take longer than work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_fedscale.core.executors.machine import Machine
from lightning_fedscale.devices.profiling.costs import bytes_moved_by, flops_of, has_formula


class Weights(NamedTuple):
    """What counts how much in a step, as a multiple of the operators that `machine.measured` times.

    Attributes:
        operator: a call in a sequential step, with the Python code around it.
        replayed: a call in a captured step.
        uncaptured: a call in a vectorized step that cannot be captured.
        view: a call in a vectorized step that only makes a view, as a share of other calls.
        optimizer: a call in a step of the optimizer.
        layer: a call of a convolution or recurrent layer, in addition.
        step: a sequential step, besides its operators.
        client: a client's part of a vectorized step, besides its operators.
        flop: an operation of a matrix product.
        layer_flop: an operation of a convolution or recurrent layer.
        byte: a byte read or written.
    """

    operator: float
    replayed: float
    uncaptured: float
    view: float
    optimizer: float
    layer: float
    step: float
    client: float
    flop: float
    layer_flop: float
    byte: float


# Fitted to the steps of benchmarks/choice.py on one core; not fitted on CUDA.
WEIGHTS: Final = Weights(8.5, 5.8, 13.0, 0.35, 3.0, 60.0, 26.0, 4.4, 1.54, 6.7, 3.0)

_LAYERS: Final = ("convolution", "rnn", "lstm", "gru")


class Counts(NamedTuple):
    """The operators of a step, summed.

    Attributes:
        calls: operators other than views.
        views: operators that only make a view.
        layers: convolutions and recurrent layers among the calls.
        flops: floating-point operations of matrix products.
        layer_flops: those of convolutions and recurrent layers.
        moved: bytes that other operators read and write.
    """

    calls: int = 0
    views: int = 0
    layers: int = 0
    flops: float = 0.0
    layer_flops: float = 0.0
    moved: float = 0.0


class StepCounts:
    """The operators of one local batch, counted in the comparison of vectorized with sequential steps.

    Only the first step of each kind is counted.

    Attributes:
        alone: of a client's forward and backward pass in the module.
        joint: of a vectorized forward and backward pass.
        joint_clients: the clients of that pass.
        optimizer: of a vectorized step of the optimizer, with the clipping and corrections before it.
        optimizer_clients: the clients of that step.
    """

    def __init__(self) -> None:
        self.alone = self.joint = self.optimizer = Counts()
        self.joint_clients = self.optimizer_clients = 1

    @contextmanager
    def of_client(self) -> Iterator[None]:
        """Count a sequential forward and backward pass inside the context."""
        with _Counter() as counter:
            yield
        if not self.alone.calls:
            self.alone = counter.counts()

    @contextmanager
    def of_clients(self, clients: int) -> Iterator[None]:
        """Count a vectorized forward and backward pass inside the context."""
        with _Counter() as counter:
            yield
        if not self.joint.calls:
            self.joint, self.joint_clients = counter.counts(), clients

    @contextmanager
    def of_optimizer(self, clients: int) -> Iterator[None]:
        """Count a vectorized step of the optimizer inside the context."""
        with _Counter() as counter:
            yield
        if not self.optimizer.calls:
            self.optimizer, self.optimizer_clients = counter.counts(), clients


class StepModel(NamedTuple):
    """The predicted time of a local batch.

    Attributes:
        counts: what a local batch does.
        machine: how fast this machine is.
        accumulation: local batches for each step of the optimizer.
        weights: what counts how much.
    """

    counts: StepCounts
    machine: Machine
    accumulation: int = 1
    weights: Weights = WEIGHTS

    def sequential(self) -> float:
        """Return the seconds of a client's local batch."""
        alone, weights = self.counts.alone, self.weights
        calls, moved = self._optimizer()
        launches = weights.step + weights.operator * alone.calls + weights.layer * alone.layers + calls
        return self.machine.seconds(launches, self._flops(alone), weights.byte * (alone.moved + moved))

    def vectorized(self, clients: float, *, captured: bool = True) -> float:
        """Return the seconds of a client's local batch in a step of so many clients."""
        joint, weights = self.counts.joint, self.weights
        calls, moved = self._optimizer()
        each = weights.replayed if captured else weights.uncaptured
        launches = each * (joint.calls + weights.view * joint.views) + weights.layer * joint.layers + calls
        own = joint.moved / self.counts.joint_clients + moved
        return self.machine.seconds(
            launches / clients + weights.client, self._flops(joint) / self.counts.joint_clients, weights.byte * own
        )

    def most(self) -> float:
        """Return how many times as fast a vectorized local batch could be if its calls took no time at all.

        This needs no vectorized step: for each client it computes, reads and writes no less than a sequential one.
        """
        alone = self.counts.alone
        _, moved = self._optimizer()
        least = self.machine.seconds(self.weights.client, self._flops(alone), self.weights.byte * (alone.moved + moved))
        return self.sequential() / least

    def described(self) -> str:
        """Describe a local batch for messages."""
        alone = self.counts.alone
        flops, moved = (alone.flops + alone.layer_flops) / 1e6, alone.moved / 1e6
        return f"{alone.calls} operators, {flops:.3g} MFLOP and {moved:.3g} MB a local batch"

    def _flops(self, counts: Counts) -> float:
        return self.weights.flop * counts.flops + self.weights.layer_flop * counts.layer_flops

    def _optimizer(self) -> tuple[float, float]:
        """Return the calls, and the bytes of one client, for each local batch."""
        counts = self.counts.optimizer
        calls = self.weights.optimizer * counts.calls / self.accumulation
        return calls, counts.moved / self.counts.optimizer_clients / self.accumulation


class Forecast(NamedTuple):
    """The predicted times of a local batch.

    Attributes:
        model: predicts them.
        clients: clients whose local batches share a vectorized step, on average.
        captured: whether steps can be captured; True also if this has not been tried since it does not matter.
        trial: seconds that a vectorized local batch of few clients took in a dry run, uncaptured.
    """

    model: StepModel
    clients: float
    captured: bool
    trial: float

    @property
    def sequential(self) -> float:
        """Seconds of a sequential local batch."""
        return self.model.sequential()

    @property
    def vectorized(self) -> float:
        """Seconds of a vectorized local batch."""
        return self.model.vectorized(self.clients, captured=self.captured)

    @property
    def gain(self) -> float:
        """How many times as fast vectorized steps should be."""
        return self.sequential / self.vectorized


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators while it is the current mode; the computation is not changed."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = self._views = self._layers = 0
        self._flops = self._layer_flops = self._moved = 0.0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: compiled code stays compiled."""
        return True

    def counts(self) -> Counts:
        """Return the sums."""
        return Counts(self._calls, self._views, self._layers, self._flops, self._layer_flops, self._moved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):
            self._views += 1
            return result
        self._calls += 1
        if isinstance(func, torch._ops.OpOverload):
            try:
                self._add_work(func, args, kwargs or {}, result)
            except Exception:  # a formula that does not support these arguments; the call counts
                return result
        return result

    def _add_work(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        flops = float(flops_of(func, args, kwargs, result)) if has_formula(func) else 0.0
        if any(name in str(func) for name in _LAYERS):
            self._layers += 1
            self._layer_flops += flops
            return
        self._flops += flops
        inputs, outputs = ([leaf for leaf in tree_iter(part) if isinstance(leaf, Tensor)] for part in (args, result))
        self._moved += bytes_moved_by(func, inputs, outputs)
