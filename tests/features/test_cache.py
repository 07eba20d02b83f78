"""Data kept on the device: the same batches to the bit, and no DataLoader at all."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset, default_collate

from lightning_fedscale import Partition
from lightning_fedscale.core.executors import DeviceData, loader
from lightning_fedscale.core.executors import device_cache as cache
from tests.features import local_loops, reference_loop
from tests.laws import reference
from tests.strategies import sequential

CPU = torch.device("cpu")


def kept(train: DataLoader[Any], mode: Any = "auto", **options: Any) -> DeviceData | None:
    return cache.device_data(train, mode, CPU, seed=0, show_progress=False, **options)


def tensors(**extra: Tensor) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(45, 3, 4, 4, generator=generator)
    return TensorDataset(
        images.to(memory_format=torch.channels_last),
        torch.randn(2, 45, generator=generator).t(),
        torch.randint(0, 4, (45,), generator=generator),
        images[:, 0, 0].bfloat16(),
        images[:, 0, 0, 0] > 0,
        torch.view_as_complex(images[:, 0, :, :2].contiguous()),
        torch.zeros(1, 2).expand(45, 2),
        torch.randn(45, 0),
    )


def assert_same(left: Any, right: Any) -> None:
    """Types, bits, strides."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride())
        assert torch.equal(left, right)
        assert left.untyped_storage().data_ptr() % 64 == right.untyped_storage().data_ptr() % 64
        assert left.storage_offset() == right.storage_offset()
        return
    assert len(left) == len(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        left, right = left.values(), right.values()
    for one, other in zip(left, right, strict=True):
        assert_same(one, other)


SUBSETS: dict[str, Any] = {
    "all": lambda data: data,
    "subset": lambda data: Subset(data, list(range(44, 4, -2))),
    "subset of a subset": lambda data: Subset(Subset(data, torch.randperm(45).tolist()), range(3, 30)),
    "split": lambda data: torch.utils.data.random_split(data, [30, 15])[1],
    "numpy": lambda data: Subset(data, np.arange(10, 40)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("how", SUBSETS)
def test_a_batch_is_what_the_loader_collates(how: str) -> None:
    data = SUBSETS[how](tensors())
    found = kept(DataLoader(data, batch_size=8))
    assert found is not None
    order = torch.randperm(len(data)).tolist()
    for indices in (order[:8], order[8:11], order[:1]):
        expected = default_collate([data[i] for i in indices])
        assert_same(found.batch(indices), expected)
        assert_same(found.batch(torch.tensor(indices)), expected)
    many = [order[i : i + 2] for i in range(0, len(order) - 1, 2)] * 20
    for indices, batch in zip(many, found.batches(iter(many)), strict=True):
        assert_same(batch, default_collate([data[i] for i in indices]))
    stacked = found.stacked([order[:4], order[4:8]])
    for leaf, one, other in zip(stacked, found.batch(order[:4]), found.batch(order[4:8]), strict=True):
        assert torch.equal(leaf, torch.stack([one, other]))


def test_data_on_the_device_already_is_not_copied() -> None:
    data = reference_loop.data()
    found = kept(DataLoader(data, batch_size=8))
    assert found is not None
    data.tensors[0][3] = 7.0
    assert (found.batch([3])[0] == 7.0).all()


class OwnDataset(TensorDataset):
    pass


class OwnLoader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return super().__iter__()


class OwnBatches(BatchSampler):
    pass


def collate(samples: list[Any]) -> Any:
    return default_collate(samples)


def nothing(worker: int) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda d: DataLoader(d, batch_size=None, sampler=None), "batch_size=None"),
        (lambda d: DataLoader(d, batch_size=4, collate_fn=collate), "collate_fn=collate"),
        (lambda d: DataLoader(d, batch_sampler=OwnBatches(RandomSampler(d), 4, False)), "batch_sampler=OwnBatches"),
        (lambda d: OwnLoader(d, batch_size=4), "OwnLoader"),
        (lambda d: DataLoader(d, batch_size=4, num_workers=1, worker_init_fn=nothing), "worker_init_fn=nothing"),
    ],
)
def test_loaders_that_may_make_other_batches(make: Any, reason: str) -> None:
    train = make(reference_loop.data())
    assert kept(train) is None
    with pytest.raises(ValueError, match=rf"cache_dataset=True: .*{reason}.*cache_dataset=False"):
        kept(train, True)


@pytest.mark.parametrize(
    "data",
    [
        OwnDataset(torch.zeros(4)),
        reference_loop.Indexed(reference_loop.data()),
        TensorDataset(torch.zeros(4, requires_grad=True)),
        TensorDataset(torch.eye(4).to_sparse()),
        TensorDataset(nn.Parameter(torch.zeros(4), requires_grad=False)),
        Subset(TensorDataset(torch.zeros(4)), [0, -1]),
    ],
)
def test_auto_takes_plain_tensors_only(data: Any) -> None:
    assert kept(DataLoader(data, batch_size=2)) is None
    assert kept(DataLoader(reference_loop.data(), batch_size=2), False) is None


def test_auto_needs_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with little free memory, to which the data would have to be copied."""
    data = TensorDataset(torch.zeros(100, dtype=torch.float64))
    device = torch.device("meta")

    def found(mode: Any, free: int) -> DeviceData | None:
        monkeypatch.setattr(cache, "free_memory", lambda device: free)
        return cache.device_data(DataLoader(data, batch_size=2), mode, device, seed=0, show_progress=False)

    assert found("auto", 3199) is None
    assert found("auto", 3200) is not None
    assert found(True, 800) is not None
    with pytest.raises(ValueError, match=r"cache_dataset=True: the dataset takes .* GB and meta has .* GB free"):
        found(True, 799)


# ---- cache_dataset=True

Pair = namedtuple("Pair", ["left", "right"])


class Nested(Dataset[Any]):
    """Samples of every form that the default collate function knows; draws random numbers and counts."""

    def __init__(self, length: int = 45) -> None:
        self.length = length
        self.reads: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        noise = torch.rand(3) + random.random() + np.random.random()
        return {
            "inputs": torch.arange(4.0) + index,
            "numbers": (index, index / 2, np.float32(index), np.arange(2) * index),
            "pair": Pair(torch.tensor(index), [noise]),
        }

    def __len__(self) -> int:
        return self.length


class Still(Nested):
    def __getitem__(self, index: int) -> Any:
        random.seed(index)
        np.random.seed(index)
        torch.manual_seed(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_samples_that_can_be_stacked(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SAMPLES_PER_READ", 16)
    data = Still()
    assert kept(DataLoader(data, batch_size=8)) is None
    found = kept(DataLoader(data, batch_size=8, num_workers=workers), True)
    assert found is not None
    assert data.reads == ([] if workers else list(range(45)))
    for indices in ([3, 1, 40], [44]):
        assert_same(found.batch(indices), default_collate([data[i] for i in indices]))
    assert found.stacked([[0, 1], [2, 3], [4, 5]])["pair"].right[0].shape == (3, 2, 3)


def test_reading_touches_no_global_generator_and_is_reproducible() -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]

    before = states()
    first, second = (kept(DataLoader(Nested(), batch_size=8), True) for _ in range(2))
    assert states() == before
    assert first is not None
    assert second is not None
    assert torch.equal(first.batch([5])["pair"].right[0], second.batch([5])["pair"].right[0])
    other = cache.device_data(DataLoader(Nested(), batch_size=8), True, CPU, seed=1, show_progress=False)
    assert other is not None
    assert not torch.equal(first.batch([5])["pair"].right[0], other.batch([5])["pair"].right[0])


class Listed(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


@pytest.mark.parametrize(
    "samples",
    [
        [torch.zeros(2), torch.zeros(3)],
        [(torch.zeros(1), "text"), (torch.zeros(1), "other")],
        [{"a": 1}, {"b": 1}],
        [None, None],
        [torch.zeros(2)] * 20 + [torch.zeros(3)] * 20,  # each read alone could be
    ],
)
def test_samples_that_cannot_be_stacked(samples: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SAMPLES_PER_READ", 20)
    with pytest.raises(ValueError, match=r"cache_dataset=True: the samples of dataset=Listed cannot be stacked"):
        kept(DataLoader(Listed(samples), batch_size=2), True)


def test_errors_of_the_dataset_are_its_own() -> None:
    class Broken(Listed):
        def __getitem__(self, index: int) -> Any:
            raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        kept(DataLoader(Broken([1, 2]), batch_size=2), True)


# ---- in a run


def run(
    train: Any, cached: Any, module: type[pl.LightningModule] = reference.Classifier, **options: Any
) -> list[reference_loop.State]:
    snapshots = reference_loop.Snapshots()
    trainer_options = {"max_epochs": 3, **options.pop("trainer", {})}
    strategy = sequential(**{"partitioner": reference_loop.partition(), "cache_dataset": cached, **options})
    trainer = reference.quiet_trainer(strategy=strategy, callbacks=[snapshots], **trainer_options)
    trainer.fit(local_loops.make(module, dropout=0.3, batch_norm=True), train)
    return snapshots.after_round


class Augments(reference.Classifier):
    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]] if self.training else batch


RUNS: dict[str, dict[str, Any]] = {
    "shuffled": {"shuffle": True},
    "in order": {},
    "drop_last": {"drop_last": True, "batch_size": 3},
    "workers": {"shuffle": True, "num_workers": 2},
    "subset": {"data": lambda: Subset(TensorDataset(*reference.dataset(90)[:]), range(20, 65)), "shuffle": True},
    "single samples": {"batch_size": 4, "shuffle": True},  # BatchNorm: a tail batch of one is joined to another
    "share": {"shuffle": True, "trainer": {"limit_train_batches": 0.5}},
    "local steps": {"shuffle": True, "local_steps": 5, "client_optimizer": "keep"},
    "double": {"shuffle": True, "trainer": {"precision": "64-true"}},
    "half": {"shuffle": True, "trainer": {"precision": "bf16-true"}},
    "transfer hook": {"shuffle": True, "module": Augments},
}


@pytest.mark.parametrize("name", RUNS)
def test_same_bits_with_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"batch_size": 8, **RUNS[name]}
    data = options.pop("data", reference_loop.data)()
    keys = ("batch_size", "shuffle", "drop_last", "num_workers")
    arguments = {key: options.pop(key) for key in keys if key in options}
    without = run(DataLoader(data, **arguments), False, **options)
    # With the cache, nobody asks for a DataLoader's iterator.
    monkeypatch.setattr(loader.ClientLoader, "_copy", None)
    for mode in ("auto", True):
        for got, right in zip(run(DataLoader(data, **arguments), mode, **options), without, strict=True):
            assert reference_loop.same(got, right)


class Asked(reference.Classifier):
    """Draws from the global generators around every round."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.drawn: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.drawn.append((random.random(), np.random.random(), float(torch.rand(()))))


@pytest.mark.parametrize("cached", ["auto", False])
def test_global_generators_are_the_users(cached: Any) -> None:
    """Outside of clients, the user's numbers go on as if nobody had trained."""
    from lightning.pytorch import seed_everything

    module = local_loops.make(Asked)
    seed_everything(3, verbose=False)
    reference_loop.fit(module, strategy={"cache_dataset": cached}, max_epochs=4)
    seed_everything(3, verbose=False)
    assert module.drawn == [(random.random(), np.random.random(), float(torch.rand(()))) for _ in range(4)]


def test_frozen_samples_in_a_run() -> None:
    """Every sample is read once, whatever the number of rounds."""

    class Noisy(Dataset[Any]):
        def __init__(self) -> None:
            self.reads: list[int] = []
            self.inputs, self.labels = reference_loop.data().tensors

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.reads.append(index)
            return self.inputs[index] + torch.randn(12), self.labels[index]

        def __len__(self) -> int:
            return len(self.labels)

    data = Noisy()
    models = run(DataLoader(data, batch_size=8), True, trainer={"max_epochs": 5})
    assert data.reads == list(range(45))
    again = run(DataLoader(Noisy(), batch_size=8), True, trainer={"max_epochs": 5})
    assert reference_loop.same(models[-1], again[-1])


def test_a_new_loader_is_a_new_cache() -> None:
    class Reloaded(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            assert self.trainer is not None
            data = TensorDataset(torch.full((8, 12), float(self.trainer.current_epoch)), torch.zeros(8).long())
            return DataLoader(data, batch_size=8)

    class Seen(reference.Classifier):
        seen: list[float] = []  # noqa: RUF012

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.seen.append(float(batch[0].mean()))
            return super().training_step(batch, batch_idx)

    Seen.seen = []
    strategy = sequential(partitioner=Partition.from_lists([range(8)]))
    trainer = reference.quiet_trainer(strategy=strategy, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(Seen(), Reloaded())
    assert Seen.seen == [0.0, 1.0, 2.0]
