"""Split a dataset into clients, and inspect the split.

Assign a dataset (a map-style torch dataset, a Hugging Face dataset, or just its labels) to a partitioner and ask for
the positions of each client's samples. Names and arguments are those of ``flwr-datasets``.

    partitioner = DirichletPartitioner(num_partitions=100, alpha=0.3)
    partitioner.dataset = train_set
    indices = partitioner.load_partition(7)
    partition = partitioner.partition            # all clients: two arrays
    figure, axis, table = plot_label_distributions(partitioner, legend=True)
"""

from __future__ import annotations

from lightning_fedscale.partitioners.alike import alike_by_labels, alike_by_size
from lightning_fedscale.partitioners.base import Partitioner
from lightning_fedscale.partitioners.continuous import ContinuousPartitioner
from lightning_fedscale.partitioners.dirichlet import DirichletPartitioner
from lightning_fedscale.partitioners.distribution import DistributionPartitioner
from lightning_fedscale.partitioners.finished import FilePartitioner, FinishedPartitioner
from lightning_fedscale.partitioners.holdout import split
from lightning_fedscale.partitioners.iid import IidPartitioner
from lightning_fedscale.partitioners.inner_dirichlet import InnerDirichletPartitioner
from lightning_fedscale.partitioners.labels import find_labels, known_labels, num_samples
from lightning_fedscale.partitioners.natural_id import GroupedNaturalIdPartitioner, NaturalIdPartitioner
from lightning_fedscale.partitioners.partition import Partition, check_partition
from lightning_fedscale.partitioners.pathological import PathologicalPartitioner
from lightning_fedscale.partitioners.plots import plot_comparison_label_distribution, plot_label_distributions
from lightning_fedscale.partitioners.registry import by_name
from lightning_fedscale.partitioners.shard import ShardPartitioner
from lightning_fedscale.partitioners.sizes import (
    ExponentialPartitioner,
    IdToSizeFncPartitioner,
    LinearPartitioner,
    SizePartitioner,
    SquarePartitioner,
)
from lightning_fedscale.partitioners.statistics import (
    Heterogeneity,
    gini,
    heterogeneity,
    js_distance,
    js_distances,
    label_counts,
)

__all__ = [
    "ContinuousPartitioner",
    "DirichletPartitioner",
    "DistributionPartitioner",
    "ExponentialPartitioner",
    "FilePartitioner",
    "FinishedPartitioner",
    "GroupedNaturalIdPartitioner",
    "Heterogeneity",
    "IdToSizeFncPartitioner",
    "IidPartitioner",
    "InnerDirichletPartitioner",
    "LinearPartitioner",
    "NaturalIdPartitioner",
    "Partition",
    "Partitioner",
    "PathologicalPartitioner",
    "ShardPartitioner",
    "SizePartitioner",
    "SquarePartitioner",
    "alike_by_labels",
    "alike_by_size",
    "by_name",
    "check_partition",
    "find_labels",
    "gini",
    "heterogeneity",
    "js_distance",
    "js_distances",
    "known_labels",
    "label_counts",
    "num_samples",
    "plot_comparison_label_distribution",
    "plot_label_distributions",
    "split",
]
