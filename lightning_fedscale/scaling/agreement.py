"""Compare a request to a law with the runs that the law was fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.doubts import REPEATED
from lightning_fedscale.scaling.made_for import MadeFor
from lightning_fedscale.scaling.partition_id import PartitionId
from lightning_fedscale.scaling.rho import UNMEASURED, Rho


def check_clients(law: Law, clients: int, rho: Rho) -> None:
    """Check that the law can predict for this number of clients.

    Raises:
        ValueError: if all runs had the same number of clients, ``clients`` differs from it, and ``rho`` is neither
            measured nor passed.
    """
    own, recorded = law.own_clients, law.made_for.clients
    if clients == own or rho != UNMEASURED or law.knows_clients or len(recorded) > 1 or not (recorded or own > 1):
        return
    raise ValueError(
        f"clients={clients}: all runs of this law had {own}, so the cost of another number (rho) is unknown. Pass"
        f" clients={own}, or rho= (a number, or the ends of an interval, such as (0, 1)), or measure it by a sweep of"
        f" several numbers: fedscale sweep --clients '[{own},{clients}]'."
    )


class Agreement(NamedTuple):
    """How a request to a law agrees with the law's runs.

    Attributes:
        others: requested values that differ from those of the runs, in words, by name.
        unknown: requested values that the runs do not record, in words, by name.
        made_for: how the runs trained.
        passes: notes on the passes over the data, if there are too many.
    """

    others: dict[str, str]
    unknown: dict[str, str]
    made_for: MadeFor
    passes: list[str]

    @property
    def is_same_task(self) -> bool:
        """Whether method and partition, which change the best size, are not known to differ."""
        return not {"method", "partition"} & set(self.others)

    @property
    def notes(self) -> list[str]:
        """A sentence each on what differs, what is not known, and too many passes."""
        found, others = list[str](), list(self.others.values())
        if others:
            found.append(
                f"the law was fitted to runs with {self.made_for}, and may not hold for {' and '.join(others)}; fit"
                " another one with fedscale sweep"
            )
        if self.unknown:
            what, of = " or ".join(self.unknown), " and ".join(self.unknown.values())
            found.append(f"the law's runs do not record their {what}, so whether it holds for {of} is not known")
        return found + self.passes


def agreement(
    law: Law,
    *,
    clients: int | None = None,
    method: str | Mapping[str, Any] | None = None,
    partition: PartitionId | None = None,
    batch_size: int | None = None,
    local_steps: int | None = None,
    passes: float | None = None,
) -> Agreement:
    r"""Compare a request with a law's runs; an argument that is None is not compared.

    Args:
        law: the law.
        clients: clients that train in a round.
        method: name of the method, or its options by name (`FederatedStrategy.method`).
        partition: the partition of the data.
        batch_size: a client's batch size, in samples.
        local_steps: batches that a client trains on in a round.
        passes: passes over the data.

    Example:
        >>> from lightning_fedscale.scaling import Chinchilla
        >>> law = Chinchilla(made_for=MadeFor(method="scaffold", clients=(8,), local_steps=5))
        >>> found = agreement(law, method="fed_avg", local_steps=5, partition=PartitionId("iid"))
        >>> print(*found.notes, sep="\n")
        the law was fitted to runs with scaffold, 8 clients, 5 local steps, and may not hold for method='fed_avg'; fit
        another one with fedscale sweep
        the law's runs do not record their partition, so whether it holds for partition='iid' is not known
        >>> found.is_same_task
        False
    """
    made, others, unknown = law.made_for, dict[str, str](), dict[str, str]()
    if clients is not None and made.clients and clients not in made.clients:
        others["clients"] = f"clients={clients}"
    for name, value in {"batch_size": batch_size, "local_steps": local_steps}.items():
        if value is not None and getattr(made, name) not in (None, value):
            others[name] = f"{name}={value!r}"
    if isinstance(method, str):
        if method != made.method:
            (others if made.method else unknown)["method"] = f"method={method!r}"
    elif method is not None and made.rules is None:
        unknown["method"] = "this one"
    elif method is not None and made.rules is not None:
        rules = made.rules
        if parts := [f"{name}={value!r}" for name, value in method.items() if rules.get(name) != value]:
            others["method"] = " with ".join(parts)
    if partition is not None:
        is_same = _is_same(made, partition)
        if is_same is None:
            unknown["partition"] = f"partition={str(partition)!r}"
        elif not is_same:
            others["partition"] = f"partition={str(partition)!r}" + _named(partition)
    return Agreement(others, unknown, made, too_many_passes(law, passes))


def too_many_passes(law: Law, passes: float | None) -> list[str]:
    """Return a note if there are more passes over the data than the law was made for.

    Example:
        >>> from lightning_fedscale.scaling import Chinchilla
        >>> print(*too_many_passes(Chinchilla(made_for=MadeFor(passes=(1.0, 3.0), samples=3000)), 48.0))
        48 passes over 3,000 samples, and the law's runs had at most 3; fit law='RepeatedData', or get more data
    """
    made, remedy = law.made_for, "get more data"
    if "unique_tokens" not in law.columns:
        remedy = f"fit law='RepeatedData', or {remedy}"
    over = "the data" if made.samples is None else f"{made.samples:,} samples"
    if passes is None:
        return []
    if made.passes is not None and passes > 1.05 * max(1.0, made.passes[1]):
        return [f"{passes:.3g} passes over {over}, and the law's runs had at most {made.passes[1]:.3g}; {remedy}"]
    if passes > REPEATED and "unique_tokens" not in law.columns:
        return [f"{passes:.3g} passes over {over}: a law of unlimited data does not hold beyond {REPEATED:g}; {remedy}"]
    return []


def _is_same(made: MadeFor, given: PartitionId) -> bool | None:
    """Return whether the partition is that of the runs; None if that is not known."""
    if given.fingerprint is not None and made.fingerprint is not None:
        return given.fingerprint == made.fingerprint
    if given.name is None or made.partition is None:
        return None
    return given.name == made.partition


def _named(given: PartitionId) -> str:
    return "" if given.name is None or given.fingerprint is None else f" ({given.fingerprint[:8]})"
