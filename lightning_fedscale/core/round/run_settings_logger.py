"""What loggers get of every federated run: its settings, its partition, and the layout of its curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_fedscale.core.lightning.loggers import (
    FIRST,
    Layout,
    add_hparams,
    lay_out,
    log_settings,
    show,
    shows_figures,
)
from lightning_fedscale.core.lightning.trainer_state import metric_stores
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.core.options.settings import EXECUTOR_CHOSEN, is_detail, settings_of
from lightning_fedscale.partitioners import (
    FinishedPartitioner,
    Partition,
    Partitioner,
    known_labels,
    plot_label_distributions,
)
from lightning_fedscale.types import NAMESPACES
from lightning_fedscale.utils.fairness import part_of_spread

_MOST_CLIENTS, _MOST_LABELS, _MOST_SAMPLES = 200, 100, 2_000_000
"""Limits of the figure of labels: clients that it shows, labels and samples above which it is left out."""

_COMPARED = (
    "round/loss", "round/simulated_total", "round/epsilon", "compute/flops_total", "compute/params",
    "compute/size_ratio", "compute/excess_loss", "probe/max_batch",
)  # fmt: skip
"""The metrics by which runs of a sweep are compared, besides the user's own."""


class RunSettingsLogger(Callback):
    """Logs the run's settings when it begins, and its HParams once the first metrics are known.

    Args:
        options: the strategy's checked arguments.
        chosen: returns the executor of all further rounds and the reason; None before it is chosen.
    """

    def __init__(self, options: Options, chosen: Callable[[], tuple[str, str] | None]) -> None:
        self._options = options
        self._chosen = chosen
        self._validated = self._compared = self._executor_known = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log settings, layout and labels, now that the data is divided and the model is built."""
        # As a search for a learning rate may have left them.
        self._validated = self._compared = self._executor_known = False
        if not trainer.loggers:
            return
        partition: Partition | None = trainer.strategy.partition  # type: ignore[attr-defined]
        if partition is None:
            return
        params = sum(p.numel() for p in pl_module.parameters())
        log_settings(trainer, settings_of(self._options, partition, params))
        self._log_executor(trainer)
        lay_out(trainer, self._layout())
        if trainer.global_step == 0 and shows_figures(trainer):
            self._show_labels(trainer, partition)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the metrics of validation are known from the next round on."""
        self._validated = self._validated or not trainer.sanity_checking

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Log the executor once it is chosen, and HParams after the first epoch, so that interrupted runs have them."""
        self._log_executor(trainer)
        if trainer.current_epoch > 0 and (self._validated or not trainer.enable_validation):
            self._compare(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log HParams of a run with a single epoch too."""
        self._compare(trainer)

    def _log_executor(self, trainer: pl.Trainer) -> None:
        """Log the chosen executor and the reason, once: loggers may refuse another value."""
        if not self._executor_known and trainer.loggers and (chosen := self._chosen()) is not None:
            self._executor_known = True
            log_settings(trainer, dict(zip(EXECUTOR_CHOSEN, chosen, strict=True)))

    def _compare(self, trainer: pl.Trainer) -> None:
        if self._compared:
            return
        self._compared = True
        if trainer.loggers:
            # Not `logged_metrics`, which would reduce again.
            known = metric_stores(trainer).logged
            logged = {name: float(value) for name, value in known.items() if isinstance(value, Tensor | float)}
            names = [*filter(_is_compared, logged), *(name for name in _to_come(trainer) if name not in logged)]
            users_first = sorted(names, key=lambda name: name in _COMPARED)
            add_hparams(trainer, {name: logged.get(name, math.nan) for name in users_first}, is_detail)

    def _layout(self) -> Layout:
        options, simulates = self._options, self._options.population is not None
        charts: dict[str, list[Any]] = {
            "loss": ["Multiline", ["round/loss$"]],
            "update norm": ["Multiline", ["round/delta_norm$"]],
            "client drift": ["Multiline", ["round/drift$"]],
            "traffic in bytes": ["Multiline", ["round/upload_bytes$", "round/download_bytes$"]],
            "clients": ["Multiline", ["round/clients$", "round/rejected$", *(["round/dropped$"] if simulates else [])]],
            "round time": ["Multiline", ["round/seconds$", *(["round/simulated_seconds$"] if simulates else [])]],
            "idle time and padding": ["Multiline", ["round/padding$", "round/idle$"]],
        }
        if options.algorithm.privacy is not None:
            charts["privacy spent"] = ["Multiline", ["round/epsilon$"]]
        if options.asynchrony is not None:
            charts["staleness in rounds"] = ["Multiline", ["round/staleness$"]]
        layout: Layout = {FIRST: charts}
        if options.client_log_every_n is not None:
            layout["Clients' batches"] = {"values logged by clients": ["Multiline", ["client/"]]}
        return layout

    def _show_labels(self, trainer: pl.Trainer, partition: Partition) -> None:
        """Show the partition's labels, if they can be read without reading samples."""
        given = self._options.partitioner
        column = given.partition_by if isinstance(given, Partitioner) else None
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        labels = known_labels(dataset, column)
        if labels is None or labels.dtype.kind not in "iubUS" or len(labels) > _MOST_SAMPLES:
            return
        if len(set(labels.tolist())) > _MOST_LABELS:
            return
        holder = FinishedPartitioner(partition, column)
        holder.dataset = dataset
        shown = min(_MOST_CLIENTS, partition.num_clients)
        of_all = "" if shown == partition.num_clients else f" of {partition.num_clients:,}"
        # One bar for each of hundreds of clients would take seconds.
        figure, _, _ = plot_label_distributions(
            holder, plot_type="heatmap", max_num_partitions=shown, legend=True, legend_title="samples",
            title=f"Labels of {shown}{of_all} clients",
        )  # fmt: skip
        show(trainer, "client/labels", figure)


def _to_come(trainer: pl.Trainer) -> Iterator[str]:
    """Yield metrics that callbacks may log later: the page's columns are those that a run has at first."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (names := getattr(type(callback), "metrics_to_come", None)) is not None:  # a mock has every attribute
            yield from names(callback)


def _is_compared(name: str) -> bool:
    if (of_clients := part_of_spread(name)) is not None:
        return of_clients[1] in ("mean", "worst10")
    return name in _COMPARED or name.partition("/")[0] not in NAMESPACES
