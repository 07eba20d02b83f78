"""A project's training data before a run: its largest samples, and where the project keeps its batch size."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import BatchSampler, DataLoader

from lightning_fedscale.core.lightning.data_loaders import (
    combined_loader,
    copied_loader,
    forget_loader,
    train_source,
)
from lightning_fedscale.core.lightning.hooks import as_it_was
from lightning_fedscale.devices.profiling.samples import LargestSample, is_map_style, largest_sample

NAMES = "batch_size", "train_batch_size", "per_device_batch_size"
"""Names under which projects keep their batch size, in the order in which they are searched."""

_KEEP_ONE = (
    "keep one as `batch_size` in the data module or the module and build the loader from it, or pass apply=False to"
    " only report."
)


class TrainData:
    """The train loader of a Trainer that is about to fit, and its batch size.

    Lightning: `_mode` of a `CombinedLoader` is how it combines loaders, needed for one like it with other batches, and
    `__pl_saved_args` of a `DataLoader` are what it was constructed from. Neither can be read otherwise.
    Upgrade: `CombinedLoader.__init__` in `utilities/combined_loader.py`, and `_replace_dunder_methods` in
    `utilities/data.py` of Fabric.

    Args:
        trainer: in or before ``on_fit_start``.
        need_samples: whether samples will be taken from the loader, which must then be a DataLoader.

    Raises:
        ValueError: if there is no train loader.
    """

    def __init__(self, trainer: pl.Trainer, *, need_samples: bool = True) -> None:
        self._trainer = trainer
        self._source = train_source(trainer)
        if not self._source.is_defined():
            raise ValueError(
                "train_dataloaders: MaxBatchProbe needs training data, but found none: pass train_dataloaders or a"
                " datamodule to trainer.fit, or define train_dataloader in the module."
            )
        self._given = self._source.dataloader()
        if need_samples and not self.loaders:
            raise ValueError(
                f"train_dataloaders={type(self._given).__name__}: MaxBatchProbe needs a torch.utils.data.DataLoader to"
                " take samples from; for other loaders pass make_batch=, a function of the number of samples."
            )

    @property
    def loaders(self) -> list[DataLoader[Any]]:
        """All DataLoaders that make a training batch together; usually one."""
        return [leaf for leaf in tree_leaves(self._nested) if isinstance(leaf, DataLoader)]

    @property
    def _nested(self) -> Any:
        return self._given.iterables if isinstance(self._given, CombinedLoader) else self._given

    @property
    def batch_size(self) -> int | None:
        """The present batch size; None if a loader has none."""
        if not self.loaders:
            return getattr(self._given, "batch_size", None)
        size: int | None = self.loaders[0].batch_size
        return size if size is not None else getattr(self.loaders[0].batch_sampler, "batch_size", None)

    @property
    def drops_tails(self) -> bool:
        """Whether an incomplete last batch is dropped."""
        return any(getattr(loader.batch_sampler, "drop_last", False) for loader in self.loaders)

    @property
    def gives_batches(self) -> bool:
        """Whether the dataset's items are already batches, ``DataLoader(batch_size=None)``."""
        return any(loader.batch_sampler is None for loader in self.loaders)

    @property
    def samples(self) -> int | None:
        """Number of samples of the smallest dataset; None if unknown."""
        if self.gives_batches:
            return None
        sizes = [len(loader.dataset) for loader in self.loaders if hasattr(loader.dataset, "__len__")]
        return min(sizes, default=None)

    def largest(self) -> tuple[Callable[[int], Any], list[LargestSample]]:
        """Return a function that makes a batch of the largest samples in any size, and these samples."""
        found = {id(loader): largest_sample(_read_apart(loader.dataset)) for loader in self.loaders}

        def make(samples: int) -> Any:
            def collate(loader: DataLoader[Any]) -> Any:
                sample = found[id(loader)].sample
                return loader.collate_fn(sample if loader.batch_sampler is None else [sample] * samples)

            return tree_map_only(DataLoader, collate, self._nested)

        return make, list(found.values())

    def keepers(self, name: str | None = None) -> list[tuple[Any, str]]:
        """Return the objects that keep the batch size as attribute or hyperparameter, each with its name for it.

        Raises:
            ValueError: if no object has the given name.
        """
        found = list(_keepers(self._trainer, self._source.instance, name))
        if name is not None and not found:
            raise ValueError(
                f"batch_arg_name={name!r}: neither the data module nor the module has an attribute or a hyperparameter"
                " of this name: pass the name of their batch size."
            )
        return found

    def set_batch_size(self, size: int, name: str | None = None) -> Callable[[], None]:
        """Make the project train with batches of this size.

        Existing attributes and hyperparameters of the object that makes the loader are set. If that does not change the
        loader, or if the loader was passed to ``fit``, the loader itself is rebuilt.

        Args:
            size: samples per batch and process.
            name: the attribute that holds the batch size, if not one of the usual names.

        Returns:
            A function to call after the run, which removes what was added to the project for the run.

        Raises:
            ValueError: if there is no batch size anywhere.
        """
        owner, keepers = self._source.instance, self.keepers(name)
        if not self.loaders and not (keepers and self._source.is_module()):
            raise ValueError(
                f"train_dataloaders={type(self._given).__name__}: there is no batch size to set, since this is no"
                f" DataLoader: {_KEEP_ONE}"
            )
        for keeper, attribute in keepers:
            _set(keeper, attribute, size)
        undo: Callable[[], None] = _nothing
        if not self._source.is_module():
            self._source.instance = _with_batch_size(self._given, size)
        elif _size_of(self._source.dataloader()) != size:
            undo = _wrap_hook(owner, size)
        self._reload()
        return undo

    def _reload(self) -> None:
        """Set up the optimizers again if the loader was already loaded, by a schedule that depends on its length."""
        trainer = self._trainer
        if combined_loader(trainer) is not None:
            forget_loader(trainer)
            trainer.strategy.setup_optimizers(trainer)


def division_by_ranks(trainer: pl.Trainer, batch_size: int) -> str | None:
    """Return a warning if the project seems to have divided its batch size by the number of ranks.

    This is right for DDP, whose ranks share a batch. Here ranks share clients, each of which trains with whole batches,
    so dividing the batch size makes results depend on the number of ranks.

    Args:
        trainer: a Trainer with its train loader.
        batch_size: the loader's batch size.

    Returns:
        A sentence with both numbers and the remedy; None if there is no sign of it.
    """
    numbers = {"trainer.world_size": trainer.world_size, "trainer.num_devices": trainer.num_devices}
    for owner in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        for name, size in _sizes_kept(owner):
            for number, ranks in numbers.items():
                for parts in {ranks, ranks * trainer.accumulate_grad_batches}:
                    if ranks > 1 and batch_size != size and batch_size in (size // parts, -(-size // parts)):
                        return (
                            f"{type(owner).__name__}: {name}={size}, but training batches have {batch_size} samples, as"
                            f" if divided by {number}={ranks}. A client's batch is never split over ranks, so the"
                            " division makes results depend on their number: do not divide, and set"
                            f" {name}={batch_size} for batches of that size."
                        )
    return None


_BATCH_SIZE = re.compile(r"batch_?size|(^|_)bs(_|$)", re.IGNORECASE)
_NOT_OF_TRAINING = re.compile(r"val|test|eval|pred|infer", re.IGNORECASE)


def _sizes_kept(owner: Any) -> Iterator[tuple[str, int]]:
    """Yield attributes and hyperparameters, also nested ones, whose name is that of a batch size for training."""

    def walk(mapping: Mapping[Any, Any], path: str) -> Iterator[tuple[str, int]]:
        for key in mapping:
            try:
                value = mapping[key]
            except Exception:  # a missing value in OmegaConf
                continue
            name = f"{path}{key}"
            if isinstance(value, Mapping):
                yield from walk(value, f"{name}.")
            elif type(value) is int and _BATCH_SIZE.search(str(key)) and not _NOT_OF_TRAINING.search(name):
                yield name, value

    if owner is not None:
        yield from walk(getattr(owner, "hparams", {}), "hparams.")
        yield from walk({key: value for key, value in vars(owner).items() if type(value) is int}, "")


def _read_apart(dataset: Any) -> Any:
    """Return a copy of an iterable dataset, which may remember how far it was read; other datasets as they are."""
    if is_map_style(dataset):
        return dataset
    try:
        return copy.deepcopy(dataset)
    except Exception:
        return dataset


def _keepers(trainer: pl.Trainer, owner: Any, name: str | None) -> Iterator[tuple[Any, str]]:
    """Yield the objects that keep the batch size, each with its name for it."""
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    names = NAMES if name is None else (name,)
    places = [place for place in (data, module) if place is not None and (name is not None or place is owner)]
    for place in places:
        for attribute in names:
            holders = [place, getattr(place, "hparams", None)]
            found = [holder for holder in holders if holder is not None and _has(holder, attribute)]
            if found:
                yield from ((holder, attribute) for holder in found)
                break  # the next name means something else


def _has(holder: Any, name: str) -> bool:
    if isinstance(holder, Mapping):
        return name in holder
    value = getattr(holder, name, None)
    return isinstance(value, int) and not isinstance(value, bool)


def _set(holder: Any, name: str, size: int) -> None:
    if isinstance(holder, Mapping):
        holder[name] = size  # type: ignore[index]
    else:
        setattr(holder, name, size)


def _size_of(loader: Any) -> int | None:
    nested = loader.iterables if isinstance(loader, CombinedLoader) else loader
    sizes = {leaf.batch_size for leaf in tree_leaves(nested) if isinstance(leaf, DataLoader)}
    return sizes.pop() if len(sizes) == 1 else None


def _with_batch_size(loader: Any, size: int) -> Any:
    """Return the user's loader, or several in any nesting, with another batch size."""
    if isinstance(loader, CombinedLoader):
        mine = copy.copy(loader)
        mine.__init__(_with_batch_size(loader.iterables, size), loader._mode)  # type: ignore[misc]
        return mine
    return tree_map_only(DataLoader, lambda each: _resized(each, size), loader)


def _resized(loader: DataLoader[Any], size: int) -> DataLoader[Any]:
    if type(loader.batch_sampler) is not BatchSampler and loader.batch_size is None:
        raise ValueError(
            f"train_dataloaders={type(loader).__name__}: there is no batch size to set, since the loader has"
            f" batch_size=None and batch_sampler={type(loader.batch_sampler).__name__}: {_KEEP_ONE}"
        )
    own: dict[str, Any] = {"batch_size": size}
    if isinstance(loader.batch_sampler, BatchSampler):
        own["batch_sampler"] = BatchSampler(loader.batch_sampler.sampler, size, loader.batch_sampler.drop_last)
    if hasattr(loader, "__pl_saved_args"):
        # Lightning recorded these arguments to rebuild the loader with a DistributedSampler.
        noted = vars(loader)
        names, args = noted["__pl_saved_arg_names"], list(noted["__pl_saved_args"])
        if "batch_size" in names:
            args[names.index("batch_size")] = size
            own["__pl_saved_args"] = tuple(args)
        else:
            own["__pl_saved_kwargs"] = {**noted["__pl_saved_kwargs"], "batch_size": size}
    return copied_loader(loader, **own)


def _wrap_hook(owner: Any, size: int) -> Callable[[], None]:
    """Rebuild the loaders that ``train_dataloader()`` returns, for the length of the run."""
    original = owner.train_dataloader
    _with_batch_size(original(), size)  # raises now any error that it would raise later

    kept = vars(owner).get("train_dataloader")
    object.__setattr__(owner, "train_dataloader", _ResizedLoader(original, size))

    def undo() -> None:
        if kept is None:
            del vars(owner)["train_dataloader"]
        else:
            object.__setattr__(owner, "train_dataloader", kept)

    return undo


class _ResizedLoader:
    """Replaces a project's ``train_dataloader()``; copying the project restores the original."""

    def __init__(self, original: Callable[[], Any], size: int) -> None:
        self.__wrapped__ = original
        self._size = size

    def __call__(self) -> Any:
        return _with_batch_size(self.__wrapped__(), self._size)

    def __reduce__(self) -> tuple[Any, ...]:
        return as_it_was, (self.__wrapped__,)


def _nothing() -> None:
    pass
