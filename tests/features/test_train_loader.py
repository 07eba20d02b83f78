"""What callbacks find in ``trainer.train_dataloader``: the user's loader, whose length is in rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from tests.laws import reference
from tests.strategies import sequential

Loader = DataLoader[Any]


class Own(DataLoader[Any]):
    """A loader of the user's own kind, with an attribute that it makes when it is asked."""

    answer = 42

    @property
    def computed(self) -> str:
        return f"of {self.batch_size}"


class Cutter(BatchSampler):
    """A batch sampler of the user's own kind."""


def data() -> Any:
    return reference.dataset(40)


LOADERS: dict[str, Callable[[], Loader]] = {
    "plain": lambda: DataLoader(data(), batch_size=4),
    "shuffled": lambda: DataLoader(data(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "all arguments": lambda: DataLoader(
        data(),
        batch_size=4,
        drop_last=True,
        collate_fn=torch.utils.data.default_collate,
        num_workers=1,
        prefetch_factor=3,
        timeout=60,
        worker_init_fn=print,
        multiprocessing_context="fork",
    ),
    "batch sampler": lambda: DataLoader(data(), batch_sampler=BatchSampler(SequentialSampler(data()), 4, False)),
    "own batch sampler": lambda: DataLoader(data(), batch_sampler=Cutter(RandomSampler(data()), 4, True)),
    "whole batches": lambda: DataLoader(
        data(), batch_size=None, sampler=BatchSampler(SequentialSampler(data()), 4, False)
    ),
    "own kind": lambda: Own(data(), batch_size=4),
}


class Looks(pl.Callback):
    """Calls a function with the loader at every hook at which there is one."""

    def __init__(self, look: Callable[[Any], object]) -> None:
        self.look = look
        self.moments: list[str] = []


def _at(moment: str) -> Callable[..., None]:
    def hook(self: Looks, trainer: pl.Trainer, *_: Any) -> None:
        self.moments.append(moment)
        self.look(trainer.train_dataloader)

    return hook


MOMENTS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_round_start", "on_client_start",
    "on_before_backward", "on_client_end", "on_round_end", "on_train_batch_end", "on_train_end",
)  # fmt: skip
for each in MOMENTS:
    setattr(Looks, each, _at(each))


def fit(loader: Loader, look: Callable[[Any], object], **options: Any) -> dict[str, Tensor]:
    module = reference.make_module()
    looks = Looks(look)
    strategy = sequential(num_clients=4, rounds_per_epoch=3, **options)
    reference.quiet_trainer(strategy=strategy, callbacks=[looks], max_epochs=1).fit(module, loader)
    assert {*looks.moments} == {*MOMENTS}
    return module.state_dict()


@pytest.mark.parametrize("kind", LOADERS)
def test_its_attributes_are_those_of_the_users_loader(kind: str) -> None:
    loader = LOADERS[kind]()
    names = [name for name in dir(loader) if name[0] != "_"]
    assert {"dataset", "batch_size", "num_workers", "sampler", "batch_sampler", "collate_fn", "drop_last"} <= {*names}

    def look(found: Any) -> None:
        for name in names:
            assert getattr(found, name) == getattr(loader, name), name
        assert found.dataset is loader.dataset
        assert len(found) == 3
        for name in ("nothing", "_nothing"):
            assert not hasattr(found, name)

    fit(loader, look)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "all arguments"])
def test_whoever_iterates_over_it_sees_the_users_batches_and_changes_nothing(kind: str, cache: bool) -> None:
    """A callback that shows an example is common; the clients' rounds are none of its business."""
    if cache and kind in ("own batch sampler", "whole batches", "own kind"):
        return  # what cannot be cached is refused
    expected = fit(LOADERS[kind](), len, cache_dataset=cache)
    iterators: list[Iterator[Any]] = []

    def look(found: Any) -> None:
        inputs, labels = next(iter(found))
        assert inputs.shape == (4, 12)
        assert labels.shape == (4,)
        iterators.append(iter(found))
        assert all(len(next(each)[1]) == 4 for each in iterators[-2:])  # one goes on from an earlier hook
        if len(iterators) == 1:
            assert sum(len(batch[1]) for batch in found) == 40

    found = fit(LOADERS[kind](), look, cache_dataset=cache)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
