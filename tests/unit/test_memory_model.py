"""The memory model: its parts, the largest batch within a budget, and batches of any size."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_fedscale.devices import ON_CLIENT, MemoryModel, estimate_memory
from lightning_fedscale.devices.profiling.batches import resized, samples_in
from lightning_fedscale.devices.profiling.costs import StepCost
from lightning_fedscale.devices.profiling.dry_run import DryRunResult
from lightning_fedscale.devices.profiling.memory_tracker import Peak
from lightning_fedscale.devices.profiling.search import largest_within
from lightning_fedscale.utils.memory import format_bytes
from tests.memory_models import model_of, small
from tests.networks import Classifier, mlp, vectors


def test_extras_are_bytes_per_number() -> None:
    module = Classifier(mlp())
    plain, client = small(), estimate_memory(module, vectors(2), extras=ON_CLIENT)
    assert client.peak(4) - plain.peak(4) == client.breakdown(4)["anchor"] == 4 * plain.trainable


@pytest.mark.parametrize("fall", [-300, 0, 70, 300])
def test_all_smaller_batches_fit_as_well(fall: int) -> None:
    """A peak that falls above 15 and again above 40 samples: the last batch of an epoch may be as small."""

    def needed(batch: int) -> int:
        return 10 * batch - fall * ((batch > 15) + (batch > 40))

    dry_run: Any = SimpleNamespace(
        run=lambda batch, **_: DryRunResult(Peak(1000 + needed(batch), {}), StepCost(0.0, 0.0), 0),
        learns=False, makes_batches=False, borders=[15, 40], assumed="",
    )  # fmt: skip
    model = MemoryModel(dry_run, nn.Linear(1, 1), {})
    for budget in range(1010, 1900, 7):
        expected = next(batch for batch in range(1, 1000) if model.peak(batch + 1) > budget)
        assert model.max_batch(budget, headroom=0.0) == expected


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e6)), min_size=1, max_size=5),
    st.integers(1, 10**6),
    st.integers(1, 10**5),
    st.booleans(),
    st.tuples(st.integers(1, 10**5), st.integers(0, 10**6)),
)
def test_search_equals_scanning(
    lines: list[tuple[int, float]], bound: int, limit: int, gentle: bool, leap: tuple[int, int]
) -> None:
    def excess(n: int) -> float:
        return max(offset + slope * n for offset, slope in lines) + leap[1] * (n > leap[0]) - bound

    if excess(1) > 0:
        return
    seen: list[int] = []

    def watched(n: int) -> float:
        seen.append(n)
        return excess(n)

    found = largest_within(watched, limit, gentle=gentle)
    assert 1 <= found <= limit
    assert excess(found) <= 0
    assert found == limit or excess(found + 1) > 0
    assert len(seen) <= 80
    if gentle:
        fitting = [1]
        for n in seen:
            assert n <= 2 * fitting[-1] or n <= limit
            fitting += [n] * (excess(n) <= 0)


def test_search_without_values_where_it_does_not_fit() -> None:
    assert largest_within(lambda n: -1.0 if n <= 777 else float("inf"), 10**6) == 777


def test_not_one_sample_fits() -> None:
    model = small()
    with pytest.raises(ValueError, match="optimizer state") as told:
        model.max_batch(200_000, headroom=0.0)
    missing = model.peak(1) - 200_000
    assert f"{missing:,} bytes more" in str(told.value)
    assert format_bytes(model.peak(1)) in str(told.value)


@pytest.mark.parametrize(
    ("budget", "headroom", "name"),
    [
        ("8GiB", 0.1, "budget='8GiB'"),
        (0, 0.1, "budget=0"),
        (-5, 0.1, "budget=-5"),
        (10**6, 1.0, "headroom=1.0"),
        (10**6, -0.1, "headroom=-0.1"),
    ],
)
def test_bad_budgets(budget: Any, headroom: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        small().max_batch(budget, headroom)


@pytest.mark.parametrize("batch", [0, -1, 1.5])
def test_bad_batches(batch: Any) -> None:
    model = small()
    for ask in (
        model.peak,
        model.breakdown,
        lambda batch: model.max_clients(10**9, batch),
        lambda batch: model.max_batch(10**9, limit=batch),
    ):
        with pytest.raises(ValueError, match=f"={batch!r}: pass a number of samples"):
            ask(batch)


def test_vectorized_clients() -> None:
    model = model_of("mlp")
    own = small().peak(8)
    shared = model.peak(8) - own
    assert model.max_clients(shared + 5 * own + own // 2, 8, headroom=0.0) == 5
    with pytest.raises(ValueError, match=r"budget=.*: one client with batch=8"):
        model.max_clients(own, 8, headroom=0.0)


def test_resizing() -> None:
    batch = {"x": torch.arange(6).reshape(3, 2), "y": [torch.arange(3), "text"], "scale": torch.tensor(2.0)}
    assert samples_in(batch) == 3
    larger = resized(batch, 7)
    assert larger["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5], [0, 1]]
    assert larger["y"][0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert larger["y"][1] == "text"
    assert larger["scale"] == 2.0
    assert resized(batch, 2)["x"].tolist() == [[0, 1], [2, 3]]


@dataclass
class Molecules:
    x: torch.Tensor
    names: list[str]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: UserDict(x=x, names=["a"]),
        lambda x: Molecules(x, ["a"]),
        lambda x: SimpleNamespace(x=x, names=["a"], again=x),
    ],
)
def test_batches_in_classes_of_their_own_are_resized_in_these(make: Callable[[torch.Tensor], Any]) -> None:
    batch = make(torch.arange(3))
    assert samples_in(batch) == samples_in([batch, 0]) == 3
    larger = resized(batch, 5)
    assert type(larger) is type(batch)
    found = larger if isinstance(larger, UserDict) else vars(larger)
    assert found["x"].tolist() == [0, 1, 2, 0, 1]
    assert found["names"] == ["a"]
    assert found.get("again", found["x"]) is found["x"]
    assert samples_in(batch) == 3
    with pytest.raises(ValueError, match=r"batch=SimpleNamespace: .*differ \(3, 4\)"):
        samples_in(SimpleNamespace(x=torch.zeros(3), y=torch.zeros(4)))


@pytest.mark.parametrize("batch", ["text", {}, torch.tensor(1.0), (torch.zeros(3), torch.zeros(4))])
def test_batches_that_cannot_be_resized(batch: Any) -> None:
    with pytest.raises(ValueError, match="make_batch="):
        estimate_memory(Classifier(mlp()), batch)


def test_make_batch() -> None:
    sizes: list[int] = []

    def make(samples: int) -> Any:
        sizes.append(samples)
        return vectors(samples)

    model = estimate_memory(Classifier(mlp()), None, make_batch=make)
    assert model.peak(9) == small().peak(9)
    assert max(sizes) == 9
    # Such batches are real, so the search feels its way up instead of leaping.
    best = model.max_batch(2**20)
    assert max(sizes) <= 2 * best
    assert best == small().max_batch(2**20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "8-bit"}, "precision='8-bit'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"accumulate": 0}, "accumulate=0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_memory(Classifier(mlp()), vectors(2), **arguments)


def test_no_training_step() -> None:
    with pytest.raises(TypeError, match="no training_step"):
        estimate_memory(mlp(), vectors(2))


def test_table_and_plot() -> None:
    model = small()
    table = model.table([1, 10, 100])
    assert table.index.tolist() == [1, 10, 100]
    assert table["peak"].tolist() == [model.peak(batch) for batch in (1, 10, 100)]
    assert (table.drop(columns="peak").sum(axis=1) == table["peak"]).all()
    figure = model.plot([1, 10, 100], budgets={"phone": 2**20})
    (axis,) = figure.axes
    legend = axis.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert {"parameters", "gradients", "optimizer state"} <= set(texts)
    assert any("phone" in text for text in texts)
