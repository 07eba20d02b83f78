"""Planning a run: the size, the data, the rounds and the time that a budget allows for a number of clients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_fedscale.scaling.agreement import agreement, check_clients, too_many_passes
from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.chinchilla import RepeatedData
from lightning_fedscale.scaling.form import Interval, positive
from lightning_fedscale.scaling.hardware import ADAM_BYTES, Device, Hardware
from lightning_fedscale.scaling.made_for import MadeFor
from lightning_fedscale.scaling.partition_id import PartitionId, partition_id
from lightning_fedscale.scaling.project import needed_law
from lightning_fedscale.scaling.rho import Rho, rho_of
from lightning_fedscale.scaling.schedule import schedule
from lightning_fedscale.scaling.verdicts import CONTRADICTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        clients: number of clients that train in a round, not of all clients. None for the number of the
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
    chosen = needed_law(law)
    positive("flops", flops)
    for name, value in (("local_steps", local_steps), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r}: pass a whole number, at least 1.")
    hardware, known = Hardware.of(device_class, utilization, activation_bytes), rho_of(rho, chosen.fitted_rho)
    made, given = chosen.made_for, None if partition is None else partition_id(partition)
    clients = _clients(clients, made, given)
    check_clients(chosen, clients, known)
    notes = agreement(
        chosen, clients=clients, method=method, partition=given, batch_size=batch_size, local_steps=local_steps
    ).notes
    for note in notes:
        warnings.warn(f"plan: {note}.", stacklevel=2)
    chosen = _with_unique_tokens(chosen, clients, known.value, tokens)
    best = _best(chosen, flops, clients, known, tokens)
    trained = schedule(
        chosen, params=best.params, tokens=best.tokens, loss=best.loss.value, clients=clients, hardware=hardware,
        batch_size=batch_size, local_steps=local_steps,
    )  # fmt: skip
    passes = None if made.unique_tokens is None else best.tokens * clients / made.unique_tokens
    return Plan(
        flops=flops,
        clients=clients,
        rho=known.value,
        law=chosen.name,
        task=chosen.domain.task,
        devices=tuple(each.name for each in hardware.devices),
        training_bytes=ADAM_BYTES * best.params,
        fits=hardware.fits(best.params),
        days=hardware.days(flops / clients, best.params, trained.rounds),
        rho_source=known.source or "passed",
        passes=passes,
        **_fields_of(best, made),
        method=method or made.method,
        made_for=str(made),
        notes=(*notes, *too_many_passes(chosen, passes), *_contradicted(made, flops, clients, best.loss.value)),
        **trained._asdict(),
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
    figure.suptitle(f"{plans[0].flops:.3g} FLOPs in total, {plans[0].law}, {plans[-1].of_rho}")
    return figure


# ---- parts


class _Best(NamedTuple):
    """The best model for a budget.

    Attributes:
        params: model size.
        tokens: tokens of each client.
        size: the best size with its interval; the ends are NaN if the size follows from the clients' tokens.
        loss: predicted loss with its interval.
        rho: the ends of ``rho`` that the intervals cover.
    """

    params: float
    tokens: float
    size: Interval
    loss: Interval
    rho: tuple[float, float]


def _clients(clients: int | None, made: MadeFor, given: PartitionId | None) -> int:
    """Return the number of clients: as passed, that of the partition, that of the law's runs, or 1.

    Raises:
        ValueError: for more clients than the partition has.
    """
    divided = None if given is None else given.clients
    if clients is None:
        return divided or (made.clients[0] if len(made.clients) == 1 else 1)
    if divided is not None and clients > divided:
        raise ValueError(f"clients={clients}: the partition has only {divided} clients. Pass at most {divided}.")
    return clients


def _with_unique_tokens(law: Law, clients: int, rho: float, tokens: float | None) -> Law:
    """Return the law with the number of unique tokens, if it has such a constant."""
    if tokens is not None:
        positive("tokens", tokens)
    if not isinstance(law, RepeatedData):
        return law
    if tokens is None and (law.made_for.unique_tokens is None or math.isfinite(law.unique_tokens)):
        return law
    held = law.made_for.unique_tokens / clients if tokens is None else tokens  # type: ignore[operator]
    return law.replace(unique_tokens=held * law.tokens_factor(clients, rho))


def _best(law: Law, flops: float, clients: int, rho: Rho, tokens: float | None) -> _Best:
    """Return the best model, with intervals that cover all of ``rho`` if it is not measured."""
    best, size = law.optimal_federated(flops, clients, rho.value), law.interval_of_size(flops, clients, rho.value)
    params, own = best.params, best.tokens
    # With fewer tokens than the law would use, the remaining compute goes into size.
    is_scarce = tokens is not None and tokens < best.tokens and not isinstance(law, RepeatedData)
    if tokens is not None and is_scarce:
        params, own = flops / (law.flops_per * tokens * clients), tokens
    loss = law.interval_of_loss(params, own, clients, rho.value)
    is_open = clients != law.own_clients and rho.low < rho.high and not law.knows_clients
    if is_open and not (rho.is_measured and law.refits):  # each refit has its own rho
        ends = rho.low, rho.high
        size = _over([law.interval_of_size(flops, clients, end) for end in ends], size)
        loss = _over([law.interval_of_loss(params, own, clients, end) for end in ends], loss)
    if is_scarce:
        size = Interval(size.value, math.nan, math.nan)
    return _Best(params, own, size, loss, (rho.low, rho.high) if is_open else (rho.value, rho.value))


def _over(intervals: Sequence[Interval], middle: Interval) -> Interval:
    """Return the interval that covers all values and ends of several intervals."""
    found = [number for each in intervals for number in each if math.isfinite(number)]
    return Interval(middle.value, min(found), max(found)) if found else middle


def _fields_of(best: _Best, made: MadeFor) -> dict[str, Any]:
    """Return the plan's fields of the best model; its size is also a value of the module's argument."""
    size, low, high = (made.size_of(each) for each in (best.params, best.size.low, best.size.high))
    return {
        "params": best.params,
        "params_low": _finite(best.size.low),
        "params_high": _finite(best.size.high),
        "tokens_per_client": best.tokens,
        "loss": _finite(best.loss.value),
        "loss_low": _finite(best.loss.low),
        "loss_high": _finite(best.loss.high),
        "rho_low": best.rho[0],
        "rho_high": best.rho[1],
        "argument": None if size is None else made.argument,
        "size": None if size is None else size.value,
        "size_low": None if low is None else low.value,
        "size_high": None if high is None else high.value,
        "size_between": None if size is None else size.between,
    }


def _contradicted(made: MadeFor, flops: float, clients: int, predicted: float) -> list[str]:
    """Return a note if the best run at this compute has another loss than the plan."""
    best = made.best_at(flops, clients)
    if best is None or not predicted > 0 or abs(math.log(best.loss / predicted)) <= CONTRADICTED:
        return []
    return [
        f"the law predicts a loss of {predicted:.4g}, and the best run at this compute measured {best.loss:.4g}, with"
        f" {best.params:,.0f} parameters"
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
