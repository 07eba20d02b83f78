"""The user's DataLoader, rebuilt so that a single loader streams the batches of all clients of a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    get_worker_info,
)

from lightning_fedscale.core.executors.device_cache import DeviceData, device_data
from lightning_fedscale.core.lightning.data_loaders import batches_of, copied_loader, stop_workers
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.devices.profiling.samples import largest_sample
from lightning_fedscale.types import IntArray
from lightning_fedscale.utils import randomness


class Seeded(NamedTuple):
    """The sample indices of a batch, or one index; unpickling it in a worker process seeds that process.

    A worker's random augmentations then depend only on the batch, not on which worker got it or what that worker
    did before.
    """

    item: list[int] | int
    seed: int

    def __reduce__(self) -> tuple[Callable[[Any, int], Any], tuple[Any, int]]:
        return _seed_worker, (self.item, self.seed)


def _seed_worker(item: Any, seed: int) -> Any:
    if get_worker_info() is not None:
        randomness.seed_globals(seed, torch.device("cpu"))
    return item


class _Relay(Sampler[Any]):
    """A (batch) sampler that yields the items last assigned to it, so that one worker pool serves every round."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class ClientLoader:
    """Makes batches of single clients with the user's own loader: its dataset, batch size, collate function, workers.

    Args:
        loader: the user's train loader.
        share: fraction or number of each pass's batches to use (``limit_train_batches`` as a float, or
            ``overfit_batches``); 1.0 for all.
        merge_single: join a last batch of one sample to the batch before it, for models with BatchNorm.
        name: the loader's name in messages.

    Attributes:
        cache: the dataset on the device, from which batches are then taken without workers; None if not cached.

    Raises:
        TypeError: if the loader is not a map-style ``DataLoader``.
        ValueError: if its dataset is empty or its sampler cannot be applied to single clients.
    """

    def __init__(
        self, loader: object, *, share: float | int = 1.0, merge_single: bool = False, name: str = "train_dataloader"
    ) -> None:
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"{name}={type(loader).__name__}: pass a torch.utils.data.DataLoader, whose dataset can be divided"
                " among clients by index."
            )
        self.dataset = loader.dataset
        kind = type(self.dataset).__name__
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__len__"):
            raise TypeError(
                f"{name}: dataset={kind} is an IterableDataset or has no length, so it cannot be divided"
                " among clients by index: use a map-style dataset with __getitem__ and __len__."
            )
        if len(self.dataset) == 0:
            raise ValueError(f"{name}: dataset={kind} is empty: give it at least one sample per client.")
        cutter = batch_sampler_of(loader)
        self.shuffle = _shuffles(loader, name)
        self.drop_last = bool(getattr(cutter, "drop_last", loader.drop_last))
        self.batch_size = getattr(cutter, "batch_size", None) or 1
        # A user who seeds the loader's generator expects the order to depend on that seed.
        self.salt = loader.generator.initial_seed() if loader.generator is not None else None
        self._name = name
        self._share = share
        self._merge_single = merge_single
        self._template = loader
        self._batches_directly = loader.batch_sampler is None
        self._asks_singly = cutter is None
        self._custom = loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler
        self._relay = _Relay()
        self._pool_generator = torch.Generator()
        self._loader: DataLoader[Any] | None = None
        self._yielded_none = False
        self.cache: DeviceData | None = None
        if self._custom:
            try:
                self._rebatch([0])
            except Exception as error:
                raise ValueError(
                    f"{name}: batch_sampler={type(loader.batch_sampler).__name__} cannot be rebuilt for"
                    f" the samples of each client ({error}): give it the arguments of torch.utils.data.BatchSampler, or"
                    " build it inside train_dataloader()."
                ) from error

    @property
    def has_custom_batches(self) -> bool:
        """Whether a custom batch sampler makes the batches."""
        return self._custom

    def batches(self, order: IntArray, batch_size: int | None = None) -> list[list[int]]:
        """Return one pass over a client's samples, cut into batches as the user's loader does.

        Args:
            order: dataset positions, in the order of the pass.
            batch_size: the client's batch size; None for the loader's.

        Raises:
            ValueError: if the user's batch sampler makes no batch of them.
        """
        indices = order.tolist()
        if self._custom:
            batches = self._rebatch(indices)
            if not batches:
                raise ValueError(
                    f"{self._name}: batch_sampler={type(self._template.batch_sampler).__name__} makes no batch of a"
                    f" client with {len(indices)} samples: set drop_last=False, use a smaller batch_size, or a"
                    " partitioner with a larger min_partition_size."
                )
        else:
            size = batch_size or self.batch_size
            batches = [indices[start : start + size] for start in range(0, len(indices), size)]
            if self.drop_last and batches and len(batches[-1]) < size:
                del batches[-1]
        if self._merge_single and len(batches) > 1 and len(batches[-1]) == 1 < (batch_size or self.batch_size):
            tail = batches.pop()
            batches[-1] = batches[-1] + tail
        if isinstance(self._share, int):
            return batches[: self._share]
        return batches if self._share == 1.0 else batches[: max(1, math.floor(len(batches) * self._share))]

    def _rebatch(self, indices: list[int]) -> list[list[int]]:
        return [list(batch) for batch in batches_of(self._template, indices)]

    def too_small(self, sizes: IntArray) -> IntArray:
        """Return the clients whose samples do not fill a single batch under ``drop_last``."""
        short = sizes < (self.batch_size if self.drop_last and not self._custom else 1)
        found: IntArray = short.nonzero()[0]
        return found

    def stream(
        self,
        clients: list[LocalWork],
        seed: int,
        order: Iterable[tuple[int, int]] | None = None,
    ) -> Iterator[Any]:
        """Return the collated batches of several clients from one worker pool, prefetched across clients.

        Args:
            clients: the work of each client; workers draw from its seed.
            seed: for the pool itself, so that nothing is drawn from the global generators.
            order: the order of the batches, as (number in ``clients``, number of the batch); None for client by
                client.
        """
        if order is None:
            order = [(number, batch) for number, work in enumerate(clients) for batch in range(len(work.batches))]
        if self.cache is not None:
            return self.cache.batches(clients[number].batches[batch] for number, batch in order)
        if self._loader is None:
            self._loader = self._copy()
        self._pool_generator.manual_seed(seed)
        order = list(order)
        items: list[Any] = [clients[number].batches[batch] for number, batch in order]
        if self._asks_singly:
            items = [single for (single,) in items]
        if self._template.num_workers > 0:
            of_clients = [work.seed for work in clients]
            seeds = [randomness.derive(of_clients[number], randomness.BATCH, batch) for number, batch in order]
            items = list(map(Seeded, items, seeds))
        self._relay.items = items
        return self._passed_on(iter(self._loader))

    def _passed_on(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if batch is None and not self._yielded_none:
                self._yielded_none = True
                rank_zero_warn(f"{self._name} yielded None. If this was on purpose, ignore this warning...")
            yield batch

    def example(self) -> Any:
        """Make a batch of the largest sample twice in this process; of any sample if the dataset makes the batches."""
        if self._batches_directly and not self._asks_singly:
            return self.fetch([0, 0])
        sample = largest_sample(self.dataset).sample
        return self._template.collate_fn(sample if self._asks_singly else [sample, sample])

    def fetch(self, indices: list[int]) -> Any:
        """Make one collated batch in this process."""
        if self.cache is not None:
            return self.cache.batch(indices)
        dataset: Any = self.dataset
        if self._batches_directly:
            return self._template.collate_fn(dataset[indices[0] if self._asks_singly else indices])
        if getattr(dataset, "__getitems__", None):
            return self._template.collate_fn(dataset.__getitems__(indices))
        return self._template.collate_fn([dataset[index] for index in indices])

    def keep_on(self, device: torch.device, cache: bool | Literal["auto"], *, seed: int, show_progress: bool) -> None:
        """Keep the dataset on the device if possible or requested; see `device_data`."""
        self.cache = device_data(self._template, cache, device, seed=seed, show_progress=show_progress)

    @property
    def in_workers(self) -> bool:
        """Whether other processes make the batches, so that prefetching changes nothing in this one."""
        return self.cache is None and self._template.num_workers > 0

    def close(self) -> None:
        """Stop the worker processes; the next stream starts new ones."""
        if self._loader is not None:
            stop_workers(self._loader)
            self._loader = None

    def _copy(self) -> DataLoader[Any]:
        """Copy the user's loader with other indices."""
        indices = {"sampler" if self._batches_directly else "batch_sampler": self._relay}
        # Batches arrive in the client's order, whichever worker is faster.
        return copied_loader(self._template, generator=self._pool_generator, in_order=True, **indices)


class RoundLoader:
    """The Trainer's loader: ``rounds_per_epoch`` items, each the first batch of the rank's round.

    For everyone else it is the user's loader: it has that loader's attributes, and a callback that iterates over
    ``trainer.train_dataloader`` gets that loader's batches. Only the length counts rounds.

    Args:
        loader: the user's loader.
        rounds_per_epoch: the length.
        open_round: plans the next round and returns its first batch; called when the Trainer requests it.
        is_trainers: returns whether an iterator belongs to the Trainer.
    """

    def __init__(
        self,
        loader: Any,
        rounds_per_epoch: int,
        open_round: Callable[[], Any],
        is_trainers: Callable[[Iterator[Any]], bool],
    ) -> None:
        self._loader = loader
        self._rounds_per_epoch = rounds_per_epoch
        self._open_round = open_round
        self._is_trainers = is_trainers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return self._rounds_per_epoch

    def __iter__(self) -> Iterator[Any]:
        return _RoundIterator(self)

    # Every round is a function of its number, so there is nothing to save; but Lightning takes a loader without these
    # methods for one that cannot be resumed within an epoch.
    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict, since the Trainer saves the round's number."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class _RoundIterator(Iterator[Any]):
    """Decides at the first item whether it is the Trainer's, which registers iterators only after it has made them."""

    def __init__(self, loader: RoundLoader) -> None:
        self._loader = loader
        self._rounds: Iterator[Any] | None = None
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        loader = self._loader
        if self._rounds is None and self._batches is None and loader._is_trainers(self):
            self._rounds = (loader._open_round() for _ in range(len(loader)))
        if self._rounds is not None:
            return next(self._rounds)
        with randomness.untouched():  # a client may be training, whose random numbers these would be
            if self._batches is None:
                self._batches = iter(loader._loader)
            return next(self._batches)


def batch_sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the sampler that makes a loader's batches; None if the loader yields single items without batching.

    With ``DataLoader(dataset, batch_size=None, sampler=BatchSampler(...))`` the dataset returns whole batches, as
    torch's documentation recommends for data that is faster to read in bulk.
    """
    if loader.batch_sampler is None and type(loader.sampler) is BatchSampler:
        return loader.sampler
    return loader.batch_sampler


def _shuffles(loader: DataLoader[Any], name: str) -> bool:
    """Return whether the user's loader shuffles; raise an error for samplers that do not apply to single clients."""
    cutter = batch_sampler_of(loader)
    sampler = loader.sampler if cutter is None else getattr(cutter, "sampler", None)
    # A custom __iter__ may yield anything, such as whole batches.
    if isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__:
        return bool(sampler.shuffle)
    if type(sampler) is SequentialSampler:
        return False
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset):  # type: ignore[arg-type]
        return True
    if sampler is None:
        raise ValueError(
            f"{name}: batch_sampler={type(cutter).__name__} has no sampler, so its order cannot be applied to"
            " each client's own samples: give it the arguments and attributes of torch.utils.data.BatchSampler, or use"
            " batch_size and shuffle."
        )
    raise ValueError(
        f"{name}: sampler={type(sampler).__name__} cannot be applied to each client's own samples: use shuffle=True or"
        " shuffle=False; to draw some samples more often, repeat them in the dataset or weight the loss."
    )
