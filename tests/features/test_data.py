"""The user's loader is honoured: its batches, order, workers and whatever they draw."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from datasets import Dataset as HFDataset
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    get_worker_info,
)

from lightning_fedscale import FederatedStrategy, Partition
from lightning_fedscale.devices import Population
from lightning_fedscale.utils import randomness
from tests.features import reference_loop
from tests.laws import reference
from tests.strategies import sequential

Batches = list[list[int]]


def indexed() -> reference_loop.Indexed:
    return reference_loop.Indexed(reference_loop.data())


def recorder(**options: object) -> reference_loop.Recorder:
    torch.manual_seed(0)
    return reference_loop.Recorder(**options)


def flat(batches: Batches) -> list[int]:
    return [position for batch in batches for position in batch]


def seen(loader: object, rounds: int = 2, **options: Any) -> Batches:
    """The positions of the local batches that this loader gives, in order."""
    module = recorder()
    reference_loop.fit(module, loader, max_epochs=rounds, **options)
    return module.seen


def expected(rounds: int = 2, **options: Any) -> Batches:
    clients = reference_loop.partition()
    return reference_loop.seen(range(rounds), clients, reference_loop.passes(clients, **options))


# ---- batches


def test_shuffled_anew_in_every_pass_or_in_the_datasets_own_order() -> None:
    clients = reference_loop.partition()
    shuffled = seen(DataLoader(indexed(), batch_size=8, shuffle=True))
    in_order = seen(DataLoader(indexed(), batch_size=8))
    assert shuffled == expected()
    held = [sorted(clients.client(client).tolist()) for client in range(4)]
    assert in_order == [part[i : i + 8] for part in held * 2 for i in range(0, len(part), 8)]
    half = len(in_order) // 2
    assert shuffled[:half] != shuffled[half:]
    assert sorted(flat(shuffled[:half])) == sorted(flat(shuffled[half:])) == list(range(45))


def test_drop_last_drops_each_clients_tail() -> None:
    got = seen(DataLoader(indexed(), batch_size=3, shuffle=True, drop_last=True))
    assert got == [batch for batch in expected(batch_size=3) if len(batch) == 3]
    assert len(got) < len(expected(batch_size=3))


@pytest.mark.parametrize("kind", [RandomSampler, SequentialSampler])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_batch_sampler_of_torch(kind: type[Sampler[int]], drop_last: bool) -> None:
    data = indexed()
    loader = DataLoader(data, batch_sampler=BatchSampler(kind(data), 3, drop_last))  # type: ignore[call-arg]
    whole = expected(batch_size=3, shuffle=kind is RandomSampler)
    assert seen(loader) == [batch for batch in whole if not drop_last or len(batch) == 3]


class Buckets(BatchSampler):
    """Batches of samples of similar length, here: of similar position."""

    def __iter__(self) -> Iterator[list[int]]:
        ordered = sorted(self.sampler)
        groups = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        yield from reversed(groups)


def test_a_batch_sampler_of_the_users_own() -> None:
    data = indexed()
    got = seen(DataLoader(data, batch_sampler=Buckets(RandomSampler(data), 4, False)))
    clients = reference_loop.partition()
    held = [sorted(clients.client(client).tolist()) for client in range(4)]
    one_pass = [batch for part in held for batch in [part[i : i + 4] for i in range(0, len(part), 4)][::-1]]
    assert got == one_pass * 2


def test_a_distributed_sampler_counts_as_the_shuffling_that_it_asks_for() -> None:
    data = indexed()
    for shuffle in (True, False):
        sampler: DistributedSampler[int] = DistributedSampler(data, num_replicas=2, rank=0, shuffle=shuffle)
        assert seen(DataLoader(data, batch_size=8, sampler=sampler)) == expected(shuffle=shuffle)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_without_batches(workers: int) -> None:
    class Single(reference_loop.Recorder):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            assert batch[0].shape == (12,)
            return super().training_step([part[None] for part in batch], batch_idx)

    torch.manual_seed(0)
    module = Single()
    reference_loop.fit(module, DataLoader(indexed(), batch_size=None, shuffle=True, num_workers=workers), max_epochs=2)
    assert module.seen == expected(batch_size=1)
    assert reference_loop.same(
        module.state_dict(),
        reference_loop.models(2, batches=reference_loop.passes(reference_loop.partition(), batch_size=1))[-1],
    )


class AskedForBatches(Dataset[tuple[Tensor, ...]]):
    """Reads whole batches at once, as a dataset over sparse matrices or a table does (scvi-tools, Hugging Face)."""

    def __init__(self) -> None:
        self.whole: reference_loop.Indexed | TensorDataset = indexed()

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, ...]:
        assert isinstance(indices, list)
        return self.whole[indices]  # type: ignore[index]


class Whole(AskedForBatches):
    """The same without the positions."""

    def __init__(self) -> None:
        self.whole = reference_loop.data()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_dataset_that_is_asked_for_whole_batches(workers: int, drop_last: bool) -> None:
    data = AskedForBatches()
    cut = BatchSampler(RandomSampler(data), 3, drop_last)
    got = seen(DataLoader(data, batch_size=None, sampler=cut, num_workers=workers))
    assert got == [batch for batch in expected(batch_size=3) if not drop_last or len(batch) == 3]


def test_a_dataset_that_is_asked_for_whole_batches_vectorized_and_on_simulated_hardware() -> None:
    def trained(data: Any, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = reference.Classifier(dropout=0.0)
        reference_loop.fit(module, data, strategy=options, max_epochs=2)
        return reference_loop.state_of(module)

    data = Whole()
    whole = DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 8, False))
    one_by_one = DataLoader(reference_loop.data(), batch_size=8, shuffle=True)
    for options in (
        {"executor": "vectorized"},
        {"executor": "sequential", "population": Population({"phone": 1.0}, batch_size="largest")},
    ):
        assert reference_loop.same(trained(whole, **options), trained(one_by_one, **options))


class MakesItsSampler(DataLoader[Any]):
    """Cannot be built anew with another sampler, as Lightning would for several processes (scvi-tools)."""

    def __init__(self, data: Any) -> None:
        super().__init__(data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), 8, False))


def test_in_a_single_process_the_evaluation_loaders_are_the_users_own() -> None:
    class Watches(reference_loop.Validated):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[int] = []

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.shapes.append(len(batch[0]))
            super().validation_step(batch, batch_idx)

        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.shapes.append(len(batch[0]))

    data = Whole()
    loader, module = MakesItsSampler(data), Watches()
    trainer = reference.quiet_trainer(strategy=FederatedStrategy(num_clients=2), max_epochs=1)
    trainer.fit(module, loader, MakesItsSampler(data))
    trainer.validate(module, MakesItsSampler(data), verbose=False)
    trainer.test(module, MakesItsSampler(data), verbose=False)
    assert module.shapes == [8, 8, 8, 8, 8, 5] * 3
    assert "_requires_distributed_sampler" not in vars(trainer._data_connector)


def test_the_loaders_own_generator_chooses_the_order() -> None:
    def order(seed: int) -> Batches:
        return seen(DataLoader(indexed(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(seed)))

    assert order(1) == order(1) != order(2)
    assert sorted(flat(order(1))) == sorted(flat(order(2)))


def test_a_tail_of_one_sample_joins_the_batch_before_it_where_there_is_batch_norm() -> None:
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0)).tolist()
    clients = Partition.from_lists([order[:9], order[9:26], order[26:45]])
    module = recorder(batch_norm=True, dropout=0.0)
    start = reference_loop.state_of(module)
    reference_loop.fit(
        module, DataLoader(indexed(), batch_size=8, shuffle=True), strategy={"partitioner": clients}, max_epochs=2
    )

    def merged(client: int, number: int) -> Batches:
        batches = reference_loop.passes(clients)(client, number)
        return batches if len(batches[-1]) > 1 else [*batches[:-2], batches[-2] + batches[-1]]

    assert module.seen == reference_loop.seen(range(2), clients, merged)
    assert {len(batch) for batch in module.seen} == {9, 8, 3}
    plain = reference.make_module(batch_norm=True, dropout=0.0)
    plain.load_state_dict(start)
    run = reference_loop.fed_avg(plain, reference_loop.data(), clients, merged)
    next(run)
    assert reference_loop.same(module.state_dict(), next(run))
    # Without BatchNorm a batch of one is a batch.
    module = recorder()
    reference_loop.fit(
        module, DataLoader(indexed(), batch_size=8, shuffle=True), strategy={"partitioner": clients}, max_epochs=1
    )
    assert {len(batch) for batch in module.seen} == {1, 8, 3}


# ---- where the data comes from


def split_in_two(whole: TensorDataset) -> ConcatDataset[tuple[Tensor, ...]]:
    return ConcatDataset([TensorDataset(*whole[:20]), TensorDataset(*whole[20:])])


def chosen(whole: TensorDataset) -> Subset[tuple[Tensor, ...]]:
    more = TensorDataset(*(torch.cat([part, part]) for part in whole.tensors))
    return Subset(more, [*range(10), *range(55, 90)])


def hugging_face(whole: TensorDataset) -> Any:
    inputs, labels = whole.tensors
    return HFDataset.from_dict({"inputs": inputs.numpy(), "labels": labels.numpy()}).with_format("torch")


class FromDict(reference.Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step([batch["inputs"], batch["labels"]], batch_idx)


@pytest.mark.parametrize(
    ("kind", "make"), [(reference.Classifier, split_in_two), (reference.Classifier, chosen), (FromDict, hugging_face)]
)
def test_other_datasets_give_the_same_model(kind: type[reference.Classifier], make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module = kind()
    reference_loop.fit(module, DataLoader(make(reference_loop.data()), batch_size=8, shuffle=True), max_epochs=2)
    assert reference_loop.same(module.state_dict(), reference_loop.models(2)[-1])


def test_a_datamodule_and_the_modules_own_loader_give_the_same_model() -> None:
    calls: list[str] = []

    class Data(pl.LightningDataModule):
        def prepare_data(self) -> None:
            calls.append("prepare")

        def setup(self, stage: str) -> None:
            calls.append(stage)
            self.samples = reference_loop.data()

        def train_dataloader(self) -> DataLoader[Any]:
            return reference.loader(self.samples)

        def teardown(self, stage: str) -> None:
            calls.append("teardown")

    class WithData(reference_loop.Validated):
        def train_dataloader(self) -> DataLoader[Any]:
            return reference.loader(reference_loop.data())

    strategy = {"partitioner": reference_loop.partition()}
    torch.manual_seed(0)
    first, second = reference_loop.Validated(), WithData()
    second.load_state_dict(first.state_dict())
    trainer = reference.quiet_trainer(strategy=sequential(**strategy), max_epochs=2)
    trainer.fit(first, datamodule=Data())
    assert calls == ["prepare", "fit", "teardown"]
    trainer = reference.quiet_trainer(strategy=sequential(**strategy), max_epochs=2)
    trainer.fit(second)
    third = reference_loop.models(2)[-1]
    assert reference_loop.same(first.state_dict(), third)
    assert reference_loop.same(second.state_dict(), third)


class Odd(DataLoader[Any]):
    """Its arguments are neither DataLoader's nor kept; it has an attribute that is set later."""

    scale = 1.0

    def __init__(self, samples: Dataset[Any], per_batch: int) -> None:
        super().__init__(samples, batch_size=per_batch, shuffle=True)

    def __iter__(self) -> Any:
        return ([inputs * self.scale, labels] for inputs, labels in super().__iter__())


@pytest.mark.parametrize("made", ["before", "in the hook"])
def test_a_loader_class_may_be_constructed_as_it_likes(made: str) -> None:
    def make() -> Odd:
        loader = Odd(reference_loop.data(), 8)
        loader.scale = 0.5
        return loader

    class WithData(reference_loop.Validated):
        def train_dataloader(self) -> DataLoader[Any]:
            return make()

    torch.manual_seed(0)
    module = WithData()
    strategy = sequential(partitioner=reference_loop.partition())
    reference.quiet_trainer(strategy=strategy, max_epochs=2).fit(module, make() if made == "before" else None)
    assert reference_loop.same(module.state_dict(), reference_loop.models(2, fetch=halved)[-1])


def halved(positions: list[int]) -> list[Tensor]:
    inputs, labels = reference_loop.data()[positions]
    return [inputs * 0.5, labels]


def test_the_users_own_loader_stays_as_it_was() -> None:
    loader = DataLoader(indexed(), batch_size=8, num_workers=1, persistent_workers=True)
    seen(loader)
    assert loader._iterator is None
    assert [batch[2].tolist() for batch in loader] == [list(range(i, min(i + 8, 45))) for i in range(0, 45, 8)]


# ---- what a batch is


class Parcel:
    """A batch of the user's own making."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels, self.moved = inputs, labels, 0

    def to(self, device: torch.device, non_blocking: bool = False) -> Parcel:
        parcel = Parcel(self.inputs.to(device), self.labels.to(device))
        parcel.moved = self.moved + 1
        return parcel


def parcels(samples: list[tuple[Tensor, ...]]) -> Parcel:
    return Parcel(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


def dicts(samples: list[tuple[Tensor, ...]]) -> dict[str, Any]:
    inputs, labels = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return {"inputs": inputs, "deep": {"labels": labels, "names": ["a"] * len(samples)}}


def tuples(samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*samples, strict=True))


class Unpacks(reference.Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, Parcel):
            assert batch.moved == 1
            batch = [batch.inputs, batch.labels]
        elif isinstance(batch, dict):
            batch = [batch["inputs"], batch["deep"]["labels"]]
        else:
            assert type(batch) is tuple
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("collate", [parcels, dicts, tuples])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_any_kind_from_a_custom_collate_function(collate: Callable[..., Any], workers: int) -> None:
    torch.manual_seed(0)
    module = Unpacks()
    loader = DataLoader(reference_loop.data(), batch_size=8, shuffle=True, collate_fn=collate, num_workers=workers)
    reference_loop.fit(module, loader, max_epochs=1)
    assert reference_loop.same(module.state_dict(), reference_loop.models(1)[-1])


# ---- workers


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True, "pin_memory": True},
        {"num_workers": 1, "prefetch_factor": 5},
        {"pin_memory": True},
    ],
)
def test_workers_give_the_same_model(options: dict[str, Any]) -> None:
    loader = DataLoader(reference_loop.data(), batch_size=8, shuffle=True, **options)
    _, module = reference_loop.fit(None, loader, max_epochs=3)
    assert reference_loop.same(module.state_dict(), reference_loop.models(3)[-1])


def start_worker(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    cast("WithBonus", info.dataset).bonus = 1000


class Watched(DataLoader[Any]):
    """Counts its iterations and shows with which settings they run; has arguments of its own."""

    iterated: list[DataLoader[Any]]

    def __init__(self, dataset: Dataset[Any], scale: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.scale = scale

    def __iter__(self) -> Any:
        Watched.iterated.append(self)
        return map(self.scaled, super().__iter__())

    def scaled(self, batch: Any) -> Any:
        return [batch[0] * self.scale, *batch[1:]]


class WithBonus(reference_loop.Indexed):
    bonus = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, labels, position = super().__getitem__(index)
        return inputs, labels, position + self.bonus


@pytest.mark.parametrize("persistent", [False, True])
def test_one_loader_with_the_users_settings_streams_all_clients_of_a_round(persistent: bool) -> None:
    Watched.iterated = []
    settings: dict[str, Any] = {
        "num_workers": 2,
        "persistent_workers": persistent,
        "worker_init_fn": start_worker,
        "prefetch_factor": 3,
        "timeout": 100,
        "collate_fn": lambda samples: torch.utils.data.default_collate(samples),
        "multiprocessing_context": "fork",
    }
    loader = Watched(WithBonus(reference_loop.data()), 0.5, batch_size=8, shuffle=True, **settings)
    module = recorder()
    reference_loop.fit(module, loader, max_epochs=3)
    assert len(Watched.iterated) == 3
    assert len(set(Watched.iterated)) == 1
    used = Watched.iterated[0]
    for name in ("num_workers", "persistent_workers", "worker_init_fn", "prefetch_factor", "timeout", "collate_fn"):
        assert getattr(used, name) == settings[name], name
    assert used.multiprocessing_context.get_start_method() == "fork"
    assert module.seen == [[position + 1000 for position in batch] for batch in expected(3)]

    assert reference_loop.same(module.state_dict(), reference_loop.models(3, fetch=halved)[-1])
    if persistent:
        assert used._iterator is None, "workers must not outlive fit"


class WorkerNames(reference_loop.Indexed):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, labels, _ = super().__getitem__(index)
        return inputs, labels, torch.tensor(os.getpid())


@pytest.mark.parametrize(("persistent", "processes"), [(True, 2), (False, 6)])
def test_persistent_workers_serve_every_round(persistent: bool, processes: int) -> None:
    loader = DataLoader(WorkerNames(reference_loop.data()), batch_size=8, num_workers=2, persistent_workers=persistent)
    assert len(set(flat(seen(loader, rounds=3)))) == processes


def test_out_of_order_workers_are_put_in_order() -> None:
    Watched.iterated = []
    reference_loop.fit(recorder(), Watched(indexed(), 1.0, batch_size=8, num_workers=2, in_order=False), max_epochs=1)
    assert [loader.in_order for loader in Watched.iterated] == [True]


# ---- random numbers


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Adds noise from all three global generators."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.samples[index]
        return inputs + random.gauss(0.0, 1.0) + np.random.normal() + torch.randn(12), labels

    def __len__(self) -> int:
        return len(self.samples)


def test_augmentation_in_the_main_process_draws_from_the_client() -> None:
    noisy = Noisy(reference_loop.data())
    _, module = reference_loop.fit(None, DataLoader(noisy, batch_size=8, shuffle=True), max_epochs=2)

    def fetch(positions: list[int]) -> list[Tensor]:
        return torch.utils.data.default_collate([noisy[position] for position in positions])

    assert reference_loop.same(module.state_dict(), reference_loop.models(2, fetch=fetch)[-1])


@pytest.mark.parametrize("batch_size", [8, None])
def test_augmentation_in_workers_does_not_depend_on_how_many_there_are(batch_size: int | None) -> None:
    class Kept(reference.Classifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.inputs: list[Tensor] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            inputs, labels = batch[0].reshape(-1, 12), batch[1].reshape(-1)
            self.inputs.append(inputs.clone())
            return super().training_step([inputs, labels], batch_idx)

    runs = []
    for workers in (1, 2, 3):
        torch.manual_seed(0)
        module = Kept()
        # Whatever the main process drew before must not matter either.
        torch.rand(workers)
        loader = DataLoader(Noisy(reference_loop.data()), batch_size=batch_size, shuffle=True, num_workers=workers)
        reference_loop.fit(module, loader, max_epochs=2)
        runs.append(torch.cat(module.inputs))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    order = flat(expected(batch_size=batch_size or 1))
    noise = runs[0] - reference_loop.data().tensors[0][order]
    assert len(noise.unique(dim=0)) == len(order), "no two samples share their noise, also not in another round"


class Transfers(reference.Classifier):
    """Draws at every step of a batch's way to the model."""

    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] + torch.randn(12), batch[1]]

    def transfer_batch_to_device(self, batch: list[Tensor], device: torch.device, dataloader_idx: int) -> list[Tensor]:
        return [batch[0] + random.gauss(0.0, 1.0), batch[1]]

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] * torch.rand(()) + np.random.normal(), batch[1]]


@pytest.mark.parametrize("per_round", [1, 3, 4])
def test_random_transfer_hooks_draw_from_the_client_whoever_is_first(per_round: int) -> None:
    torch.manual_seed(0)
    module = Transfers()
    strategy: dict[str, object] = {"clients_per_round": per_round}
    reference_loop.fit(module, noisy_loader(), strategy=strategy, max_epochs=3)
    noisy, plain = Noisy(reference_loop.data()), Transfers()

    def fetch(positions: list[int]) -> list[Tensor]:
        batch = torch.utils.data.default_collate([noisy[position] for position in positions])
        batch = plain.on_before_batch_transfer(batch, 0)
        batch = plain.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        return plain.on_after_batch_transfer(batch, 0)

    assert reference_loop.same(module.state_dict(), reference_loop.models(3, fetch=fetch, per_round=per_round)[-1])


def noisy_loader() -> DataLoader[Any]:
    return DataLoader(Noisy(reference_loop.data()), batch_size=8, shuffle=True)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_users_generators_are_untouched(workers: int) -> None:
    between: list[list[tuple[float, float, float]]] = []

    class Draws(pl.Callback):
        """Draws as the server does, around every round."""

        def on_train_batch_start(self, *args: object, **kwargs: object) -> None:
            between[-1].append(draw())

        on_round_start = on_round_end = on_train_batch_end = on_train_batch_start

    for per_round in (1, 3):
        torch.manual_seed(0)
        module = Transfers()
        randomness.seed_globals(7, torch.device("cpu"))
        between.append([])
        loader = DataLoader(Noisy(reference_loop.data()), batch_size=8, shuffle=True, num_workers=workers)
        reference_loop.fit(module, loader, strategy={"clients_per_round": per_round}, callbacks=[Draws()], max_epochs=2)
        between[-1].append(draw())
    randomness.seed_globals(7, torch.device("cpu"))
    alone = [draw() for _ in range(2 * 4 + 1)]
    assert between == [alone, alone]


def test_a_failing_round_leaves_the_users_generators_as_well() -> None:
    class Fails(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            super().__getitem__(index)
            raise LookupError("on purpose")

    for error_in in ("first batch", "transfer", "step"):
        torch.manual_seed(0)
        module = Transfers()
        loader = noisy_loader()
        if error_in == "first batch":
            loader = DataLoader(Fails(reference_loop.data()), batch_size=8)
        else:

            def fail(*args: object) -> None:
                raise LookupError("on purpose")

            name = {"transfer": "on_after_batch_transfer", "step": "training_step"}[error_in]
            module = type("Broken", (Transfers,), {name: fail})()
        randomness.seed_globals(7, torch.device("cpu"))
        with pytest.raises(LookupError, match="on purpose"):
            reference_loop.fit(module, loader, max_epochs=2)
        after = draw()
        randomness.seed_globals(7, torch.device("cpu"))
        assert after == draw(), error_in
