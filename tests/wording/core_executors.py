"""Messages of `core.executors`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_fedscale.core.executors import (
    ClientLoader,
    ExecutorChoice,
    ExecutorTiming,
    FrozenGuard,
    shared_tensors_of,
)
from lightning_fedscale.core.executors.device_cache import device_data
from lightning_fedscale.core.executors.module_walk import ModuleWalk
from lightning_fedscale.core.executors.vectorized.stacking import NotVectorizable, opened, stacked
from tests.wording import Row

DATA = TensorDataset(torch.zeros(4, 2))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(2)


class Batches:
    def __iter__(self) -> Iterator[list[int]]:
        yield [0, 1]

    def __len__(self) -> int:
        return 1


class Extra(BatchSampler):
    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, extra: int) -> None:
        super().__init__(sampler, batch_size, drop_last)


class Names(Dataset[str]):
    def __getitem__(self, index: int) -> str:
        return "a"

    def __len__(self) -> int:
        return 2


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(2, 2), nn.Linear(2, 2)


def tied() -> TwoLayers:
    module = TwoLayers()
    module.head.weight = module.body.weight
    return module


def overlapping() -> TwoLayers:
    module = tied()
    module.head.weight = nn.Parameter(torch.zeros(2, 2))
    module.head.weight.data = module.body.weight.data
    return module


def cached(loader: DataLoader[Any]) -> object:
    return device_data(loader, True, torch.device("cpu"), seed=0, show_progress=False)


def stack(*scales: object) -> object:
    return stacked([opened({"x": torch.zeros(1), "scale": scale}) for scale in scales])


def contradicted() -> None:
    """Vectorized steps should be 1.2 times as fast, and were three times as fast."""
    parts: Any = SimpleNamespace(reason=None, close=lambda: None)
    choice = ExecutorChoice("auto", parts, parts)
    choice.choose(ExecutorTiming(1.0, 1.0, 1.2, 1.0, measured=6e-3, trial=2e-3))


def written_unseen(client: int | None) -> None:
    module = nn.Linear(2, 2, bias=False).requires_grad_(False)
    guard = FrozenGuard(ModuleWalk(module).bindings, round=5)
    module.weight.data.add_(1)
    guard.check(client)


ROWS: list[Row] = [
    Row(
        lambda: ClientLoader([DATA]),
        TypeError,
        "train_dataloader=list: pass a torch.utils.data.DataLoader, whose dataset can be divided among"
        " clients by index.",
    ),
    Row(
        lambda: ClientLoader(DataLoader(Stream())),
        TypeError,
        "train_dataloader: dataset=Stream is an IterableDataset or has no length, so it cannot be divided"
        " among clients by index: use a map-style dataset with __getitem__ and __len__.",
    ),
    Row(
        lambda: ClientLoader(DataLoader(TensorDataset(torch.zeros(0, 2)))),
        ValueError,
        "train_dataloader: dataset=TensorDataset is empty: give it at least one sample per client.",
    ),
    Row(
        lambda: ClientLoader(DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 4, 4))),
        ValueError,
        "train_dataloader: sampler=WeightedRandomSampler cannot be applied to each client's own samples: use"
        " shuffle=True or shuffle=False; to draw some samples more often, repeat them in the dataset or weight"
        " the loss.",
    ),
    Row(
        lambda: ClientLoader(DataLoader(DATA, batch_sampler=Batches())),
        ValueError,
        "train_dataloader: batch_sampler=Batches has no sampler, so its order cannot be applied to each"
        " client's own samples: give it the arguments and attributes of torch.utils.data.BatchSampler, or use"
        " batch_size and shuffle.",
    ),
    Row(
        lambda: ClientLoader(DataLoader(DATA, batch_sampler=Extra(RandomSampler(DATA), 2, False, 1))),
        ValueError,
        "train_dataloader: batch_sampler=Extra cannot be rebuilt for the samples of each client"
        " (Extra.__init__() missing 1 required positional argument: 'extra'): give it the arguments of"
        " torch.utils.data.BatchSampler, or build it inside train_dataloader().",
    ),
    Row(
        lambda: ClientLoader(DataLoader(DATA, batch_size=2, sampler=RandomSampler(DATA, True)), name="data"),
        ValueError,
        "data: sampler=RandomSampler cannot be applied to each client's own samples: use shuffle=True or"
        " shuffle=False; to draw some samples more often, repeat them in the dataset or weight the loss.",
    ),
    Row(
        lambda: cached(DataLoader(DATA, batch_size=None)),
        ValueError,
        "cache_dataset=True: train_dataloader has batch_size=None, so its batches may be other than stacked"
        " samples: remove it, or pass cache_dataset=False.",
    ),
    Row(
        lambda: cached(DataLoader(Names())),
        ValueError,
        "cache_dataset=True: the samples of dataset=Names cannot be stacked (a sample has a str): they must"
        " be tensors or numbers of the same shapes, alone or nested in tuples, lists and dicts. Change them,"
        " or pass cache_dataset=False.",
    ),
    Row(
        lambda: shared_tensors_of(tied(), ["head.*"]),
        ValueError,
        "personal=['head.*'] matches 'head.weight' but not 'body.weight', another name of the same tensor:"
        " add 'body.weight' to keep the tensor with each client, or untie the two.",
    ),
    Row(
        lambda: shared_tensors_of(overlapping(), ["head.*"]),
        ValueError,
        "personal=['head.*'] matches 'head.weight' but not 'body.weight', which shares its memory: add"
        " 'body.weight' to keep both with each client, or clone one of them.",
    ),
    Row(
        lambda: written_unseen(7),
        RuntimeError,
        "frozen parameters: client 7 wrote to 'weight' in round 5, but no client did so when these parameters were"
        " first watched, so their values from before are lost and the global model is spoilt: pass"
        " FederatedStrategy(buffers={'weight': 'mean'}), so that they are exchanged from the start and the global model"
        " takes the mean over clients.",
    ),
    Row(
        lambda: stack(1, 2),
        NotVectorizable,
        "batch['scale'] is not a tensor and differs between clients (1 and 2)",
    ),
    Row(
        lambda: opened({"x": {1: (t for t in "")}}),
        NotVectorizable,
        "batch['x'][1] is a generator, whose contents cannot be read",
    ),
    Row(
        lambda: opened([torch.zeros(1, requires_grad=True)]),
        NotVectorizable,
        "batch[0] is a tensor that is part of an autograd graph",
    ),
    Row(
        lambda: opened([nn.Parameter(torch.zeros(1))]),
        NotVectorizable,
        "batch[0] is a Parameter, not a plain tensor",
    ),
    Row(
        lambda: opened([{object()}]),
        NotVectorizable,
        "batch[0] is a set with members that are neither numbers nor strings",
    ),
    Row(
        contradicted,
        UserWarning,
        "executor='auto': 'sequential' was chosen, but a local batch took 6 ms sequentially and 2 ms vectorized. The"
        " choice stays, so that a seed gives the same results in every run; pass executor='vectorized' to train"
        " faster.",
    ),
]
