"""Before a run: the size, the data, the rounds and the time that a budget buys for a number of clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lightning_fedscale.scaling.base import Law, positive
from lightning_fedscale.scaling.chinchilla import Chinchilla
from lightning_fedscale.scaling.compute import Kaplan
from lightning_fedscale.scaling.diloco import DiLoCo
from lightning_fedscale.scaling.federated import federated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ADAM_BYTES = 16
"""Of a parameter with its gradient and Adam's two moments, in FP32 or in mixed precision with a master copy."""
_SENT_BYTES = 4
_DAY = 86_400.0


class Device(Protocol):
    """What of a `lightning_fedscale.devices.DeviceClass` a plan needs."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def memory(self) -> int:
        """Bytes."""

    @property
    def flops(self) -> float:
        """Floating-point operations per second, at best."""

    @property
    def up(self) -> float:
        """Bytes per second that it sends."""

    @property
    def down(self) -> float:
        """Bytes per second that it receives."""


@dataclass(frozen=True)
class Plan:
    """What a budget buys.

    Attributes:
        flops: training compute of all clients together.
        clients: number of clients, all of which train.
        params: model size.
        tokens_per_client: tokens, or samples, that each client trains on.
        loss: predicted.
        rho: what division among clients costs, ``C_eff = C clients**-rho``.
        law: the law's name.
        batch_per_client: tokens in a client's batch: its share of the critical batch; None where no law is known.
        local_steps: between exchanges.
        rounds: exchanges; None without a batch.
        bytes_per_client: sent and received by each over the whole run; None without a batch.
        inner_learning_rate: of AdamW on the clients; None where no law is known.
        outer_learning_rate: of the server's Nesterov momentum; None where no law is known.
        device: what the clients are.
        training_bytes: weights, gradients and Adam's moments; activations come on top.
        fits: whether the device holds these.
        days: of computing and exchanging on the device; None without one.
    """

    flops: float
    clients: int
    params: float
    tokens_per_client: float
    loss: float
    rho: float
    law: str
    batch_per_client: float | None
    local_steps: int
    rounds: float | None
    bytes_per_client: float | None
    inner_learning_rate: float | None
    outer_learning_rate: float | None
    device: str | None
    training_bytes: float
    fits: bool | None
    days: float | None

    def as_dict(self) -> dict[str, Any]:
        """Numbers by name."""
        return asdict(self)


def plan(
    flops: float,
    clients: int,
    law: Law | None = None,
    rho: float = 1.0,
    device_class: Device | None = None,
    tokens: float | None = None,
    local_steps: int = 30,
    utilization: float = 0.3,
) -> Plan:
    """Plan a run.

    Batch and learning rates follow laws of text: the batch is the critical one at the predicted loss (arXiv
    2001.08361), learning rates are DiLoCo's (arXiv 2503.09799), for as many replicas as it was fitted on at most. For
    laws of other tasks they stay open.

    Args:
        flops: training compute of all clients together.
        clients: number of clients.
        law: any law with a best size; None for `Chinchilla`.
        rho: what division among clients costs.
        device_class: what the clients are, for memory and time.
        tokens: that each client holds; the model is then as large as the compute allows on these, if that is smaller
            than what the law would take.
        local_steps: batches between exchanges; 30 as in DiLoCo's fits.
        utilization: share of the device's peak speed that training reaches.

    Raises:
        Unfitted: for a law without constants.
        ValueError: for numbers that are not positive.

    Example:
        >>> found = plan(flops=1e20, clients=10)
        >>> f"{found.params:.3g} parameters, {found.tokens_per_client:.3g} tokens each, loss {found.loss:.2f}"
        '2.62e+08 parameters, 6.36e+09 tokens each, loss 2.93'
    """
    law = Chinchilla() if law is None else law
    positive("local_steps", local_steps)
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization={utilization!r}: pass a share of the device's peak, in (0, 1].")
    seen = federated(law, clients, rho)
    best = seen.optimal(flops)
    params, held, loss = best.params, best.tokens, best.loss
    if tokens is not None and positive("tokens", tokens) < held:
        # Fewer tokens than the law would take: the compute goes into size.
        held = tokens
        params = flops / (law.flops_per * held * clients)
        loss = seen.loss(params, held)
    text = law.holds.task == "text" and math.isfinite(loss)
    batch = Kaplan().critical_batch(loss) / clients if text else None
    rounds = None if batch is None else max(1.0, held / (batch * local_steps))
    replicas = DiLoCo(replicas=min(clients, 8)) if text else None
    sent = None if rounds is None else 2.0 * _SENT_BYTES * params * rounds
    days = None
    if device_class is not None:
        seconds = flops / clients / (device_class.flops * utilization)
        if rounds is not None:
            seconds += rounds * _SENT_BYTES * params * (1.0 / device_class.up + 1.0 / device_class.down)
        days = seconds / _DAY
    return Plan(
        flops=flops,
        clients=clients,
        params=params,
        tokens_per_client=held,
        loss=loss,
        rho=rho,
        law=law.name,
        batch_per_client=batch,
        local_steps=local_steps,
        rounds=rounds,
        bytes_per_client=sent,
        inner_learning_rate=None if replicas is None else replicas.inner_learning_rate(params),
        outer_learning_rate=None if replicas is None else replicas.outer_learning_rate,
        device=None if device_class is None else device_class.name,
        training_bytes=_ADAM_BYTES * params,
        fits=None if device_class is None else params * _ADAM_BYTES <= device_class.memory,
        days=days,
    )


def plot_plans(plans: Sequence[Plan]) -> Figure:
    """Size and predicted loss over the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    clients = [each.clients for each in plans]
    left.plot(clients, [each.params for each in plans], marker="o", color="tab:blue")
    left.set(xscale="log", yscale="log", xlabel="clients", ylabel="best size in parameters")
    right.plot(clients, [each.loss for each in plans], marker="o", color="tab:red")
    right.set(xscale="log", xlabel="clients", ylabel="predicted loss")
    figure.suptitle(f"{plans[0].flops:.3g} FLOPs in all, {plans[0].law}, rho {plans[0].rho:g}")
    return figure
