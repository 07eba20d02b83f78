"""Plain PyTorch loops of whole rounds, with which the tests of this folder compare Lightning's features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedscale import Partition
from lightning_fedscale.core.plan import client_seed, pass_order
from lightning_fedscale.samplers import uniform
from lightning_fedscale.utils import randomness
from tests.laws import reference
from tests.strategies import sequential

State = dict[str, Tensor]
Batches = Callable[[int, int], list[list[int]]]
"""``(client, number of the pass) -> batches``"""

SIZES = (3, 8, 13, 21)


def partition() -> Partition:
    """Four clients that hold 3, 8, 13 and 21 samples of `data`."""
    order = torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(3)).split(SIZES)
    return Partition.from_lists([part.tolist() for part in order])


def data(samples: int = sum(SIZES)) -> TensorDataset:
    return reference.dataset(samples)


class Indexed(Dataset[tuple[Tensor, ...]]):
    """A dataset whose samples end with their own position."""

    def __init__(self, tensors: TensorDataset) -> None:
        self.tensors = tensors.tensors

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return (*(tensor[index] for tensor in self.tensors), torch.tensor(index))

    def __len__(self) -> int:
        return len(self.tensors[0])


class Recorder(reference.Classifier):
    """Notes the positions of every local batch that it is trained on."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[2].tolist())
        return super().training_step(batch[:2], batch_idx)


def passes(
    clients: Partition, *, batch_size: int = 8, shuffle: bool = True, seed: int = 0, keep: slice = slice(None)
) -> Batches:
    """Every pass cut into batches, of which ``keep`` are used."""

    def batches(client: int, number: int) -> list[list[int]]:
        order = pass_order(clients.client(client), shuffle=shuffle, seed=seed, client=client, number=number).tolist()
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)][keep]

    return batches


def cohort(round: int, clients: Partition, per_round: int | None = None, seed: int = 0) -> list[int]:
    wanted = per_round or len(clients)
    return uniform(seed=seed, round=round, num_clients=len(clients), clients_per_round=wanted).tolist()


def seen(rounds: range, clients: Partition, batches: Batches, per_round: int | None = None) -> list[list[int]]:
    """The local batches of these rounds in order, one pass a round."""
    return [batch for r in rounds for client in cohort(r, clients, per_round) for batch in batches(client, r)]


def fed_avg(
    module: reference.Classifier,
    samples: TensorDataset,
    clients: Partition,
    batches: Batches,
    *,
    per_round: int | None = None,
    first: int = 0,
    seed: int = 0,
    lr: Callable[[int], float] | None = None,
    accumulate: Callable[[int], int] = lambda round: 1,
    losses: list[float] | None = None,
    fetch: Callable[[list[int]], list[Tensor]] | None = None,
) -> Iterator[State]:
    """The global model after round ``first``, after the next one, and so on without end.

    Args:
        lr, accumulate: learning rate and accumulated batches in a round, where they are not the module's own and 1.
        losses: gets the mean loss per sample of every round.
        fetch: makes a batch of these positions, where it is not the plain samples.
    """
    fetch = fetch or (lambda positions: [tensor[positions] for tensor in samples.tensors])
    module.train()
    server = {name: value.clone() for name, value in module.state_dict().items()}
    for round in itertools.count(first):
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in server.items()}
        weight, loss_sum, count, window = 0, 0.0, 0, accumulate(round)
        for client in cohort(round, clients, per_round, seed):
            module.load_state_dict(server)
            randomness.seed_globals(client_seed(seed, round, client), torch.device("cpu"))
            optimizer = module.configure_optimizers()
            if lr is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr(round)
            mine = batches(client, round)
            for index, positions in enumerate(mine):
                inputs, labels = fetch(positions)
                if index % window == 0:
                    optimizer.zero_grad()
                loss = nn.functional.cross_entropy(module.net(inputs), labels)
                (loss / window).backward()
                if (index + 1) % window == 0 or index + 1 == len(mine):
                    optimizer.step()
                loss_sum += float(loss) * len(positions)
                count += len(positions)
            held = len(clients.client(client))
            weight += held
            for name, value in module.state_dict().items():
                total[name] += held * (server[name].double() - value.double())
        moved = {name: server[name].double() - total[name] / weight for name in server}
        server = {
            name: (value if server[name].is_floating_point() else value.round()).to(server[name].dtype)
            for name, value in moved.items()
        }
        if losses is not None:
            losses.append(loss_sum / count)
        yield {name: value.clone() for name, value in server.items()}


def models(rounds: int, samples: TensorDataset | None = None, **options: object) -> list[State]:
    """The global models of `fed_avg` with the usual model, data, clients and loader; the initial one comes first."""
    module, clients = reference.make_module(), partition()
    start = state_of(module)
    keywords = {"batches": passes(clients), **options}
    run = fed_avg(module, samples or data(), clients, **keywords)  # type: ignore[arg-type]
    return [start, *itertools.islice(run, rounds)]


def validation_data() -> TensorDataset:
    return TensorDataset(*reference.dataset(90)[45:])


def validation_loss(state: State) -> float:
    module = reference.make_module().eval()
    module.load_state_dict(state)
    inputs, labels = validation_data().tensors
    with torch.no_grad():
        return nn.functional.cross_entropy(module.net(inputs), labels).item()


def state_of(module: pl.LightningModule) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Validated(reference.Classifier):
    """Also validates."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class Snapshots(pl.Callback):
    """The model that callbacks find at an event, and the round."""

    def __init__(self) -> None:
        self.after_round: list[State] = []
        self.validated: list[tuple[int, State]] = []
        self.sane: list[State] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.after_round.append(state_of(pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            self.sane.append(state_of(pl_module))
        else:
            self.validated.append((trainer.global_step, state_of(pl_module)))


def fit(
    module: pl.LightningModule | None = None,
    train: object = None,
    *,
    strategy: dict[str, object] | None = None,
    validate: bool = False,
    ckpt_path: str | None = None,
    **options: object,
) -> tuple[pl.Trainer, pl.LightningModule]:
    """Federated training of the usual model, data and clients, in batches of 8, shuffled."""
    if module is None:
        torch.manual_seed(0)
        module = Validated()
    trainer = reference.quiet_trainer(
        strategy=sequential(**{"partitioner": partition(), **(strategy or {})}),
        **options,
    )
    train = reference.loader(data()) if train is None else train
    validation = DataLoader(validation_data(), batch_size=8) if validate else None
    trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    return trainer, module
