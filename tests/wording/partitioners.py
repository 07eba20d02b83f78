"""Messages of `partitioners`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_fedscale import partitioners
from lightning_fedscale.partitioners import (
    ContinuousPartitioner,
    DirichletPartitioner,
    DistributionPartitioner,
    FilePartitioner,
    GroupedNaturalIdPartitioner,
    IdToSizeFncPartitioner,
    IidPartitioner,
    InnerDirichletPartitioner,
    Partition,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
    SizePartitioner,
    find_labels,
)
from lightning_fedscale.partitioners.holdout import split
from lightning_fedscale.partitioners.plots import plot_comparison_label_distribution
from lightning_fedscale.partitioners.registry import by_name
from lightning_fedscale.partitioners.statistics import gini, label_counts
from tests.wording import Row

FILE = str(Path(__file__).parents[1] / "features" / "three_clients.json")
TWO = Partition.from_lists([[0, 2], [1]])


def partition(partitioner: Partitioner, dataset: object) -> Partition:
    partitioner.dataset = dataset
    return partitioner.partition


ROWS: list[Row] = [
    Row(
        lambda: IidPartitioner(0),
        ValueError,
        "num_partitions=0: pass an integer of at least 1.",
    ),
    Row(
        lambda: IidPartitioner(2.5),  # type: ignore[arg-type]
        TypeError,
        "num_partitions=2.5: pass an integer of at least 1, not float.",
    ),
    Row(
        lambda: IidPartitioner(2).partition,
        AttributeError,
        "IidPartitioner has no dataset: assign one first, partitioner.dataset = dataset.",
    ),
    Row(
        lambda: partition(IidPartitioner(7), [0] * 6),
        ValueError,
        "num_partitions=7: pass at most the number of samples, 6.",
    ),
    Row(
        lambda: IidPartitioner(2, seed=-1),
        ValueError,
        "seed=-1: pass an integer of at least 0.",
    ),
    Row(
        lambda: IidPartitioner(True),
        TypeError,
        "num_partitions=True: pass an integer of at least 1, not bool.",
    ),
    Row(
        lambda: DirichletPartitioner(10),
        ValueError,
        "alpha=None: pass a value, as in DirichletPartitioner(num_partitions=10, alpha=0.5).",
    ),
    Row(
        lambda: DirichletPartitioner(10, alpha=0),
        ValueError,
        "alpha=0: pass a finite number above 0, such as 0.5, or a list of them.",
    ),
    Row(
        lambda: DirichletPartitioner(10, alpha="much"),  # type: ignore[arg-type]
        TypeError,
        "alpha='much': pass a number above 0, such as 0.5, or a list of them.",
    ),
    Row(
        lambda: DirichletPartitioner(2, alpha=[1.0] * 3),
        ValueError,
        "alpha has 3 entries for num_partitions=2: pass one per client, or a single number.",
    ),
    Row(
        lambda: DirichletPartitioner(10, 5, alpha=1.0),  # type: ignore[arg-type]
        TypeError,
        "partition_by=5: pass the name of a column, the position of an entry as a string, such as '1', or "
        "None; pass the arguments after it by keyword.",
    ),
    Row(
        lambda: partition(DirichletPartitioner(3, alpha=1.0, min_partition_size=3), [0, 1] * 3),
        ValueError,
        "min_partition_size=3 with num_partitions=3: this needs 9 samples, and there are 6: pass a "
        "min_partition_size of at most 2, or lower num_partitions.",
    ),
    Row(
        lambda: partition(DirichletPartitioner(2, alpha=1.0), [0.5, 0.25] * 20),
        ValueError,
        "labels have dtype float64, and this needs classes: pass integers or strings (labels.astype(int)), "
        "name another column with partition_by, or use ContinuousPartitioner for a real-valued target.",
    ),
    Row(
        lambda: InnerDirichletPartitioner([3, 3]),
        ValueError,
        "alpha=None: pass a value, as in InnerDirichletPartitioner(partition_sizes=[100] * 10, alpha=0.5).",
    ),
    Row(
        lambda: partition(InnerDirichletPartitioner([2, 2], alpha=[1.0, 1.0, 1.0]), [0, 1] * 2),
        ValueError,
        "alpha has 3 entries for 2 classes: pass one per class, or a single number.",
    ),
    Row(
        lambda: partition(ContinuousPartitioner(2, strictness=1.0), ["a", "b"]),
        ValueError,
        "partition_by: the property has dtype <U1, and ContinuousPartitioner needs numbers: name a column of numbers.",
    ),
    Row(
        lambda: partition(ContinuousPartitioner(2, strictness=1.0), [1.0, float("inf")]),
        ValueError,
        "the property of sample 1 is inf: remove such samples, or give them a finite value.",
    ),
    Row(
        lambda: partition(ContinuousPartitioner(2, strictness=0.5), [1.0, 1.0]),
        ValueError,
        "strictness=0.5: all values of the property are equal, so they give no order: pass another "
        "partition_by, or strictness=0.",
    ),
    Row(
        lambda: ContinuousPartitioner(2, strictness=1.5),
        ValueError,
        "strictness=1.5: pass a number in [0, 1].",
    ),
    Row(
        lambda: PathologicalPartitioner(3),
        ValueError,
        "num_classes_per_partition=None: pass a value, as in PathologicalPartitioner(num_partitions=10, "
        "num_classes_per_partition=2).",
    ),
    Row(
        lambda: partition(PathologicalPartitioner(3, num_classes_per_partition=3), [0, 1] * 3),
        ValueError,
        "num_classes_per_partition=3: pass at most the number of classes, 2.",
    ),
    Row(
        lambda: PathologicalPartitioner(3, num_classes_per_partition=1, class_assignment_mode="radom"),  # type: ignore[arg-type]
        ValueError,
        "class_assignment_mode='radom': pass one of 'random', 'deterministic', 'first-deterministic'. Did you "
        "mean 'random'?",
    ),
    Row(
        lambda: partition(
            PathologicalPartitioner(3, num_classes_per_partition=2, class_assignment_mode="deterministic"), [0, 0, 0, 1]
        ),
        ValueError,
        "num_partitions=3, num_classes_per_partition=2: 3 clients share class 1, which has 1 samples: lower "
        "one of them.",
    ),
    Row(
        lambda: ShardPartitioner(3),
        ValueError,
        "num_shards_per_partition=None and shard_size=None: pass one of them, such as "
        "ShardPartitioner(num_partitions=10, num_shards_per_partition=2).",
    ),
    Row(
        lambda: partition(ShardPartitioner(3, num_shards_per_partition=3), [0] * 6),
        ValueError,
        "num_shards_per_partition=3 with num_partitions=3: these are 9 shards of 6 samples: lower one of them.",
    ),
    Row(
        lambda: partition(ShardPartitioner(1, shard_size=7), [0] * 6),
        ValueError,
        "shard_size=7: 6 samples give 0 shards for num_partitions=1: pass at most 6.",
    ),
    Row(
        lambda: partition(ShardPartitioner(3, num_shards_per_partition=2, shard_size=2), [0] * 6),
        ValueError,
        "shard_size=2, num_shards_per_partition=2, num_partitions=3: these need 12 samples, and there are 6: "
        "lower one of them.",
    ),
    Row(
        lambda: DistributionPartitioner([1.0], 2, 1, preassigned_num_samples_per_label=0),  # type: ignore[arg-type]
        TypeError,
        "distribution_array has dtype float64, shape (1,): pass a 2-D array of numbers, one row per class.",
    ),
    Row(
        lambda: DistributionPartitioner([[1.0], [-1.0]], 2, 1, preassigned_num_samples_per_label=0),  # type: ignore[arg-type]
        ValueError,
        "distribution_array: pass finite numbers of at least 0, and with rescale=True no row of zeros only.",
    ),
    Row(
        lambda: partition(
            DistributionPartitioner(np.ones((2, 1)), 3, 1, preassigned_num_samples_per_label=0), [0, 1] * 4
        ),
        ValueError,
        "num_partitions=3: pass a multiple of the number of classes, 2, such as 2.",
    ),
    Row(
        lambda: partition(
            DistributionPartitioner(np.ones((2, 3)), 2, 1, preassigned_num_samples_per_label=0), [0, 1] * 4
        ),
        ValueError,
        "distribution_array has shape (2, 3): pass (2, 1), which is classes x (num_unique_labels_per_partition "
        "* num_partitions / classes).",
    ),
    Row(
        lambda: partition(
            DistributionPartitioner(np.ones((2, 1)), 2, 3, preassigned_num_samples_per_label=0), [0, 1] * 4
        ),
        ValueError,
        "num_unique_labels_per_partition=3: pass at most the number of classes, 2.",
    ),
    Row(
        lambda: partition(
            DistributionPartitioner(
                [[9], [1]],  # type: ignore[arg-type]
                2,
                1,
                preassigned_num_samples_per_label=0,
                rescale=False,
            ),
            [0, 1] * 4,
        ),
        ValueError,
        "distribution_array: its row for class 0 takes 9 samples, and there are 4: lower the row, or pass "
        "rescale=True.",
    ),
    Row(
        lambda: partition(
            DistributionPartitioner(np.ones((2, 1)), 2, 1, preassigned_num_samples_per_label=5), [0, 1] * 4
        ),
        ValueError,
        "preassigned_num_samples_per_label=5: 1 clients share a class of 4 samples: pass at most 4.",
    ),
    Row(
        lambda: SizePartitioner([]),
        ValueError,
        "partition_sizes=[]: pass the size of at least one client.",
    ),
    Row(
        lambda: SizePartitioner([1.5]),  # type: ignore[list-item]
        TypeError,
        "partition_sizes=[1.5]: pass a list of integers, one size per client.",
    ),
    Row(
        lambda: SizePartitioner([3, 0]),
        ValueError,
        "partition_sizes[1]=0: pass sizes of at least 1.",
    ),
    Row(
        lambda: partition(SizePartitioner([3, 4]), [0] * 6),
        ValueError,
        "partition_sizes add up to 7, and there are 6 samples: lower the sizes.",
    ),
    Row(
        lambda: partition(SizePartitioner([2, 1]), [0] * 6),
        UserWarning,
        "partition_sizes add up to 3, so 3 of 6 samples belong to no client.",
    ),
    Row(
        lambda: partition(IdToSizeFncPartitioner(3, np.exp2), [0] * 3),
        ValueError,
        "num_partitions=3: this size function gives a client none of the 3 samples, or no finite number: lower "
        "num_partitions, or use SizePartitioner.",
    ),
    Row(
        lambda: partition(GroupedNaturalIdPartitioner(group_size=2, mode="strict"), ["a", "b", "c"]),
        ValueError,
        "group_size=2 with mode='strict': 3 ids do not fill whole groups: pass a divisor of 3, or another mode.",
    ),
    Row(
        lambda: partition(GroupedNaturalIdPartitioner(group_size=3, mode="strict"), ["a", "b"]),
        ValueError,
        "group_size=3: there are only 2 ids: pass at most that many, or mode='allow-smaller'.",
    ),
    Row(
        lambda: FilePartitioner("lost.json"),
        ValueError,
        "partitioner='lost.json': the file cannot be read: No such file or directory. Pass a file that "
        "Partition.save or fedscale partition --save wrote.",
    ),
    Row(
        lambda: by_name("dirichet"),
        ValueError,
        "partitioner='dirichet' is not known. Did you mean 'dirichlet'? Known: 'iid', 'dirichlet', "
        "'inner_dirichlet', 'pathological', 'shard', 'distribution', 'continuous', 'size', 'id_to_size_fnc', "
        "'linear', 'square', 'exponential', 'natural_id', 'grouped_natural_id', 'file'.",
    ),
    Row(
        lambda: by_name("DirichletPartioner"),
        ValueError,
        "partitioner='DirichletPartioner' is not known. Did you mean 'DirichletPartitioner'? Known: 'iid', "
        "'dirichlet', 'inner_dirichlet', 'pathological', 'shard', 'distribution', 'continuous', 'size', "
        "'id_to_size_fnc', 'linear', 'square', 'exponential', 'natural_id', 'grouped_natural_id', 'file'.",
    ),
    Row(
        lambda: by_name(FILE, 4),
        ValueError,
        f"num_partitions=4: partitioner={FILE!r} divides the data among 3 clients: pass 3, or leave the number out.",
    ),
    Row(
        lambda: by_name("size", partition_sizes=[3, 4]),
        ValueError,
        "partition_sizes has 2 entries for num_partitions=10: pass one size per client.",
    ),
    Row(
        lambda: by_name("iid", alpha=1),
        ValueError,
        "partitioner='iid': IidPartitioner has no argument 'alpha'. It has num_partitions, shuffle, seed.",
    ),
    Row(
        lambda: by_name("size", 4, partition_sizes=[1, 2]),
        ValueError,
        "partition_sizes has 2 entries for num_partitions=4: pass one size per client.",
    ),
    Row(
        lambda: find_labels([(1, "a", "b")], "user"),
        ValueError,
        "partition_by='user': sample 0, a tuple, has no value of that name, and neither has the dataset: pass "
        "the position of an entry, '0' to '2', or None for the last, or pass an array of labels as the dataset.",
    ),
    Row(
        lambda: find_labels([[1.0], [2.0]]),
        ValueError,
        "partition_by=None: no label was found in sample 0, a list: pass the name of its label, let samples be "
        "(input, label), or pass an array of labels as the dataset.",
    ),
    Row(
        lambda: find_labels({"x": 1}),
        TypeError,
        "dataset is a dict: pass a map-style dataset, or a 1-D array of labels.",
    ),
    Row(
        lambda: find_labels([]),
        ValueError,
        "dataset is a list without samples: pass a dataset with at least one.",
    ),
    Row(
        lambda: find_labels(iter([])),
        TypeError,
        "dataset is a list_iterator, which lacks __len__ or __getitem__: pass a map-style dataset, or a 1-D "
        "array of labels. Load a stream into one of these first.",
    ),
    Row(
        lambda: find_labels(np.ones((3, 2))),
        ValueError,
        "labels have shape (3, 2) for 3 samples: pass one label per sample, for one-hot rows labels.argmax(axis=1).",
    ),
    Row(
        lambda: find_labels([{"a": 1}, {"a": 2}]),
        ValueError,
        "partition_by=None: the dataset has no column label, labels, target, targets, y: pass the name of one "
        "of its columns, ['a'].",
    ),
    Row(
        lambda: find_labels([{"a": 1}, {"a": 2}], "b"),
        ValueError,
        "partition_by='b': the dataset has no such column: pass the name of one of its columns, ['a'].",
    ),
    Row(
        lambda: find_labels([("x", [1, 2])]),
        ValueError,
        "the label of sample 0 is a list, not a single value: pass an array of labels as the dataset.",
    ),
    Row(
        lambda: partition(
            DirichletPartitioner(1, alpha=1.0, min_partition_size=0), np.array(["a", None], dtype=object)
        ),
        ValueError,
        "the label or id of sample 1 is missing (None): remove such samples, or give them one.",
    ),
    Row(
        lambda: Partition([0, 1], [0, 1]),  # type: ignore[arg-type]
        ValueError,
        "offsets=[0 1]: pass numbers that rise from 0 to the number of indices, 2, one more than there are "
        "clients; Partition.from_lists makes them.",
    ),
    Row(
        lambda: Partition([[0]], [0, 1]),  # type: ignore[arg-type]
        ValueError,
        "indices has shape (1, 1): pass an array with one dimension.",
    ),
    Row(
        lambda: Partition.from_lists(3),  # type: ignore[arg-type]
        TypeError,
        "clients=3: pass a list of sample positions for each client, [[0, 2], [1]].",
    ),
    Row(
        lambda: Partition.from_lists({0: [0], 2: [1]}),
        ValueError,
        "clients has the keys [0, 2]: number the clients from 0 to num_clients - 1.",
    ),
    Row(
        lambda: Partition.from_lists([[0.5]]),
        ValueError,
        "clients[0] has dtype float64, shape (1,): pass a list of integers.",
    ),
    Row(
        lambda: Partition.from_lists([[0], [0]]),
        ValueError,
        "sample 0 appears more than once: give every sample to at most one client.",
    ),
    Row(
        lambda: Partition.from_lists([[-1]]),
        ValueError,
        "sample -1 is not in the dataset: pass positions of at least 0, or the dataset that was partitioned.",
    ),
    Row(
        lambda: TWO.client(2),
        IndexError,
        "client 2 does not exist: pass a number from 0 to 1.",
    ),
    Row(
        lambda: Partition.load("lost.json"),
        FileNotFoundError,
        "path='lost.json': there is no such file: save a partition first.",
    ),
    Row(
        lambda: partition(partitioners.FinishedPartitioner(TWO), [0, 1]),
        ValueError,
        "sample 2 is not in the dataset: pass positions from 0 to 1, or the dataset that was partitioned.",
    ),
    Row(
        lambda: split(TWO, 1.0),
        ValueError,
        "fraction=1.0: pass a number in [0, 1).",
    ),
    Row(
        lambda: split(Partition.from_lists([[0, 1]]), 0.5, by="client"),
        ValueError,
        "by='client': this needs two clients with samples, and there are 1: pass by='sample'.",
    ),
    Row(
        lambda: split(TWO, 0.5, by="clients"),  # type: ignore[arg-type]
        ValueError,
        "by='clients': pass one of 'sample', 'client'. Did you mean 'client'?",
    ),
    Row(
        lambda: split([[0]], 0.5),  # type: ignore[arg-type]
        TypeError,
        "partition=[[0]]: pass a Partition, such as partitioner.partition.",
    ),
    Row(
        lambda: plot_comparison_label_distribution([]),
        ValueError,
        "partitioner_list=[]: pass at least one partitioner with a dataset.",
    ),
    Row(
        lambda: plot_comparison_label_distribution([IidPartitioner(2)], titles=[]),
        ValueError,
        "titles has 0 entries for 1 partitioners: pass one for each.",
    ),
    Row(
        lambda: gini([]),
        ValueError,
        "sizes=[]: pass at least one size, each of at least 0.",
    ),
    Row(
        lambda: label_counts(TWO, np.array([0, 1])),
        ValueError,
        "labels have shape (2,), and the partition has sample 2: pass the label of every sample of the "
        "dataset, such as find_labels(dataset).",
    ),
]
