"""``fedscale partition``: show a partition of the data before training."""

from __future__ import annotations

import json as json_format
from typing import Any

import lightning.pytorch as pl
import numpy as np
from rich.console import Console
from rich.table import Table

from lightning_fedscale.cli.digits import Digits
from lightning_fedscale.cli.files import written
from lightning_fedscale.partitioners import (
    Partition,
    Partitioner,
    by_name,
    find_labels,
    gini,
    heterogeneity,
    label_counts,
    plot_label_distributions,
)
from lightning_fedscale.partitioners.encoding import encode_classes
from lightning_fedscale.partitioners.labels import Labels
from lightning_fedscale.study.loaders import train_loader
from lightning_fedscale.utils.checks import integer

_MOST_SHOWN = 20
"""Largest number of clients (rows) and of labels (columns) in the table."""

_MOST_LABELS = 1000
"""Values with more distinct classes than this are not treated as labels."""

_MOST_PLOTTED = 200


def partition(
    data: pl.LightningDataModule | None = None,
    partitioner: Partitioner | str = "dirichlet",
    clients: int | None = None,
    alpha: float | None = None,
    partition_by: str | None = None,
    seed: int | None = None,
    plot: str | None = None,
    save: str | None = None,
    json: bool = False,
) -> None:
    """Show how a partitioner divides the training data among clients, as numbers and as a figure.

    Args:
        data: class of the LightningDataModule, such as my_package.MyData; its arguments follow as --data.name. By
            default scikit-learn's digits.
        partitioner: a name such as 'iid', 'dirichlet' or 'natural_id'; a class with its arguments, --partitioner
            lightning_fedscale.partitioners.ShardPartitioner --partitioner.num_partitions 10; or the file of a saved
            partition.
        clients: number of clients, for a partitioner given by name; 10 by default.
        alpha: concentration of 'dirichlet'; smaller values give each client fewer labels; 0.5 by default.
        partition_by: column, key or attribute with the labels or ids, or their position if samples are tuples, for a
            partitioner given by name.
        seed: seed of a partitioner given by name; 42 by default.
        plot: file for a figure of the labels of each client.
        save: file for the partition, for Partition.load.
        json: print one JSON object instead of tables.
    """
    dataset = train_loader(None, Digits() if data is None else data).dataset
    options = {"alpha": alpha, "partition_by": partition_by, "seed": seed}
    made = partitioner
    if isinstance(made, str):
        wanted = None if clients is None else integer("clients", clients)
        made = by_name(made, wanted, **{name: value for name, value in options.items() if value is not None})
    made.dataset = dataset
    found = made.partition
    labels = _labels(dataset, made.partition_by)
    if plot is not None:
        _plot(made, labels, plot)
    if save is not None:
        written("save", save, lambda: found.save(save))
    if json:
        print(json_format.dumps(_facts(made, labels)))
        return
    console = Console(soft_wrap=True, highlight=False)
    _show(console, made, labels)
    if found.num_clients <= _MOST_SHOWN:
        _show_clients(console, found, labels)


def _labels(dataset: Any, partition_by: str | None) -> Labels | None:
    """Return the labels; None if there are none, or too many distinct ones."""
    try:
        labels = find_labels(dataset, partition_by)
        return labels if len(encode_classes(labels)[0]) <= _MOST_LABELS else None
    except (TypeError, ValueError):
        return None


def _plot(partitioner: Partitioner, labels: Labels | None, file: str) -> None:
    if labels is None:
        raise ValueError(f"plot={file!r}: the data has no labels that are integers or words, or over {_MOST_LABELS:,}.")
    figure, _, _ = plot_label_distributions(
        partitioner, max_num_partitions=_MOST_PLOTTED, legend=True, title=repr(partitioner)
    )
    written("plot", file, lambda: figure.savefig(file, dpi=150))


def _facts(made: Partitioner, labels: Labels | None) -> dict[str, Any]:
    found = made.partition
    facts: dict[str, Any] = {
        "partitioner": repr(made), "clients": found.num_clients, "samples": found.num_samples,
        "sizes": found.sizes.tolist(), "fingerprint": found.fingerprint,
    }  # fmt: skip
    if labels is not None:
        facts |= {
            "heterogeneity": heterogeneity(found, labels)._asdict(),
            "labels": encode_classes(labels)[0].tolist(),
            "label_counts": label_counts(found, labels).tolist(),
        }
    return facts


def _show(console: Console, made: Partitioner, labels: Labels | None) -> None:
    found, sizes = made.partition, made.partition.sizes
    rows = {
        "Clients": f"{found.num_clients:,}",
        "  without samples": f"{int((sizes == 0).sum()):,}",
        "Samples": f"{found.num_samples:,}",
        "  of the smallest, median, largest client": f"{sizes.min():,}, {np.median(sizes):,.0f}, {sizes.max():,}",
        "Gini coefficient of the sizes, 0 if equal": f"{gini(sizes):.3f}",
    }
    if labels is not None:
        skew = heterogeneity(found, labels)
        rows |= {
            "Different labels of a client, mean": f"{skew.mean_num_labels:.1f}",
            "Jensen-Shannon distance to all labels, 0 (iid) to 1": f"{skew.mean_js_distance:.3f}",
        }
    table = Table(title=repr(made), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _show_clients(console: Console, found: Partition, labels: Labels | None) -> None:
    """Print a table with a row for each client."""
    names = [] if labels is None else encode_classes(labels)[0].tolist()
    shown = names if len(names) <= _MOST_SHOWN else []
    table = Table("Client", "Samples", *(str(name) for name in shown))
    for column in table.columns:
        column.justify = "right"
    counts = label_counts(found, labels).tolist() if shown and labels is not None else [[]] * found.num_clients
    for client, (size, of_labels) in enumerate(zip(found.sizes.tolist(), counts, strict=True)):
        table.add_row(str(client), f"{size:,}", *(f"{each:,}" if each else "" for each in of_labels))
    console.print(table)
