"""Before a run: the size, the data, the rounds and the time that a budget buys for a number of clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lightning_fedscale.scaling.base import Law, effective_flops
from lightning_fedscale.scaling.chinchilla import RepeatedData
from lightning_fedscale.scaling.compute import Kaplan
from lightning_fedscale.scaling.diloco import DiLoCo
from lightning_fedscale.scaling.form import Interval, positive
from lightning_fedscale.scaling.project import law_of
from lightning_fedscale.scaling.rho import Rho, rho_of

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
        clients: number of clients that train in a round.
        params: model size.
        params_low: least size that the uncertainty of the law's constants admits as best; None where not known, or
            where the size follows from ``tokens``.
        params_high: largest such size.
        tokens_per_client: tokens, or samples, that each client trains on.
        loss: predicted.
        loss_low: lower end of its 95 % interval by the law's constants; None where nothing is known of these.
        loss_high: upper end.
        rho: what division among clients costs, ``C_eff = C clients**-rho``.
        law: the law's name.
        task: what the law holds for.
        batch_per_client: tokens in a client's batch; None where no law is known, or where the device holds none.
        batch_limit: what limits it: "critical batch" or "memory".
        local_steps: between exchanges.
        rounds: exchanges; None without a batch.
        bytes_per_client: sent and received by each over the whole run; None without a batch.
        inner_learning_rate: of AdamW on the clients; None where no law is known.
        outer_learning_rate: of the server's Nesterov momentum; None where no law is known.
        devices: what the clients are.
        training_bytes: weights, gradients and Adam's moments; activations come on top.
        fits: whether all devices hold these, and a batch of one token where its bytes are known.
        days: of computing and exchanging on the slowest of the devices; None without one.
        rho_low: least that ``rho`` may be; the intervals are of all from there.
        rho_high: most that it may be.
        rho_source: how it is known.
    """

    flops: float
    clients: int
    params: float
    params_low: float | None
    params_high: float | None
    tokens_per_client: float
    loss: float | None
    loss_low: float | None
    loss_high: float | None
    rho: float
    law: str
    task: str
    batch_per_client: float | None
    batch_limit: str | None
    local_steps: int
    rounds: float | None
    bytes_per_client: float | None
    inner_learning_rate: float | None
    outer_learning_rate: float | None
    devices: tuple[str, ...]
    training_bytes: float
    fits: bool | None
    days: float | None
    rho_low: float
    rho_high: float
    rho_source: str

    @property
    def of_rho(self) -> str:
        """What was assumed, in words.

        Example:
            >>> plan(1e20, 10).of_rho, plan(1e20, 10, rho=0.5).of_rho
            ('rho 1, the upper end of 0 to 1 (not measured)', 'rho 0.5')
        """
        if self.rho_low == self.rho_high:
            return f"rho {self.rho:g}"
        if self.rho == self.rho_high:
            return f"rho {self.rho:g}, the upper end of {self.rho_low:g} to {self.rho_high:g} ({self.rho_source})"
        return f"rho {self.rho:.3g}, {self.rho_low:.3g} to {self.rho_high:.3g} ({self.rho_source})"

    def as_dict(self) -> dict[str, Any]:
        """Numbers by name."""
        return {**asdict(self), "devices": list(self.devices)}


def plan(
    flops: float,
    clients: int = 1,
    law: Any = "auto",
    rho: float | Sequence[float] | Rho | str | None = "auto",
    device_class: Device | Sequence[Device] = (),
    tokens: float | None = None,
    local_steps: int = 30,
    utilization: float = 0.3,
    activation_bytes: float | None = None,
) -> Plan:
    """Plan a run.

    Batch and learning rates follow laws of text: the batch is `DiLoCo`'s under that law and the critical one at the
    predicted loss under others (arXiv 2001.08361), learning rates are DiLoCo's (arXiv 2503.09799), for as many replicas
    as it was fitted on at most. For laws of other tasks they stay open.

    Args:
        flops: training compute of all clients together.
        clients: number of clients that train in a round; who is registered and waits does not count.
        law: a law with a best size, its name, a file of `Fit.save`, or "auto": the project's own, else `Chinchilla`.
        rho: what division among clients costs: a number, the two ends of a span, or "auto" for the one that was
            measured with the law, and 0 to 1 without. Of a span the plan is that for its upper end, the most careful
            one, and the intervals are of all of it.
        device_class: what the clients are, for memory and time; of several, the slowest and the smallest count.
        tokens: that each client holds; the model is then as large as the compute allows on these, if that is smaller
            than what the law would take. Under `RepeatedData` they may be repeated instead.
        local_steps: batches between exchanges; 30 as in DiLoCo's fits.
        utilization: share of the devices' peak speed that training reaches.
        activation_bytes: of a token in the batch, as `MaxBatchProbe` finds them (``bytes_per_sample``); with it the
            batch is what fits into memory at most.

    Raises:
        Unfitted: for a law without constants.
        ValueError: for numbers that are not positive, or a law without a best size.

    Example:
        >>> found = plan(flops=1e20, clients=10)
        >>> f"{found.params:.3g} parameters, {found.tokens_per_client:.3g} tokens each, loss {found.loss:.2f}"
        '2.62e+08 parameters, 6.36e+09 tokens each, loss 2.93'
        >>> f"{found.loss_low:.2f} to {found.loss_high:.2f}"
        '2.60 to 2.95'
    """
    chosen, _ = law_of(law, text=True)
    if chosen is None:
        raise ValueError("law=None: a plan needs a law; fit one to runs of your own (fedscale sweep).")
    positive("flops", flops)
    known = rho_of(rho, chosen.fitted_rho)
    price = known.value
    _check(local_steps, utilization, activation_bytes)
    devices = _devices(device_class)
    if tokens is not None:
        positive("tokens", tokens)
        if isinstance(chosen, RepeatedData):
            chosen = chosen.replace(unique_tokens=tokens * effective_flops(clients, clients, price))
    params, held, size, scarce = _size(chosen, flops, clients, price, tokens)
    loss = chosen.interval_of_loss(params, held, clients, price)
    is_open = clients > 1 and known.low < known.high and not chosen.knows_clients
    if is_open and not (known.is_measured and chosen.refits):  # which have a rho each
        ends = known.low, known.high
        size = _over([chosen.interval_of_size(flops, clients, end) for end in ends], size)
        loss = _over([chosen.interval_of_loss(params, held, clients, end) for end in ends], loss)
    text = chosen.domain.task == "text" and math.isfinite(loss.value)
    batch, limit = _batch(chosen, params, loss.value, clients, devices, activation_bytes) if text else (None, None)
    steps = local_steps if batch is None else max(1, min(local_steps, int(held / batch)))
    rounds = None if batch is None else max(1.0, held / (batch * steps))
    replicas = DiLoCo(replicas=min(clients, 8)) if text else None
    token = 0.0 if activation_bytes is None else activation_bytes
    return Plan(
        flops=flops,
        clients=clients,
        params=params,
        params_low=None if scarce else _finite(size.low),
        params_high=None if scarce else _finite(size.high),
        tokens_per_client=held,
        loss=_finite(loss.value),
        loss_low=_finite(loss.low),
        loss_high=_finite(loss.high),
        rho=price,
        law=chosen.name,
        task=chosen.domain.task,
        batch_per_client=batch,
        batch_limit=limit,
        local_steps=steps,
        rounds=rounds,
        bytes_per_client=None if rounds is None else 2.0 * _SENT_BYTES * params * rounds,
        inner_learning_rate=None if replicas is None else replicas.inner_learning_rate(params),
        outer_learning_rate=None if replicas is None else replicas.outer_learning_rate,
        devices=tuple(each.name for each in devices),
        training_bytes=_ADAM_BYTES * params,
        fits=all(params * _ADAM_BYTES + token <= each.memory for each in devices) if devices else None,
        days=_days(devices, flops / clients, utilization, params, rounds),
        rho_low=known.low if is_open else price,
        rho_high=known.high if is_open else price,
        rho_source=known.source or "passed",
    )


def plot_plans(plans: Sequence[Plan]) -> Figure:
    """Size and predicted loss over the number of clients, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    clients = [each.clients for each in plans]
    for axes, name, color in ((left, "params", "tab:blue"), (right, "loss", "tab:red")):
        value, low, high = (
            [math.nan if (found := getattr(each, name + end)) is None else found for each in plans]
            for end in ("", "_low", "_high")
        )
        axes.plot(clients, value, marker="o", color=color)
        axes.fill_between(clients, low, high, color=color, alpha=0.2, lw=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xscale="log", yscale="log", xlabel="clients", ylabel="best size in parameters")
    right.set(xscale="log", xlabel="clients", ylabel="predicted loss")
    figure.suptitle(f"{plans[0].flops:.3g} FLOPs in all, {plans[0].law}, {plans[-1].of_rho}")
    return figure


# ---- parts


def _over(intervals: Sequence[Interval], middle: Interval) -> Interval:
    """The interval that holds all of several, values as well as ends."""
    found = [number for each in intervals for number in each if math.isfinite(number)]
    return Interval(middle.value, min(found), max(found)) if found else middle


def _check(local_steps: int, utilization: float, activation_bytes: float | None) -> None:
    if isinstance(local_steps, bool) or not isinstance(local_steps, int) or local_steps < 1:
        raise ValueError(f"local_steps={local_steps!r}: pass a whole number, at least 1.")
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization={utilization!r}: pass a share of the device's peak, in (0, 1].")
    if activation_bytes is not None:
        positive("activation_bytes", activation_bytes)


def _devices(given: Device | Sequence[Device]) -> tuple[Device, ...]:
    devices = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    for each in devices:
        if not all(hasattr(each, name) for name in ("name", "memory", "flops", "up", "down")):
            raise TypeError(
                f"device_class={each!r}: pass device classes, such as lightning_fedscale.devices.device_class('phone')."
            )
    return devices


def _size(
    law: Law, flops: float, clients: int, rho: float, tokens: float | None
) -> tuple[float, float, Interval, bool]:
    """Size, a client's tokens, the interval of the best size, and whether data are too few for that."""
    best, size = law.optimal_federated(flops, clients, rho), law.interval_of_size(flops, clients, rho)
    if tokens is None or tokens >= best.tokens or isinstance(law, RepeatedData):
        return best.params, best.tokens, size, False
    # Fewer tokens than the law would take: the compute goes into size.
    return flops / (law.flops_per * tokens * clients), tokens, size, True


def _batch(
    law: Law,
    params: float,
    loss: float,
    clients: int,
    devices: Sequence[Device],
    activation_bytes: float | None,
) -> tuple[float | None, str | None]:
    """A client's batch in tokens, and what limits it."""
    together = law.replace(replicas=clients).batch(params) if isinstance(law, DiLoCo) else Kaplan().critical_batch(loss)
    limits = {"critical batch": max(1.0, together / clients)}
    if activation_bytes is not None and devices:
        room = min(each.memory for each in devices) - _ADAM_BYTES * params
        if room < activation_bytes:
            return None, "memory"
        limits["memory"] = room / activation_bytes
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _days(
    devices: Sequence[Device], flops: float, utilization: float, params: float, rounds: float | None
) -> float | None:
    def seconds(device: Device) -> float:
        exchange = 0.0 if rounds is None else rounds * _SENT_BYTES * params * (1.0 / device.up + 1.0 / device.down)
        return flops / (device.flops * utilization) + exchange

    return max(map(seconds, devices)) / _DAY if devices else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
