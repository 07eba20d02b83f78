"""The settings that runs had in common: a law that was fitted to these runs is made for them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lightning_fedscale.scaling.partition_id import is_fingerprint
from lightning_fedscale.scaling.selection import values_of
from lightning_fedscale.scaling.tuning import NOT_RECORDED, SAME
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(
    __name__,
    {
        "Given": "lightning_fedscale.scaling.partition_id.PartitionId",
        "partition_given": "lightning_fedscale.scaling.partition_id.partition_id",
        "mixed": "lightning_fedscale.scaling.selection.mixed_settings",
        "only": "lightning_fedscale.scaling.selection.select",
    },
)

_IN_COMMON = (
    "partition", "partition_name", "fingerprint", "method", "batch_size", "local_steps", "optimizer", "samples",
    "argument", "rules",
)  # fmt: skip
"""Columns that count only if all runs have the same value."""
_ALIKE = 1.01
"""Largest factor by which the parameters of models of the same size may differ."""


class Best(NamedTuple):
    """The run with the least loss among those with the same compute and number of clients.

    Attributes:
        flops: compute of all clients together.
        clients: number of clients that trained in a round.
        params: model size, in parameters.
        loss: measured loss.
    """

    flops: float
    clients: int
    params: float
    loss: float


class Size(NamedTuple):
    """A model's size as the value of its argument.

    Attributes:
        value: value of the argument, rounded if those of the runs are whole numbers.
        between: the neighbouring values of the runs; None if the value is one of theirs or beyond all of them.
        is_beyond: whether the value is smaller or larger than that of every run.
    """

    value: float
    between: tuple[float, float] | None = None
    is_beyond: bool = False


@dataclass(frozen=True)
class MadeFor:
    """How runs trained; fields that their table does not record, or that differ among runs, are None or empty.

    Attributes:
        partition: name of the partitioner or of the partition's file.
        fingerprint: fingerprint of the partition.
        mean_js_distance: mean Jensen-Shannon distance of clients' labels to all labels, 0 if they are equal.
        samples: samples in the data of all clients together.
        clients: numbers of clients that trained in a round, ascending.
        method: name of the method, as in a sweep or a study.
        rules: the method's options by name (`FederatedStrategy.method`).
        batch_size: a client's batch size, in samples.
        local_steps: batches that a client trained on in a round.
        tokens_per_sample: tokens per sample; 1 if samples are counted.
        optimizer: class of the clients' optimizer.
        learning_rate: whether the learning rate was tuned, in words.
        passes: smallest and largest number of passes over the data.
        argument: the module's argument that sets its size.
        sizes: values of the argument with the parameters of the model, ascending.
        best: the best run of each amount of compute and number of clients.
    """

    partition: str | None = None
    fingerprint: str | None = None
    mean_js_distance: float | None = None
    samples: int | None = None
    clients: tuple[int, ...] = ()
    method: str | None = None
    rules: Mapping[str, Any] | None = None
    batch_size: int | None = None
    local_steps: int | None = None
    tokens_per_sample: float | None = None
    optimizer: str | None = None
    learning_rate: str = NOT_RECORDED
    passes: tuple[float, float] | None = None
    argument: str | None = None
    sizes: tuple[tuple[float, float], ...] = ()
    best: tuple[Best, ...] = ()

    def __str__(self) -> str:
        """Describe it, such as "scaffold on partition hospitals.json, 8 clients, batch 32, 5 local steps"."""
        where = self.partition or (self.fingerprint or "")[:8]
        if self.partition and self.fingerprint:
            where += f" ({self.fingerprint[:8]})"
        first = " on ".join(filter(None, (self.method, where and f"partition {where}")))
        clients = " and ".join(f"{each:,}" for each in self.clients)
        parts = (
            first,
            clients and f"{clients} client{'' if self.clients == (1,) else 's'}",
            "" if self.batch_size is None else f"batch {self.batch_size:,}",
            ""
            if self.local_steps is None
            else f"{self.local_steps:,} local step{'' if self.local_steps == 1 else 's'}",
        )
        return ", ".join(filter(None, parts))

    @property
    def unknown(self) -> list[str]:
        """Names of the settings that are not recorded, or that differ among the runs."""
        names = ("partition", "method", "batch_size", "local_steps", "optimizer", "passes")
        missing = [name for name in names if getattr(self, name) is None]
        return [
            *(name for name in missing if name != "partition" or self.fingerprint is None),
            *([] if self.clients else ["clients"]),
        ]

    @property
    def unique_tokens(self) -> float | None:
        """Tokens in the data of all clients together."""
        return None if None in (self.samples, self.tokens_per_sample) else self.samples * self.tokens_per_sample  # type: ignore[operator]

    def size_of(self, params: float) -> Size | None:
        """Return the module's argument for ``params`` parameters; None if the runs do not determine it.

        Example:
            >>> made = MadeFor(argument="width", sizes=((8, 100), (16, 200), (32, 400)))
            >>> made.size_of(200), made.size_of(280).value, made.size_of(280).between
            (Size(value=16, between=None, is_beyond=False), 22, (16, 32))
        """
        if len(self.sizes) < 2 or not 0 < params < math.inf:
            return None
        values, counts = np.log(np.array(self.sizes, dtype=np.float64)).T
        at = math.log(params)
        place = int(np.clip(np.searchsorted(counts, at), 1, len(counts) - 1))
        slope = (values[place] - values[place - 1]) / (counts[place] - counts[place - 1])
        found = math.exp(values[place - 1] + slope * (at - counts[place - 1]))
        sizes = [value for value, _ in self.sizes]
        if is_whole := all(float(value).is_integer() for value in sizes):
            found = max(1, round(found))
        own = next((value for value in sizes if math.isclose(value, found, rel_tol=1e-6)), None)
        if own is not None:
            return Size(round(own) if is_whole else own)
        if not min(sizes) < found < max(sizes):
            return Size(found, is_beyond=True)
        low, high = sorted(sizes[place - 1 : place + 1])
        return Size(found, (low, high))

    def best_at(self, flops: float, clients: int) -> Best | None:
        """Return the best run with about this compute and with this number of clients."""
        near = [each for each in self.best if each.clients == clients and abs(math.log(each.flops / flops)) < SAME]
        return min(near, key=lambda each: each.loss, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        found = asdict(self)
        for name in ("clients", "sizes", "best"):
            found[name] = [list(each) if isinstance(each, tuple) else each for each in found[name]]
        found["passes"] = None if self.passes is None else list(self.passes)
        return {**found, "unknown": self.unknown}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any] | None) -> MadeFor:
        """Restore what `as_dict` returned; older files do not hold it, so that all fields keep their defaults."""
        known = {each.name for each in fields(cls)}
        found = {name: value for name, value in (given or {}).items() if name in known and value is not None}
        found["clients"] = tuple(found.get("clients", ()))
        found["sizes"] = tuple((value, params) for value, params in found.get("sizes", ()))
        found["best"] = tuple(Best(*each) for each in found.get("best", ()))
        if "passes" in found:
            found["passes"] = tuple(found["passes"])
        return cls(**found)


def made_for(table: pd.DataFrame, learning_rate: str = NOT_RECORDED, *, has_clients: bool = True) -> MadeFor:
    """Collect the settings that the runs of a table had in common.

    Args:
        table: table of `lightning_fedscale.scaling.runs.runs_to_fit`, with as many of a sweep's columns as there are.
        learning_rate: whether the learning rate was tuned, in words.
        has_clients: whether the original table had the column ``clients``.
    """
    one = {name: _one(table, name) for name in _IN_COMMON}
    partition, fingerprint = one["partition"], one["fingerprint"]
    if partition is not None and is_fingerprint(str(partition)):
        partition, fingerprint = None, fingerprint or partition
    batch = one["batch_size"]
    if batch == 0 or "batch_size" not in table:  # then the batch size of the data module counts
        batch = _one(table, "batch")
    passes, samples, apart = passes_of(table), _one(table, "samples"), _one(table, "mean_js_distance", np.mean)
    words = None
    if passes is not None and samples and "tokens" in table:
        words = float((table["tokens"] * table["clients"] / (passes * samples)).median())
    return MadeFor(
        partition=_text(one["partition_name"] or partition),
        fingerprint=_text(fingerprint),
        mean_js_distance=None if apart is None else float(apart),
        samples=_whole(samples),
        clients=tuple(sorted({int(each) for each in table["clients"]})) if has_clients else (),
        method=_text(one["method"]),
        rules=_parsed(one["rules"]),
        batch_size=_whole(batch),
        local_steps=_whole(one["local_steps"]),
        tokens_per_sample=words,
        optimizer=_text(one["optimizer"]),
        learning_rate=learning_rate,
        passes=None if passes is None else (float(passes.min()), float(passes.max())),
        argument=_text(one["argument"]),
        sizes=_sizes(table) if one["argument"] is not None else (),
        best=_best(table),
    )


def passes_of(table: pd.DataFrame) -> pd.Series[float] | None:
    """Return each run's passes over the data, from its column, from the data's samples, or from unique tokens."""
    if "passes" in table:
        passes = pd.to_numeric(table["passes"], errors="coerce")
    elif {"samples", "tokens", "clients"} <= set(table):
        passes = table["tokens"] * table["clients"] / pd.to_numeric(table["samples"], errors="coerce")
    elif {"unique_tokens", "tokens"} <= set(table):
        passes = table["tokens"] / pd.to_numeric(table["unique_tokens"], errors="coerce")
    else:
        return None
    return passes if len(passes) and passes.notna().all() else None


# ---- parts


def _one(table: pd.DataFrame, name: str, otherwise: Any = None) -> Any:
    """Return the value that all rows have in common; else ``otherwise`` of the values, or None."""
    found = values_of(table, name)
    if not found or table[name].isna().any():
        return None
    return found[0] if len(found) == 1 else None if otherwise is None else otherwise(found)


def _sizes(table: pd.DataFrame) -> tuple[tuple[float, float], ...]:
    """Return the argument's values with their parameters, if each value has one size and both increase."""
    if not {"size", "params"} <= set(table):
        return ()
    sizes = pd.to_numeric(table["size"], errors="coerce")
    groups = [(float(str(size)), params) for size, params in table["params"].groupby(sizes)]
    if any(params.max() > _ALIKE * params.min() for _, params in groups):
        return ()
    found = sorted((size, float(params.median())) for size, params in groups)
    grows = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(found))
    return tuple(found) if grows and found and found[0][0] > 0 else ()


def _best(table: pd.DataFrame) -> tuple[Best, ...]:
    """Return the best run of each amount of compute and number of clients; several seeds count as their mean."""
    if not {"params", "flops", "clients", "loss"} <= set(table):
        return ()
    means = table.assign(total=table["flops"] * table["clients"])
    # Seeds of one size and compute count as their mean.
    means["level"] = levels(means["total"], means["clients"])
    means = means.groupby(["clients", "level", "params"], as_index=False)[["total", "loss"]].mean()
    found: dict[tuple[int, int], Best] = {}
    for row in means.to_dict("records"):
        key = int(row["clients"]), int(row["level"])
        run = Best(float(row["total"]), key[0], float(row["params"]), float(row["loss"]))
        found[key] = min(found.get(key, run), run, key=lambda each: each.loss)
    return tuple(sorted(found.values()))


def levels(total: pd.Series[float], clients: pd.Series[float]) -> list[int]:
    """Rank the amounts of compute among runs with the same number of clients; return each run's rank, least first.

    Example:
        >>> levels(pd.Series([1e9, 8e9, 1.1e9, 0.99e9]), pd.Series([1, 1, 1, 2]))
        [0, 1, 0, 0]
    """
    found = np.zeros(len(total), dtype=int)
    for number in set(clients):
        places = np.flatnonzero(clients == number)
        logs = np.log(total.to_numpy(dtype=np.float64)[places])
        level, start = 0, -math.inf
        for place in np.argsort(logs, kind="stable"):
            if logs[place] - start > SAME:
                level, start = level + math.isfinite(start), logs[place]
            found[places[place]] = level
    return [int(each) for each in found]


def _whole(value: Any) -> int | None:
    return None if value is None or not float(value).is_integer() or value < 1 else int(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _parsed(value: Any) -> Mapping[str, Any] | None:
    """Read a mapping from JSON; None for anything else, such as a user's own column of the same name."""
    try:
        found = json.loads(value)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, dict) else None
