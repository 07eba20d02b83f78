"""Values logged in local training, collected on the device and passed to Lightning's own results once a round."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any, TypeAlias

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_fedscale.core.lightning.hooks import as_it_was
from lightning_fedscale.core.lightning.log_ranks import RankLog
from lightning_fedscale.core.lightning.log_series import LogSeries, is_single, read_numbers, step_value
from lightning_fedscale.core.lightning.module_state import current_hook, in_hook
from lightning_fedscale.core.lightning.snapshots import MetricStates, ResultsBefore
from lightning_fedscale.core.lightning.step_points import StepPoints

_MOST_WAITING = 8192  # values that wait on the device before they are read, to bound memory

_OPTIONS: dict[str, Any] = {
    "prog_bar": False,
    "logger": None,
    "on_step": None,
    "on_epoch": None,
    "reduce_fx": "mean",
    "enable_graph": False,
    "sync_dist": False,
    "sync_dist_group": None,
    "add_dataloader_idx": True,
    "metric_attribute": None,
    "rank_zero_only": False,
}
"""The arguments of ``self.log`` that determine what happens to a value, and their defaults."""

_Key: TypeAlias = tuple[str | None, str, Hashable, tuple[Any, ...]]
"""Hook, name, type of value, options."""


class ClientLog:
    """Stands in for ``module.log`` while the clients of a rank train.

    Lightning takes longer to log one value than to step a small model. Therefore only the first call for each hook,
    name and set of options goes through it, so that errors point to the user's line. Later values wait as tensors and
    are read from the device all at once, when the round ends or the Trainer's metrics are read. Names, step values (the
    round's last), epoch values and where they are shown are Lightning's own.

    Lightning: `_results` of the epoch loop holds the results that `self.log` adds to, and `_extract_batch_size` finds a
    batch's size. Its `_logger_connector` records the running hook as `_current_fx`, and as `_first_loop_iter` whether
    values of an earlier epoch are left. The public way, `self.log`, takes one value at a time and costs more than a
    step.
    Upgrade: `LightningModule.log` in `core/module.py`, and `trainer/connectors/logger_connector/result.py`.

    Args:
        trainer: the Trainer, about to fit.
        ranks: number of processes.
        every_n: also send the step values of every n-th local batch to the loggers, as ``client/...`` over local
            batches.

    Attributes:
        position: number of the current local batch within the rank's round, set by the executor.
        points: step values for the loggers.
        joint: merges the values of all ranks.
    """

    def __init__(self, trainer: pl.Trainer, every_n: int | None = None, ranks: int = 1) -> None:
        self.position = 0
        self.points = StepPoints(trainer, every_n)
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._connector = trainer._logger_connector
        self._results: Any = trainer.fit_loop.epoch_loop._results
        self.joint = RankLog(self._module, self._results, ranks, trainer.global_rank)
        self._series: dict[str, LogSeries] = {}
        self._known: dict[_Key, LogSeries] = {}
        self._waiting = 0
        self._silent = False
        self._before = ResultsBefore(self._results)
        self._clients: dict[int, int] = {}  # keys: number of their first local batch within the rank's round

    # ---- the clients of a round

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect values logged inside the context, for the clients of one round; drop waiting values on failure."""
        self._forget()
        self._clients = {}
        self._before = ResultsBefore(self._results)
        self.joint.open_round()
        fields, results, look = vars(self._module), vars(self._results), self._results.metrics
        # A custom `log` may do anything, so it stays.
        stands_in = "log" not in fields and type(self._module).log is pl.LightningModule.log

        def look_now(on_step: bool) -> Any:
            self.flush()
            return look(on_step)

        results["metrics"] = look_now
        if stands_in:
            fields["log"] = _StandIn(self.log, self._module.log)
        try:
            yield
            self.flush()
        except BaseException:
            self._forget()
            raise
        finally:
            del results["metrics"]
            if stands_in:
                del fields["log"]

    def undo(self) -> None:
        """Discard what clients logged since the round began."""
        self._forget()
        for key in self._before.restore():
            if (series := self._series.pop(key, None)) is not None:
                self._known = {known: each for known, each in self._known.items() if each is not series}

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Discard values logged inside the context, and restore metrics afterwards."""
        fields, metrics = vars(self._module), MetricStates(self._module)
        around = fields.get("log")
        fields["log"] = _nothing
        self._silent = True
        try:
            yield
        finally:
            self._silent = False
            metrics.restore()
            if around is None:
                del fields["log"]
            else:
                fields["log"] = around

    def place(self, client: int, position: int) -> None:
        """Set the position within the rank's round from which the client's local batches are numbered."""
        self._clients[position] = client

    def last_clients(self) -> dict[str, int]:
        """Return the client that logged each name last in this round, by the key of Lightning's result."""
        starts = sorted(self._clients)
        last = defaultdict(lambda: self._clients[starts[-1]])  # for values that only Lightning saw
        for key, series in self._series.items():
            if series.latest >= 0:
                last[key] = self._clients[starts[bisect_right(starts, series.latest) - 1]]
        return last

    def start_batch(self, batch: Any) -> None:
        """Start a local batch outside of the Trainer's own loop; its size is inferred if needed."""
        # As Lightning's own `on_batch_start` does, which looks for both objects again every time.
        self._connector._first_loop_iter = False
        self._results.batch, self._results.batch_size, self._results.dataloader_idx = batch, None, None

    # ---- values come in

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a value; see `LightningModule.log`."""
        hook = current_hook(self._module)
        options = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
            add_dataloader_idx, metric_attribute, rank_zero_only,
        )  # fmt: skip
        key = hook, name, _kind(value), options
        series = self._find(key)
        if series is None or not is_single(value) or type(batch_size) not in (int, NoneType):
            series = self._through_lightning(key, value, batch_size, self.position)
        else:
            self._enter(series.hook)
            if isinstance(value, Metric):
                series.show(value, self.position)
            else:
                value = value.detach().clone() if isinstance(value, Tensor) else float(value)
                series.add(self.position, value, self._size(series, batch_size))
                self._count(1)
        if series is None or not series.is_step or not self.points.is_due(self.position):
            return
        if (number := step_value(value)) is not None:
            self.points.pick(series.name, [self.position], number)

    def add_stacked(
        self,
        name: str,
        values: Tensor,
        batch_sizes: Sequence[int],
        options: Mapping[str, Any],
        hook: str = "training_step",
        *,
        positions: Sequence[int],
    ) -> None:
        """Add values that several local batches logged at once, as in a vectorized step.

        Args:
            name: the logged name.
            values: one value for each of the local batches.
            batch_sizes: the weight of each batch in a mean.
            options: the other arguments of ``self.log`` that differ from their defaults.
            hook: the hook in which it was logged.
            positions: number of each local batch within the rank's round, client by client. The value of the round's
                last batch becomes the step value, and sums are taken in this order.
        """
        if self._silent:
            return
        # Several batches are not the epoch's first batch, in which Lightning resets values of other hooks.
        self._connector._first_loop_iter = False
        values, places, sizes = values.detach(), list(positions), list(batch_sizes)
        key = hook, name, values.dtype, tuple({**_OPTIONS, **options}[option] for option in _OPTIONS)
        series, start = self._find(key), 0
        if series is None:
            with in_hook(self._module, hook):
                series, start = self._through_lightning(key, values[0], sizes[0], places[0]), 1
        if series is None:
            return
        if series.is_step and any(map(self.points.is_due, places)):
            self.points.pick(series.name, places, values)
        if places := places[start:]:
            series.add_many(places, values[start:], sizes[start:])
            self._count(len(places))

    def add_metric(
        self, name: str, metric: Metric, options: Mapping[str, Any], hook: str = "training_step", *, position: int = 0
    ) -> None:
        """Log a torchmetrics object that several local batches updated, the last one at ``position``."""
        if self._silent:
            return
        self.position = position
        with in_hook(self._module, hook):
            self.log(name, metric, **options)

    def _find(self, key: _Key) -> LogSeries | None:
        try:
            return self._known.get(key)
        except TypeError:  # an unhashable option, which Lightning checks
            return None

    def _through_lightning(self, key: _Key, value: Any, batch_size: int | None, position: int) -> LogSeries | None:
        """Log through Lightning; return the series for later values of this kind, None if they must come here too."""
        hook, name, _, given = key
        options = dict(zip(_OPTIONS, given, strict=True))
        self.flush()
        pl.LightningModule.log(self._module, name, value, batch_size=batch_size, **options)
        result = self._results.get(f"{hook}.{name}")
        if result is None or options["enable_graph"]:
            return None
        series = self._series.setdefault(f"{hook}.{name}", LogSeries(result))
        series.latest = position
        try:
            self._known[key] = series
        except TypeError:
            return None
        return series

    def _enter(self, hook: str) -> None:
        """Reset the results at a hook's first value in an epoch's first batch, as Lightning does."""
        if self._connector._first_loop_iter is not False and self._connector.should_reset_tensors(hook):
            self.flush()
            self._results.reset(metrics=False, fx=hook)
        self._connector._current_fx = hook

    def _size(self, series: LogSeries, given: int | None) -> int:
        if given is not None:
            return given
        if not series.is_mean:
            return 1
        size: int | None = self._results.batch_size  # found before in this batch
        return self._results._extract_batch_size(series.result, None, series.result.meta) if size is None else size

    def _count(self, number: int) -> None:
        self._waiting += number
        if self._waiting >= _MOST_WAITING:
            self.flush()

    # ---- values go out

    def flush(self) -> None:
        """Pass all waiting values to Lightning and to the loggers' points, with a single read from the device."""
        full = [series for series in self._series.values() if series.positions]
        picked, self._waiting = self.points.take(), 0
        if not full and not picked:
            return
        device = self._module.device
        values = [value for series in full for value in (series.result.value, *series.values)]
        numbers = read_numbers([*values, *(each.value for each in picked)], device)
        for series in full:
            start, mine, numbers = np.split(numbers, [1, 1 + len(series.positions)])
            series.hand_over(start, mine, device)
        self.points.place(picked, numbers)

    def _forget(self) -> None:
        self.position, self._waiting = 0, 0
        self.points.drop()
        for series in self._series.values():
            series.drop()
            series.latest = -1


class _StandIn:
    """Replaces ``module.log`` while clients train; copying or pickling the module restores its own."""

    def __init__(self, log: Callable[..., None], own: Callable[..., None]) -> None:
        self._log = log
        self._own = own

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._log(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return as_it_was, (self._own,)


def _kind(value: Any) -> Hashable:
    """Return a key; a value need not be checked again if Lightning has seen one with the same key."""
    if isinstance(value, Tensor):
        return value.dtype
    kind: Any = id(value) if isinstance(value, Metric) else type(value)
    return kind  # type: ignore[no-any-return]


def _nothing(*values: Any, **options: Any) -> None:
    """Replace ``log`` while logged values are discarded."""
