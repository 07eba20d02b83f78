"""What ranks logged under different names comes together by name: several ranks in one process, and no Trainer."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_fedscale.core.lightning.log_ranks import RankLog
from lightning_fedscale.utils import collectives


class Value(NamedTuple):
    """A value that a client logs."""

    client: int
    name: str
    value: float
    size: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)


def as_it_is(tensor: Tensor, **_: Any) -> Tensor:
    """What the strategy makes of a value in a single process."""
    return tensor


def alone(tensor: Tensor, **_: Any) -> Tensor:
    """With several, a client is alone, and afterwards nothing may be left for a collective."""
    assert Rank.training
    return tensor


class Rank:
    """A process: Lightning's results, and a module with torchmetrics."""

    training = False

    def __init__(self, ranks: int, rank: int) -> None:
        module: Any = nn.Module()
        module.mean = MeanMetric()
        module.device = torch.device("cpu")
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=alone if ranks > 1 else as_it_is))
        self.module = module
        self.results = _ResultCollection(training=True)
        self.joint = RankLog(self.module, self.results, ranks, rank)

    def train(self, values: list[Value]) -> np.ndarray:
        clients: dict[str, int] = {}
        Rank.training = True
        self.joint.open_round()
        for each in values:
            options = {"on_step": True, "on_epoch": True, "sync_dist": True, "reduce_fx": "mean", **each.options}
            dtype = options.pop("dtype", torch.float32)
            if "metric_attribute" in options:
                metric = self.module.mean
                metric(each.value, weight=each.size)
                logged: Any = metric
            else:
                logged = torch.tensor(each.value, dtype=dtype)
            self.results.dataloader_idx = options.pop("dataloader_idx", None)
            self.results.log(
                "training_step", each.name, logged, batch_size=each.size,
                sync_dist_fn=self.module.trainer.strategy.reduce, **options,
            )  # fmt: skip
            index = self.results.dataloader_idx
            clients["training_step." + each.name + ("" if index is None else f".{index}")] = each.client
        self.results.dataloader_idx = None
        Rank.training = False
        return self.joint.pack(clients) if self.joint.size else np.zeros(0)

    def shown(self, index: int | None = None) -> dict[str, float]:
        self.results.dataloader_idx = index
        found = {**self.results.metrics(on_step=False)["callback"], **self.results.metrics(on_step=True)["log"]}
        self.results.dataloader_idx = None
        return {name: float(value) for name, value in found.items()}


def rounds(course: list[list[Value]], ranks: int, *, epoch: int = 10) -> list[Rank]:
    """Train these rounds, a client on the rank of its number; results are reset after every ``epoch`` rounds."""
    processes = [Rank(ranks, rank) for rank in range(ranks)]
    for number, values in enumerate(course):
        if number and number % epoch == 0:
            for process in processes:
                process.results.reset()
        total = sum(
            process.train([each for each in values if each.client % ranks == rank])
            for rank, process in enumerate(processes)
        )
        if ranks > 1:
            for process in processes:
                process.joint.merge(np.array(total))
    return processes


def check(course: list[list[Value]], *, epoch: int = 10, index: int | None = None) -> dict[str, float]:
    """All ranks show what one process shows, under the same names in the same order."""
    (one,) = rounds(course, 1, epoch=epoch)
    expected = one.shown(index)
    for ranks in (2, 3):
        for process in rounds(course, ranks, epoch=epoch):
            assert process.shown(index) == pytest.approx(expected, rel=1e-6, nan_ok=True)
        orders = {tuple(process.results) for process in rounds(course, ranks, epoch=epoch)}
        assert len(orders) == 1
    return expected


def test_each_rank_logs_names_of_its_own() -> None:
    shown = check([[Value(0, "a", 1.0, 8), Value(1, "b", 2.0, 4), Value(2, "a", 4.0, 24), Value(3, "c", 5.0)]])
    assert shown["a_epoch"] == pytest.approx((8 + 4 * 24) / 32)
    assert (shown["b_epoch"], shown["c_epoch"], shown["a_step"]) == (2.0, 5.0, 4.0)


@pytest.mark.parametrize("kind", ["mean", "sum", "min", "max"])
@pytest.mark.parametrize("when", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_every_form_over_rounds_and_epochs(kind: str, when: tuple[bool, bool], dtype: torch.dtype) -> None:
    options = {"reduce_fx": kind, "on_step": when[0], "on_epoch": when[1], "dtype": dtype, "prog_bar": True}
    draws = np.random.default_rng(0)
    course = []
    for number in range(5):
        clients = [[0, 1, 2, 3], [3], [], [2, 4], [1, 5]][number]
        names = [[name for name in "abcde"[:: 1 if client % 2 else -1] if draws.random() < 0.6] for client in clients]
        course.append(
            [
                Value(client, name, float(draws.normal()), int(draws.integers(1, 9)), options)
                for client, own in zip(clients, names, strict=True)
                for name in own
            ]
        )
    for length in range(1, 6):
        check(course[:length], epoch=2)


def test_values_that_are_not_finite() -> None:
    for value in (math.nan, math.inf, -math.inf):
        check([[Value(0, "a", 1.0), Value(1, "a", value), Value(1, "b", value)], [Value(1, "b", 1.0)]])


def test_loaders_have_their_suffix() -> None:
    course = [[Value(0, "a", 1.0, 1, {"dataloader_idx": 1}), Value(1, "b", 2.0, 1, {"dataloader_idx": 1})]]
    assert {"a/dataloader_idx_1", "b_step/dataloader_idx_1"} <= set(check(course, index=1))


def test_names_that_do_not_fit_beside_the_table_take_a_collective_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = np.random.default_rng(0)
    course = [[Value(number % 4, draws.bytes(400).hex(), float(number)) for number in range(40)]]
    (one,) = rounds(course, 1)
    processes = [Rank(2, rank) for rank in range(2)]
    packed = [
        process.train([each for each in course[0] if each.client % 2 == rank]) for rank, process in enumerate(processes)
    ]
    news = [process.joint._news for process in processes]
    calls: list[Any] = []

    def gather(mine: Any, device: torch.device) -> list[Any]:
        calls.append(mine)
        return news

    monkeypatch.setattr(collectives, "gather_over_ranks", gather)
    for process in processes:
        process.joint.merge(packed[0] + packed[1])
        assert process.shown() == pytest.approx(one.shown())
    assert calls == news


def test_names_that_are_known_cross_as_numbers_only() -> None:
    values = [Value(client, name, 1.0) for client in range(2) for name in ("a", "b")]
    for process in rounds([values, values], 2):
        assert process.joint._news == []
        assert process.joint.size == 2 * (1 + 1024 + 2 * 5)


def test_without_sync_dist_each_rank_keeps_its_own() -> None:
    own = {"sync_dist": False}
    first, second = rounds([[Value(0, "a", 1.0, 1, own), Value(1, "b", 2.0, 1, own)]], 2)
    assert set(first.shown()) == {"a", "a_epoch", "a_step"}
    assert set(second.shown()) == {"b", "b_epoch", "b_step"}


def test_a_metric_that_one_rank_logs_is_asked_on_all() -> None:
    """torchmetrics reduces by itself, so every rank must ask it, in the same order."""
    metric = {"metric_attribute": "mean", "sync_dist": False}
    first, second = rounds([[Value(1, "m", 3.0, 2, metric)], [], [Value(1, "m", 5.0, 2, metric)]], 2, epoch=2)
    for process in (first, second):
        result = process.results["training_step.m"]
        assert result.value is process.module.mean
        assert not result.has_reset
        assert float(result._forward_cache) == 5.0
    assert first.results["training_step.m"].meta == second.results["training_step.m"].meta


def test_what_another_rank_made_is_what_lightning_would_make() -> None:
    """The name may be logged here later, and then Lightning compares all its options."""
    most = {"reduce_fx": "max", "on_step": False}
    course = [
        [Value(1, "a", 1.0, 2), Value(3, "b", 1.0, 1, most)],
        [Value(0, "a", 3.0, 2), Value(0, "b", 2.0, 1, most)],
    ]
    assert check(course)["a_epoch"] == 2.0
