"""Planning a run: the size, the data, the rounds and the time that a budget allows for a number of clients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lightning_fedscale.scaling.agreement import agreement, check_clients, too_many_passes
from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.chinchilla import RepeatedData
from lightning_fedscale.scaling.compute import Kaplan
from lightning_fedscale.scaling.diloco import DiLoCo
from lightning_fedscale.scaling.form import Interval, positive
from lightning_fedscale.scaling.made_for import Size, partition_given
from lightning_fedscale.scaling.project import law_of
from lightning_fedscale.scaling.rho import Rho, rho_of
from lightning_fedscale.scaling.verdicts import CONTRADICTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ADAM_BYTES = 16
"""Bytes of a parameter with its gradient and Adam's two moments, in FP32 or mixed precision with a master copy."""
_SENT_BYTES = 4
_DAY = 86_400.0
_LOCAL_STEPS = 30
"""Local steps of the runs behind DiLoCo's fits."""


class Device(Protocol):
    """The part of a `lightning_fedscale.devices.DeviceClass` that a plan needs."""

    @property
    def name(self) -> str:
        """Name of the device class."""

    @property
    def memory(self) -> int:
        """Memory in bytes."""

    @property
    def flops(self) -> float:
        """Peak floating-point operations per second."""

    @property
    def up(self) -> float:
        """Uplink in bytes per second."""

    @property
    def down(self) -> float:
        """Downlink in bytes per second."""


@dataclass(frozen=True)
class Plan:
    """A run that fits a budget.

    Attributes:
        flops: training compute of all clients together.
        clients: number of clients that train in a round.
        params: model size.
        params_low: lower end of the best size's interval, by the law's constants; None if it is not known, or if the
            size follows from ``tokens``.
        params_high: upper end of this interval.
        tokens_per_client: tokens, or samples, that each client trains on.
        loss: predicted loss.
        loss_low: lower end of its 95 % interval, by the law's constants; None if it is not known.
        loss_high: upper end of this interval.
        rho: cost of dividing the compute among clients, ``C_eff = C clients**-rho``.
        law: the law's name.
        task: the task that the law holds for.
        batch_per_client: tokens in a client's batch; None if no law gives one, or if no batch fits into the device.
        batch_limit: what limits the batch: "critical batch", "memory", "as in the law's runs" or "as asked".
        local_steps: batches of a client between exchanges.
        rounds: number of exchanges; None without a batch.
        bytes_per_client: bytes sent and received by each client over the whole run; None without a batch.
        inner_learning_rate: learning rate of AdamW on the clients; None if no law gives it.
        outer_learning_rate: learning rate of the server's Nesterov momentum; None if no law gives it.
        devices: names of the clients' device classes.
        training_bytes: bytes of weights, gradients and Adam's moments, without activations.
        fits: whether these, and a batch of one token if its bytes are known, fit into all devices; None without
            devices.
        days: time to compute and communicate on the slowest device class, in days; None without devices.
        rho_low: lower end of ``rho``; the intervals cover all of ``rho_low`` to ``rho_high``.
        rho_high: upper end of ``rho``.
        rho_source: how ``rho`` is known.
        passes: passes over the data of all clients; None if the amount of data is not known.
        argument: the module's argument that sets its size; None if the law's runs do not record it.
        size: value of the argument for ``params``; None if it is not known.
        size_low: value of the argument for ``params_low``.
        size_high: value of the argument for ``params_high``.
        size_between: the neighbouring values of the runs; None if ``size`` is one of theirs or beyond all of them.
        method: the method as passed, else that of the law's runs; None if neither is known.
        made_for: what the law was made for, in words; empty if its runs do not record it.
        notes: doubts about the plan, in words.
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
    passes: float | None = None
    argument: str | None = None
    size: float | None = None
    size_low: float | None = None
    size_high: float | None = None
    size_between: tuple[float, float] | None = None
    method: str | None = None
    made_for: str = ""
    notes: tuple[str, ...] = ()

    @property
    def of_rho(self) -> str:
        """The assumed ``rho``, in words.

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
        """Return the attributes by name, with lists for tuples."""
        found = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def plan(
    flops: float,
    clients: int | None = None,
    law: Any = "auto",
    rho: float | Sequence[float] | Rho | str | None = "auto",
    device_class: Device | Sequence[Device] = (),
    tokens: float | None = None,
    local_steps: int | None = None,
    utilization: float = 0.3,
    activation_bytes: float | None = None,
    batch_size: int | None = None,
    method: str | None = None,
    partition: Any = None,
) -> Plan:
    """Plan a run.

    For a law that was fitted to the user's own runs, clients, batch and local steps default to those of its runs. Other
    values are used as passed, with a warning. The size is also given as the value of the module's argument.

    A batch that neither is passed nor follows from the runs is that of `DiLoCo` under this law, and the critical batch
    at the predicted loss (arXiv 2001.08361) under other laws of text. Learning rates are DiLoCo's (arXiv 2503.09799),
    for at most the number of replicas that it was fitted on. For tasks other than text they are None.

    Args:
        flops: training compute of all clients together.
        clients: number of clients that train in a round, not of all registered clients. None for the number of the
            partition, else of the law's runs if they had one number in common, else 1.
        law: a law with a best size, its name, a file of `Fit.save`, or "auto": the project's own, else `Chinchilla`.
        rho: cost of dividing the compute among clients: a number, the two ends of an interval, or "auto" for the value
            that was measured with the law, else 0 to 1. With an interval that was not measured, the plan is for its
            upper end, the most cautious one. The plan's intervals cover all of it.
        device_class: the clients' device classes, for memory and time; the slowest and the smallest one count.
        tokens: tokens that each client has. If the law would use more, the remaining compute goes into a larger model.
            Under `RepeatedData` tokens may be repeated instead.
        local_steps: batches between exchanges; None for those of the law's runs, else 30 as in DiLoCo's fits.
        utilization: fraction of the devices' peak speed that training reaches.
        activation_bytes: bytes per token in the batch, as `MaxBatchProbe` finds them (``bytes_per_sample``); the batch
            is then limited to what fits into memory.
        batch_size: a client's batch size, in samples; None for that of the law's runs.
        method: how clients will train, to be compared with the law's runs.
        partition: how the data will be divided, to be compared with the law's runs: the name of a partitioner, the file
            of a saved partition, or a Partition.

    Raises:
        Unfitted: for a law without constants.
        ValueError: for numbers that are not positive, a law without a best size, or a number of clients that differs
            from that of all the law's runs while ``rho`` is neither measured nor passed.

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
    _check(local_steps, utilization, activation_bytes, batch_size)
    made, given = chosen.made_for, None if partition is None else partition_given(partition)
    if clients is None:
        clients = made.clients[0] if len(made.clients) == 1 else 1
        clients = clients if given is None or given.clients is None else given.clients
    elif given is not None and given.clients is not None and clients > given.clients:
        raise ValueError(f"clients={clients}: the partition divides the data among {given.clients}: pass no more.")
    check_clients(chosen, clients, known)
    notes = agreement(
        chosen, clients=clients, method=method, partition=given, batch_size=batch_size, local_steps=local_steps
    ).notes
    for note in notes:
        warnings.warn(f"plan: {note}.", stacklevel=2)
    devices = _devices(device_class)
    if tokens is not None:
        positive("tokens", tokens)
        if isinstance(chosen, RepeatedData):
            chosen = chosen.replace(unique_tokens=tokens * chosen.tokens_factor(clients, price))
    elif isinstance(chosen, RepeatedData) and math.isinf(chosen.unique_tokens) and made.unique_tokens is not None:
        chosen = chosen.replace(unique_tokens=made.unique_tokens / clients * chosen.tokens_factor(clients, price))
    params, held, size, scarce = _size(chosen, flops, clients, price, tokens)
    loss = chosen.interval_of_loss(params, held, clients, price)
    is_open = clients != chosen.own_clients and known.low < known.high and not chosen.knows_clients
    if is_open and not (known.is_measured and chosen.refits):  # each refit has its own rho
        ends = known.low, known.high
        size = _over([chosen.interval_of_size(flops, clients, end) for end in ends], size)
        loss = _over([chosen.interval_of_loss(params, held, clients, end) for end in ends], loss)
    text = chosen.domain.task == "text" and math.isfinite(loss.value)
    batch, limit = _batch(chosen, params, loss.value, clients, devices, activation_bytes, batch_size, text)
    steps = local_steps or made.local_steps or _LOCAL_STEPS
    steps = steps if batch is None else max(1, min(steps, int(held / batch)))
    rounds = None if batch is None else max(1.0, held / (batch * steps))
    replicas = DiLoCo(replicas=min(clients, 8)) if text else None
    passes = None if made.unique_tokens is None else held * clients / made.unique_tokens
    sizes = [None if each is None else made.size_of(each) for each in (params, *(() if scarce else size[1:]))]
    notes += too_many_passes(chosen, passes)
    best = made.best_at(flops, clients)
    if best is not None and loss.value > 0 and abs(math.log(best.loss / loss.value)) > CONTRADICTED:
        notes.append(
            f"the law has a loss of {loss.value:.4g}, and at this compute the best run measured {best.loss:.4g}, with"
            f" {best.params:,.0f} parameters"
        )
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
        passes=passes,
        argument=made.argument if sizes[0] is not None else None,
        **_in_sizes(sizes),
        method=method or made.method,
        made_for=str(made),
        notes=tuple(notes),
    )


def plot_plans(plans: Sequence[Plan]) -> Figure:
    """Plot size and predicted loss over the number of clients, with their intervals."""
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
    """Return the interval that covers all values and ends of several intervals."""
    found = [number for each in intervals for number in each if math.isfinite(number)]
    return Interval(middle.value, min(found), max(found)) if found else middle


def _in_sizes(found: Sequence[Size | None]) -> dict[str, Any]:
    """Return the plan's fields of the best size and its interval, as values of the module's argument."""
    best, low, high = (*found, None, None)[:3]
    return {
        "size": None if best is None else best.value,
        "size_low": None if low is None else low.value,
        "size_high": None if high is None else high.value,
        "size_between": None if best is None else best.between,
    }


def _check(local_steps: int | None, utilization: float, activation_bytes: float | None, batch_size: int | None) -> None:
    for name, value in (("local_steps", local_steps), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r}: pass a whole number, at least 1.")
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
    """Return the size, a client's tokens, the best size's interval, and whether data are too few for that size."""
    best, size = law.optimal_federated(flops, clients, rho), law.interval_of_size(flops, clients, rho)
    if tokens is None or tokens >= best.tokens or isinstance(law, RepeatedData):
        return best.params, best.tokens, size, False
    # With fewer tokens than the law would use, the remaining compute goes into size.
    return flops / (law.flops_per * tokens * clients), tokens, size, True


def _batch(
    law: Law,
    params: float,
    loss: float,
    clients: int,
    devices: Sequence[Device],
    activation_bytes: float | None,
    batch_size: int | None,
    text: bool,
) -> tuple[float | None, str | None]:
    """Return a client's batch in tokens and what limits it: as asked, as in the law's runs, or by a law of text.

    Raises:
        ValueError: for a batch in samples if the number of tokens per sample is not known.
    """
    samples, per_sample = (
        batch_size or law.made_for.batch_size,
        law.made_for.tokens_per_sample or (None if text else 1.0),
    )
    if samples is not None and per_sample is not None:
        is_other = batch_size not in (None, law.made_for.batch_size)
        limits = {"as asked" if is_other else "as in the law's runs": samples * per_sample}
    elif batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size}: {law.name} counts tokens, and its runs do not say how many a sample has: leave"
            " it out."
        )
    elif not text:
        return None, None
    else:
        replicas = law.replace(replicas=clients) if isinstance(law, DiLoCo) else None
        together = Kaplan().critical_batch(loss) if replicas is None else replicas.batch(params)
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
