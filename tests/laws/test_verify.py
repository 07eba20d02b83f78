"""The fifth law: verify before trust. A vectorized module gives the sequential result, or trains sequentially."""

from __future__ import annotations

import contextvars
import functools
import itertools
import os
import random
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from lightning_fedscale import Partition, local_rules
from lightning_fedscale.core.executors.vectorized.proof import Proofs
from tests.laws.test_executors import Run, assert_alike
from tests.unit.test_stacking import KINDS

CLIENTS = 4
PARTS = Partition.from_lists([range(i * 24, i * 24 + 16 + 2 * i) for i in range(CLIENTS)])


def sentences() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randint(0, 6, (96, 5), generator=generator), torch.randint(0, 3, (96,), generator=generator)
    )


class Words(pl.LightningModule):
    """A table of embeddings, something in the middle, and a head."""

    def __init__(self, table: Callable[[], nn.Module], middle: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.table, self.middle, self.head = table(), middle(), nn.Linear(8, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.middle(self.table(batch[0]))
        loss = functional.cross_entropy(self.head(hidden.mean(1) if hidden.dim() == 3 else hidden), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Scatter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1]) % 2
        return torch.zeros(len(x), 2, 8, dtype=x.dtype).index_add(1, index, x)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(2).add_(1).relu_()


class Final(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.RNN]) -> None:
        super().__init__()
        self.rnn = kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


def embedding(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(6, 8, **options)


def normed(norm: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: norm(nn.Linear(8, 8))


MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "padding": lambda: Words(embedding(padding_idx=0)),
    "bounded norm": lambda: Words(embedding(max_norm=0.5)),
    "by frequency": lambda: Words(embedding(scale_grad_by_freq=True)),
    "bag": lambda: Words(lambda: nn.EmbeddingBag(6, 8, mode="mean", padding_idx=1)),
    "spectral norm": lambda: Words(embedding(), normed(nn.utils.parametrizations.spectral_norm)),
    "weight norm": lambda: Words(embedding(), normed(nn.utils.parametrizations.weight_norm)),
    "scatter": lambda: Words(embedding(), Scatter),
    "in place": lambda: Words(embedding(), InPlace),
    "lstm": lambda: Words(embedding(), lambda: Final(nn.LSTM)),
    "rnn": lambda: Words(embedding(), lambda: Final(nn.RNN)),
    "group norm": lambda: Words(embedding(), lambda: nn.GroupNorm(5, 5)),
    "attention": lambda: Words(embedding(), lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)),
}


def pair(make: Callable[[], pl.LightningModule], **options: Any) -> tuple[Run, Run]:
    options = {
        "data": sentences(),
        "partition": PARTS,
        "clients_per_round": None,
        **options,
    }
    return Run("vectorized", make, **options), Run("sequential", make, **options)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_trains_to_what_it_trains_to_alone(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vectorized, sequential = pair(MODULES[name])
    assert_alike(vectorized, sequential, rtol=1e-7)
    if name == "padding":
        assert vectorized.kind == "vectorized"
        assert torch.equal(vectorized.state["table.weight"][0], sequential.state["table.weight"][0])


class Reader(Words):
    """Its batches come in one of many kinds."""

    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__(nn.Identity)
        self.head = nn.Linear(4, 3)
        self.read = read

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.head(self.read(batch[0])), batch[1])


# Lightning itself does not move frozen dataclasses.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "frozen dataclass"])
def test_every_kind_of_batch_trains_to_what_it_trains_to_alone(kind: str) -> None:
    make, read = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(96, 4, generator=generator).double(), sentences().tensors[1])

    def collate(rows: list[Any]) -> Any:
        return make(torch.stack([x for x, _ in rows])), torch.stack([y for _, y in rows])

    vectorized, sequential = pair(lambda: Reader(read), data=data, loader={"collate_fn": collate})
    assert_alike(vectorized, sequential, rtol=1e-7)
    assert vectorized.kind == "vectorized"


def test_a_leaf_that_differs_makes_clients_train_alone() -> None:
    def collate(rows: list[Any]) -> Any:
        tokens, labels = (torch.stack(column) for column in zip(*rows, strict=True))
        return {"tokens": tokens, "label": labels, "scale": float(tokens.float().mean())}

    class Scaled(Words):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch["tokens"], batch["label"]], batch_idx) * batch["scale"]

    vectorized, sequential = pair(lambda: Scaled(embedding()), loader={"collate_fn": collate})
    assert "batch['scale'] is not a tensor and differs between clients" in vectorized.warnings[0]
    torch.testing.assert_close(vectorized.state, sequential.state, rtol=0, atol=0)


class FirstOnly(torch.autograd.Function):
    """A batching rule that takes every client for the first one, once it lies."""

    lies = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return x.select(in_dims[0], 0).expand_as(x) if FirstOnly.lies else x.clone(), in_dims[0]


class Believer(Words):
    def __init__(self) -> None:
        super().__init__(embedding())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = FirstOnly.apply(self.table(batch[0]))
        return functional.cross_entropy(self.head(hidden.mean(1)), batch[1])


class LiesFrom(Callback):
    """The batching rule begins to lie with a round."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        FirstOnly.lies = trainer.current_epoch >= self.round


def test_a_difference_is_named_and_ends_it() -> None:
    FirstOnly.lies = True
    vectorized, sequential = pair(Believer)
    assert len(vectorized.warnings) == 1
    assert re.search(r"differs from the same sequential step in the loss \(off by", vectorized.warnings[0])
    assert vectorized.kind == "sequential"
    torch.testing.assert_close(vectorized.state, sequential.state, rtol=0, atol=0)


# The eighth round is looked at, whatever was found in the seven before it.
@pytest.mark.parametrize("verify", [True, False])
def test_a_difference_that_shows_later_repeats_the_round(verify: bool) -> None:
    vectorized, sequential = pair(
        Believer, callbacks=[LiesFrom(7)], rounds=9, verify_executor=verify, loader={"shuffle": False}
    )
    if verify:
        assert len(vectorized.warnings) == 1
        assert "differs from the same sequential step" in vectorized.warnings[0]
        assert_alike(vectorized, sequential, rtol=1e-7)
    else:
        assert not vectorized.warnings
        assert not torch.allclose(vectorized.state["head.weight"], sequential.state["head.weight"], rtol=1e-3)


class Untidy(Words):
    """Writes to all that a step can reach, and then to what gives it away."""

    seen: Tensor

    def __init__(self, last: Callable[[Untidy, Tensor], object]) -> None:
        super().__init__(embedding())
        self.last = last
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
        self.kept: dict[str, Any] = {"table": [torch.zeros(2, dtype=torch.float64)], "count": 0}
        self.draws = torch.Generator().manual_seed(5)
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noise = 0.01 * torch.randn((), generator=self.draws)
        self.seen += self.frozen
        self.mean.update(1.0)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        loss = (
            super().training_step(batch, batch_idx)
            * (1 + noise)
            * self.frozen.sum()
            * (1 + self.kept["table"][0].sum())
        )
        self.last(self, loss.detach())
        return loss


WRITES: dict[str, Callable[[Untidy, Tensor], object]] = {
    "nothing more": lambda m, loss: None,
    "a frozen parameter": lambda m, loss: m.frozen.data.mul_(1.01),
    "a tensor in a list": lambda m, loss: m.kept["table"][0].add_(0.1),
    "past the version counter": lambda m, loss: m.kept["table"][0].data.add_(0.1),
    "through numpy": lambda m, loss: m.kept["table"][0].numpy().__iadd__(0.1),
    "a count": lambda m, loss: m.kept.update(count=m.kept["count"] + 1),
    "an error": lambda m, loss: float(loss),
}


@pytest.mark.parametrize("name", WRITES)
def test_an_attempt_that_fails_leaves_nothing_behind(name: str) -> None:
    vectorized, sequential = pair(lambda: Untidy(WRITES[name]))
    assert len(vectorized.warnings) == 1
    torch.testing.assert_close(vectorized.state, sequential.state, rtol=0, atol=0)
    mine, theirs = vectorized.module, sequential.module
    assert isinstance(mine, Untidy)
    assert isinstance(theirs, Untidy)
    assert torch.equal(mine.kept["table"][0], theirs.kept["table"][0])
    assert mine.kept["count"] == theirs.kept["count"]
    assert torch.equal(mine.draws.get_state(), theirs.draws.get_state())
    assert vectorized.trainer.callback_metrics["mean"] == sequential.trainer.callback_metrics["mean"]


COUNT = 0
COUNTS = {"steps": 0}
OF_THREAD = threading.local()
OF_CONTEXT: contextvars.ContextVar[int] = contextvars.ContextVar("count", default=0)
SETTINGS = types.ModuleType("settings_of_the_user")


class Counter:
    """Counts in its class, where no instance is at hand."""

    count = 0


def count_up() -> int:
    global COUNT
    COUNT += 1
    return COUNT


def count_in_itself() -> int:
    count_in_itself.count = vars(count_in_itself).get("count", 0) + 1  # type: ignore[attr-defined]
    return int(vars(count_in_itself)["count"])


@functools.lru_cache
def cached_counts() -> list[int]:
    return [0]


def counted(holder: Any, name: str) -> int:
    setattr(holder, name, getattr(holder, name) + 1)
    return int(getattr(holder, name))


def from_zero() -> None:
    """Not called by the module, whose own code is to name nothing but what it counts with."""
    global COUNT
    COUNT = Counter.count = COUNTS["steps"] = 0
    vars(count_in_itself).clear()
    vars(SETTINGS)["count"] = OF_THREAD.count = 0
    OF_CONTEXT.set(0)
    os.environ["STEPS_OF_A_TEST"] = "0"


def all_counts() -> list[Any]:
    own = dict(vars(count_in_itself)), vars(SETTINGS)["count"], OF_THREAD.count, OF_CONTEXT.get()
    return [COUNT, Counter.count, COUNTS["steps"], *own, os.environ["STEPS_OF_A_TEST"]]


def count_in_context() -> int:
    OF_CONTEXT.set(OF_CONTEXT.get() + 1)
    return OF_CONTEXT.get()


def count_in_environment() -> int:
    os.environ["STEPS_OF_A_TEST"] = str(int(os.environ["STEPS_OF_A_TEST"]) + 1)
    return int(os.environ["STEPS_OF_A_TEST"])


class Drifting(Words):
    """What it counts outside of itself, or cannot be brought back, changes a step by less than rounding."""

    def __init__(self, count: Callable[[Drifting], float]) -> None:
        super().__init__(embedding())
        self.count = count

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 1e-13 * self.count(self))


class Iterating(Drifting):
    def __init__(self, numbers: Callable[[], Iterator[int]]) -> None:
        super().__init__(lambda module: next(module.numbers))  # type: ignore[call-overload]
        self.numbers = numbers()


def lines() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


DRIFTS: dict[str, Callable[[], Drifting]] = {
    "a global variable": lambda: Drifting(lambda _: count_up()),
    "a global dict": lambda: Drifting(lambda _: COUNTS.update(steps=COUNTS["steps"] + 1) or COUNTS["steps"]),
    "an attribute of a class": lambda: Drifting(lambda _: counted(Counter, "count")),
    "an attribute of a function": lambda: Drifting(lambda _: count_in_itself()),
    "an attribute of a Python module": lambda: Drifting(lambda _: counted(SETTINGS, "count")),
    "a thread's own variable": lambda: Drifting(lambda _: counted(OF_THREAD, "count")),
    "a context variable": lambda: Drifting(lambda _: count_in_context()),
    "an environment variable": lambda: Drifting(lambda _: count_in_environment()),
    "a generator": lambda: Iterating(lines),
    "a counter of itertools": lambda: Iterating(itertools.count),
    "a cycle": lambda: Iterating(lambda: itertools.cycle(range(1000))),
    "an iterator of a list": lambda: Iterating(lambda: iter(list(range(1000)))),
}


@pytest.mark.parametrize("executor", ["vectorized", "auto"])
@pytest.mark.parametrize("name", DRIFTS)
def test_what_a_step_counts_outside_of_its_module_is_counted_once_for_every_step(name: str, executor: str) -> None:
    runs, counts = [], []
    for each in ("sequential", executor):
        from_zero()
        runs.append(Run(each, DRIFTS[name], data=sentences(), partition=PARTS, clients_per_round=None))
        counts.append(all_counts())
    assert runs[1].kind == "sequential"
    assert counts[0] == counts[1]
    torch.testing.assert_close(runs[1].state, runs[0].state, rtol=0, atol=0)


def test_global_variables_that_stay_do_not_keep_clients_from_being_vectorized() -> None:
    from_zero()
    vectorized, _ = pair(lambda: Drifting(lambda _: COUNTS["steps"] + cached_counts()[0] + Counter.count))
    assert vectorized.kind == "vectorized"


class Last(Words):
    """The client's last batch counts for more."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (3.0 if self.trainer.is_last_batch else 1.0)


@pytest.mark.parametrize("alike", [True, False])
def test_the_last_batch_is_each_clients_own(alike: bool) -> None:
    sizes = [16] * CLIENTS if alike else [8, 16, 16, 24]
    partition = Partition.from_lists([range(i * 24, i * 24 + size) for i, size in enumerate(sizes)])
    vectorized, sequential = pair(lambda: Last(embedding()), partition=partition)
    assert_alike(vectorized, sequential, rtol=1e-7)
    assert vectorized.kind == ("vectorized" if alike else "sequential")
    assert alike or "trainer.is_last_batch" in vectorized.warnings[0]


def test_a_second_training_in_a_round_that_fell_back_leaves_the_generators() -> None:
    class Drops(Words):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = functional.dropout(super().training_step(batch, batch_idx), 0.1)
            return loss + 0.0 * float(loss)  # which vmap refuses

    states = []
    for executor in ("vectorized", "sequential"):
        run = Run(
            executor, lambda: Drops(embedding()), data=sentences(), rounds=2, personal=local_rules.Ditto(0.1),
            clients_per_round=None,
            partition=Partition.from_lists([range(i * 24, i * 24 + 16) for i in range(CLIENTS)]),
        )  # fmt: skip
        assert run.kind == "sequential"
        states.append((torch.get_rng_state(), random.getstate()))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_when_a_client_is_watched() -> None:
    proofs = Proofs(while_training=True)
    with proofs.of_everything():
        assert proofs.watched([0, 1, 2], "form", 0) == [0, 1, 2]
    steps = {}
    for round in range(1, 20):
        proofs.open_round(round - 1)
        if round == 11:
            proofs.demand()
        proofs.choose(2)
        steps[round] = [proofs.watched([1, 2], "form", step) for step in range(3)].count([1])
        proofs.close_wave()
    assert {round: count for round, count in steps.items() if count} == {1: 3, 2: 3, 4: 3, 8: 3, 11: 1, 16: 3}
    assert proofs.watched([0, 1], "another form", 5) == [0]
    assert proofs.watched([0, 1], "another form", 5) == []
    resumed = Proofs(while_training=True)
    resumed.open_round(20)
    assert resumed.due
    assert Proofs(while_training=False).watched([0, 1], "form", 0) == []


def test_the_comparison_changes_no_bit() -> None:
    runs = [
        Run("vectorized", lambda: Words(embedding(), lambda: nn.Dropout(0.3)), data=sentences(), rounds=5,
            partition=Partition.from_lists([range(24 * i, 24 * i + 24) for i in range(CLIENTS)]),
            clients_per_round=None, verify_executor=verify)
        for verify in (True, False)
    ]  # fmt: skip
    assert runs[0].kind == runs[1].kind == "vectorized"
    torch.testing.assert_close(runs[0].state, runs[1].state, rtol=0, atol=0)


def test_a_run_that_gave_up_is_resumed_as_it_went_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": sentences(),
        "partition": Partition.from_lists([range(24 * i, 24 * i + 24) for i in range(CLIENTS)]),
        "clients_per_round": None,
    }
    FirstOnly.lies = True
    whole, half = (Run("vectorized", Believer, rounds=rounds, **options) for rounds in (4, 2))
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    FirstOnly.lies = False  # so that a new dry run would find nothing
    resumed = Run("vectorized", Believer, rounds=4, ckpt_path=str(tmp_path / "half.ckpt"), **options)
    assert resumed.kind == "sequential"
    torch.testing.assert_close(resumed.state, whole.state, rtol=0, atol=0)
