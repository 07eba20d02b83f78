"""Values logged by the clients of several ranks, merged by name in the round's own collective."""

from __future__ import annotations

import json
import zlib
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _get_default_dtype,
    _Metadata,
    _ResultMetric,
    _Sync,
)
from torch import Tensor

from lightning_fedscale.types import FloatArray
from lightning_fedscale.utils import collectives

_ROOM = 1024  # numbers for new names, 4 bytes each, enough for hundreds; more names take a separate collective
_META = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip


class _Part(NamedTuple):
    """The values that a rank's clients logged under a name in a round; all zeros if none.

    Attributes:
        logged: 1 if they logged the name.
        value: their contribution to Lightning's sum, or their extreme.
        weight: number of samples in a mean.
        step: the last local batch's value.
        client: one more than the client that logged ``step``; 0 if there is no such value.
    """

    logged: float = 0.0
    value: float = 0.0
    weight: float = 0.0
    step: float = 0.0
    client: float = 0.0


class RankLog:
    """Makes Lightning's results of clients' logs the same on every rank, with the same names in the same order.

    At the end of an epoch, Lightning on each rank reduces the names that the rank has. Here ranks train different
    clients, which may log different names, and a rank may have no client. Therefore each rank's contributions of a
    round are sent with the round's table, by names that all ranks have agreed on; new names are sent as text with it.
    Afterwards every rank holds the value over all clients, which is the value in a single process, and Lightning has
    nothing left to reduce. Values logged without ``sync_dist=True`` stay local to each rank. torchmetrics objects
    reduce themselves if every rank calls them, which this class ensures.

    Lightning: a `_ResultMetric` has a `_Metadata` with a `_Sync`, whose `_should` says whether ranks are reduced; its
    value, `_forward_cache`, `_update_count` and `_computed` are what it has added up, in the precision of
    `_get_default_dtype`. There is no public way to give a result a value, or a rank a name that it has not logged.
    Upgrade: `trainer/connectors/logger_connector/result.py`, and `Metric.compute` of torchmetrics in `metric.py`.

    Args:
        module: the module that logs.
        results: Lightning's collection of its results.
        ranks: number of processes.
        rank: this process.
    """

    def __init__(self, module: pl.LightningModule, results: Any, ranks: int, rank: int) -> None:
        self._module = module
        self._results = results
        self._ranks = ranks
        self._rank = rank
        self._agreed: dict[str, dict[str, Any]] = {}  # by key of the result: the arguments to make it
        self._before: dict[str, tuple[int, Any, Any]] = {}
        self._news: list[Any] = []

    @property
    def size(self) -> int:
        """The number of values that `pack` returns in this round; the same on every rank."""
        return self._ranks * (1 + _ROOM + len(_Part._fields) * len(self._agreed)) if self._ranks > 1 else 0

    def open_round(self) -> None:
        """Record the results before the clients train; they are the same on every rank."""
        self._before = {key: _state(result) for key, result in self._results.items()} if self._ranks > 1 else {}

    def pack(self, clients: dict[str, int]) -> FloatArray:
        """Return the values logged by this rank's clients in its part of an array of zeros that is summed over ranks.

        Args:
            clients: the client that logged the last value, by key of the result.
        """
        rows = np.zeros((self._ranks, self.size // self._ranks))
        parts = self._parts(clients)
        self._news = [[self._made_of(key), list(part)] for key, part in parts.items() if key not in self._agreed]
        text = zlib.compress(json.dumps(self._news).encode()) if self._news else b""
        row = rows[self._rank]
        row[0] = len(text)
        if len(text) <= 4 * _ROOM:
            numbers = np.frombuffer(text + b"\0" * (-len(text) % 4), dtype="<u4")
            row[1 : 1 + len(numbers)] = numbers
        known = row[1 + _ROOM :].reshape(-1, len(_Part._fields))
        for place, key in enumerate(self._agreed):
            if key in parts:
                known[place] = parts[key]
        return rows.ravel()

    def merge(self, total: FloatArray) -> None:
        """Set the results from the sum of all ranks' `pack`; call this on all ranks."""
        rows = total.reshape(self._ranks, -1)
        width = len(_Part._fields)
        parts = {
            key: [_Part(*row[1 + _ROOM + place * width :][:width]) for row in rows]
            for place, key in enumerate(self._agreed)
        }
        for rank, news in enumerate(self._texts(rows)):
            for made_of, numbers in news:
                key = made_of["key"]
                self._agreed.setdefault(key, made_of)
                parts.setdefault(key, [_Part()] * self._ranks)[rank] = _Part(*numbers)
                if not any(part.logged for part in parts[key][:rank]):  # the same order everywhere
                    self._results[key] = self._results.pop(key, None) or self._new(made_of)
        for key, of_ranks in parts.items():
            logged = [part for part in of_ranks if part.logged]
            if logged:
                self._show(key, logged)

    def _texts(self, rows: FloatArray) -> list[Any]:
        lengths = rows[:, 0].astype(int).tolist()
        if max(lengths) > 4 * _ROOM:
            return collectives.gather_over_ranks(self._news, self._module.device)
        texts = [row[1 : 1 + _ROOM].astype("<u4").tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]
        return [json.loads(zlib.decompress(text)) if text else [] for text in texts]

    # ---- on this rank

    def _parts(self, clients: dict[str, int]) -> dict[str, _Part]:
        """Return the values of every joint result that has changed since `open_round`."""
        tensors: list[Tensor] = []
        found: list[tuple[str, int]] = []
        for key, result in self._results.items():
            count, value, weight = self._before.get(key, (0, None, 0))
            if not _is_joint(result) or result.has_reset or result._update_count == count:
                continue
            if value is None or result._update_count < count:  # it was reset before or since then
                value, weight = 0.0, 0
            meta, step = result.meta, result._forward_cache
            added: Any = 0.0
            if result.is_tensor and meta.on_epoch:
                extreme = meta.is_max_reduction or meta.is_min_reduction
                after, value = result.value.double(), 0.0 if extreme else value
                added = torch.where(after == value, torch.zeros_like(after), after - value)  # infinity stays infinity
            weight = result.cumulated_batch_size - weight if result.is_tensor and meta.is_mean_reduction else 0
            has_step = meta.on_step and isinstance(step, Tensor) and step.numel() == 1
            for number in (added, weight, step.detach().reshape(()) if has_step else 0.0):
                tensors.append(torch.as_tensor(number, dtype=torch.float64, device=self._module.device))
            found.append((key, 1 + clients[key] if has_step else 0))
        numbers = torch.stack(tensors).reshape(-1, 3).tolist() if tensors else []
        return {
            key: _Part(1.0, added, weight, step, float(client))
            for (key, client), (added, weight, step) in zip(found, numbers, strict=True)
        }

    def _made_of(self, key: str) -> dict[str, Any]:
        """Return the primitives from which another rank makes the same result."""
        result = self._results[key]
        meta = result.meta
        return {
            **{name: getattr(meta, name) for name in _META},
            "key": key,
            "reduce_fx": meta.reduce_fx.__name__,
            "is_tensor": result.is_tensor,
            "wide": result.is_tensor and _dtype_of(result) is torch.float64,
            "sync": meta.sync.should,
        }

    def _new(self, made_of: dict[str, Any]) -> _ResultMetric:
        """Make a result that other ranks have, as Lightning would if the name were logged here."""
        meta = _Metadata(reduce_fx=made_of["reduce_fx"], **{name: made_of[name] for name in _META})
        meta.sync = _Sync(_should=made_of["sync"], fn=self._module.trainer.strategy.reduce)
        result = _ResultMetric(meta, made_of["is_tensor"]).to(self._module.device)
        if not result.is_tensor:
            result.value = self._module.get_submodule(made_of["metric_attribute"])
        return result

    def _show(self, key: str, logged: list[_Part]) -> None:
        """Set a result to its value over all ranks."""
        result, meta = self._results[key], self._results[key].meta
        device, wide = self._module.device, self._agreed[key]["wide"]
        dtype = torch.float64 if wide else _get_default_dtype()
        count, value, weight = self._before.get(key, (0, None, 0))
        last = max(logged, key=lambda part: part.client)
        if last.client:
            result._forward_cache = torch.tensor(last.step, dtype=dtype, device=device)
        result._update_count = max(result._update_count, count + 1)
        result.has_reset, result._computed = False, None
        if not result.is_tensor:
            return
        if not meta.on_epoch:
            result.value = result._forward_cache
            return
        values = [part.value for part in logged]
        if meta.is_max_reduction or meta.is_min_reduction:
            total = (max if meta.is_max_reduction else min)([*values, *([] if value is None else [float(value)])])
        else:
            total = sum(values, 0.0 if value is None else float(value))
        result.value = torch.tensor(total, dtype=dtype, device=device)
        result._computed = result.value  # already reduced
        if meta.is_mean_reduction:
            samples = int(weight) + sum(int(part.weight) for part in logged)  # whole, or the mean would be float64
            result.cumulated_batch_size = torch.tensor(samples, device=device)
            result._computed = result.value / result.cumulated_batch_size


def _is_joint(result: _ResultMetric) -> bool:
    """Return whether a result must be the same on all ranks."""
    sync = result.meta.sync
    return not result.is_tensor or (sync.should and sync.group is None and not sync.rank_zero_only)


def _dtype_of(result: _ResultMetric) -> torch.dtype:
    value = result.value if result.meta.on_epoch else result._forward_cache
    return value.dtype if isinstance(value, Tensor) else _get_default_dtype()


def _state(result: _ResultMetric) -> tuple[int, Any, Any]:
    """Return a result's number of updates, value and number of samples; empty after a reset."""
    if not result.is_tensor:
        return result._update_count, None, 0
    if result.has_reset:
        return 0, None, 0
    return result._update_count, result.value, getattr(result, "cumulated_batch_size", 0)
