"""The numbers of a round against numbers worked out by hand."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedscale.core.plan import RoundPlan, place_longest_first
from lightning_fedscale.core.round.merge import RoundTable
from lightning_fedscale.types import ClientUpdate, Cohort, RoundRecord
from tests.laws import reference
from tests.strategies import sequential


def update(client: int, **changes: Any) -> ClientUpdate:
    made = ClientUpdate(client, torch.zeros(0), norm=1.0, num_samples=4, samples=4, steps=1, loss=0.5, seconds=0.1)
    return made._replace(**changes)


def plan_of(ranks: list[int], cohort: list[int] | None = None) -> RoundPlan:
    return RoundPlan(3, np.array(range(len(ranks)) if cohort is None else cohort), np.array(ranks))


def test_record_in_numbers() -> None:
    # Deltas (3, 4), (0, 2) and one that is not finite, with weights 1, 3 and 4: the mean is (0.75, 2.5).
    plan = plan_of([0, 1, 0], cohort=[2, 5, 9])
    table = RoundTable(plan, 2)
    table.clients.add(
        update(2, norm=5.0, samples=2, steps=1, loss=1.0, seconds=0.25), 1.0, (1, 2), (8.0, 3.0), sent=(100, 1, 0)
    )
    table.clients.add(
        update(5, norm=2.0, samples=6, steps=3, loss=0.5, seconds=1.5), 3.0, (0, 7), (4.0, 2.0), sent=(70, 1, 0)
    )
    table.clients.add(
        update(9, norm=math.nan, samples=8, steps=4, loss=math.nan), 4.0, (5, 0), (4.0, 1.0), sent=(30, 1, 0)
    )
    table.finish_rank(0, 1.0, failed=False)
    table.finish_rank(1, 2.0, failed=False)
    norm = math.hypot(0.75, 2.5)
    record = table.record(norm, model_bytes=100)

    assert record.round == 3
    assert record.clients.tolist() == [2, 5, 9]
    assert record.ranks.tolist() == [0, 1, 0]
    assert record.weights.tolist() == [0.25, 0.75, 0.0]
    assert record.samples.tolist() == [2, 6, 8]
    assert record.local_steps.tolist() == [1, 3, 4]
    np.testing.assert_equal(record.losses, [1.0, 0.5, math.nan])
    np.testing.assert_equal(record.delta_norms, [5.0, 2.0, math.nan])
    assert record.client_seconds[:2].tolist() == [0.25, 1.5]
    assert record.rejected == (9,)
    assert record.loss == pytest.approx((2 * 1.0 + 6 * 0.5) / 8)
    # Root mean square distance from the mean: sqrt(1/4 |(3,4) - m|^2 + 3/4 |(0,2) - m|^2) / |m|.
    distance = 0.25 * ((3 - 0.75) ** 2 + (4 - 2.5) ** 2) + 0.75 * ((0 - 0.75) ** 2 + (2 - 2.5) ** 2)
    assert record.drift == pytest.approx(math.sqrt(distance) / norm, rel=1e-12)
    assert (record.upload_bytes, record.download_bytes) == (200, 300)
    assert record.seconds == 2.0
    assert record.idle == pytest.approx(0.25)  # rank 0 waited for 1 of 2 x 2 seconds
    assert table.clients.cursors() == {2: (1, 2), 5: (0, 7), 9: (5, 0)}
    assert table.clients.smallest_scale() == (4.0, 1.0)
    assert record.metrics() == {
        "round/loss": record.loss,
        "round/clients": 2.0,
        "round/rejected": 1.0,
        "round/samples": 16.0,
        "round/local_steps": 8.0,
        "round/delta_norm": norm,
        "round/drift": record.drift,
        "round/upload_bytes": 200.0,
        "round/download_bytes": 300.0,
        "round/seconds": 2.0,
        "round/padding": record.padding,
        "round/idle": record.idle,
    }


@pytest.mark.parametrize(
    ("norms", "delta_norm", "expected"),
    [((1.0, 1.0), 1.0, 0.0), ((1.0, 1.0), 0.0, math.inf), ((0.0, 0.0), 0.0, 0.0), ((1.0, 1.0), 1.0 + 1e-15, 0.0)],
)
def test_drift_at_its_ends(norms: tuple[float, float], delta_norm: float, expected: float) -> None:
    table = RoundTable(plan_of([0, 0]), 1)
    for client, norm in enumerate(norms):
        table.clients.add(update(client, norm=norm), 1.0, (0, 0), (0.0, 0.0))
    assert table.record(delta_norm, 0).drift == expected


def test_unknown_loss_is_left_out_of_the_logs() -> None:
    table = RoundTable(plan_of([0, 0]), 1)
    table.clients.add(update(0, loss=math.nan), 1.0, (0, 0), (0.0, 0.0))
    table.clients.add(update(1, loss=math.nan), 1.0, (0, 0), (0.0, 0.0))
    record = table.record(1.0, 0)
    assert math.isnan(record.loss)
    assert "round/loss" not in record.metrics()
    assert record.idle == 0.0


rows = st.lists(
    st.tuples(
        st.floats(0, 1e6),
        st.integers(1, 10**6),
        st.integers(1, 1000),
        st.floats(-10, 10),
        st.booleans(),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(rows, st.integers(1, 4))
def test_sum_over_ranks_is_one_ranks_table(
    values: list[tuple[float, int, int, float, bool, int]], world_size: int
) -> None:
    world_size = min(world_size, len(values))
    ranks = place_longest_first(np.array([row[1] for row in values]), world_size)
    plan = plan_of(ranks.tolist())

    def filled(rank: int | None) -> RoundTable:
        table = RoundTable(plan, world_size)
        for client, (norm, samples, steps, loss, accepted, cursor) in enumerate(values):
            if rank in (None, ranks[client]):
                norm = norm if accepted else math.nan
                sent = update(client, norm=norm, num_samples=samples, samples=samples, steps=steps, loss=loss)
                table.clients.add(sent, float(samples), (cursor, client), (2.0**cursor, cursor))
        for of in range(world_size):
            if rank in (None, of):
                table.finish_rank(of, 1.0 + of, failed=of == 1)
        return table

    together, alone = RoundTable(plan, world_size), filled(None)
    together.unpack(torch.stack([filled(rank).pack() for rank in range(world_size)]).sum(0))
    assert together.clients.cursors() == alone.clients.cursors()
    assert together.clients.rejected() == alone.clients.rejected()
    assert together.clients.smallest_scale() == alone.clients.smallest_scale()
    if len(alone.clients.rejected()) < len(values):
        first, second = together.record(1.0, 8), alone.record(1.0, 8)
        for name in RoundRecord.__dataclass_fields__:
            np.testing.assert_equal(getattr(first, name), getattr(second, name))


def test_record_of_a_real_round() -> None:
    data, partition = reference.dataset(), reference.unequal_clients()
    module = reference.make_module()
    before = torch.cat([p.detach().double().flatten() for p in module.parameters()])
    deltas: list[torch.Tensor] = []
    losses: list[float] = []
    for client in range(7):
        alone = reference.make_module()
        strategy = sequential(partitioner=partition, sampler=lambda *, c=client, **_: np.array([c]))
        reference.quiet_trainer(strategy=strategy, max_epochs=1).fit(alone, reference.loader(data))
        deltas.append(before - torch.cat([p.detach().double().flatten() for p in alone.parameters()]))
        assert strategy.last_round is not None
        losses.append(strategy.last_round.loss)

    strategy = sequential(partitioner=partition)
    reference.quiet_trainer(strategy=strategy, max_epochs=1).fit(module, reference.loader(data))
    record = strategy.last_round
    assert record is not None
    stacked, weights = torch.stack(deltas), torch.tensor(partition.sizes / partition.num_samples)
    mean = weights @ stacked
    spread = math.sqrt(float(weights @ (stacked - mean).square().sum(1)))
    np.testing.assert_allclose(record.delta_norms, stacked.norm(dim=1).numpy(), rtol=1e-12)
    # float32 weights: what is left of `before - after` has rounding of its own.
    assert record.delta_norm == pytest.approx(float(mean.norm()), rel=1e-6)
    assert record.drift == pytest.approx(spread / float(mean.norm()), rel=1e-6)
    np.testing.assert_allclose(record.losses, losses, rtol=1e-12)
    assert record.loss == pytest.approx(float(np.average(losses, weights=partition.sizes)), rel=1e-12)
    assert record.local_steps.tolist() == [math.ceil(size / 8) for size in partition.sizes]
    parameters = 12 * 16 + 16 + 16 * 4 + 4
    assert record.upload_bytes == record.download_bytes == 7 * 4 * parameters


def test_parameters_stay_trainable_if_a_client_of_any_rank_left_them_so() -> None:
    plan = plan_of([0, 1])
    ranks = [RoundTable(plan, 2, num_parameters=3) for _ in range(2)]
    for rank, flags in enumerate(([True, False, False], [False, True, False])):
        ranks[rank].add_trainable(flags)
        ranks[rank].finish_rank(rank, 1.0, failed=False)
    packed = ranks[0].pack() + ranks[1].pack()
    for table in ranks:
        table.unpack(packed)
        assert table.trainable() == [True, True, False]
        assert table.failed_ranks() == []


def test_a_word_to_one_rank_is_known_to_all() -> None:
    ranks = [RoundTable(plan_of([0, 1]), 2) for _ in range(2)]
    for rank, table in enumerate(ranks):
        table.finish_rank(rank, 1.0, failed=False, preempted=rank == 1)
    packed = [table.pack().clone() for table in ranks]
    assert [table.preempted() for table in ranks] == [False, True]
    for table in ranks:
        table.unpack(packed[0] + packed[1])
        assert table.preempted()
        assert table.failed_ranks() == []


def test_old_names_of_fields_are_read_and_passed_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"ClientUpdate\.held is num_samples now"):
        made = ClientUpdate(3, torch.zeros(0), norm=1.0, held=4, samples=8, steps=1, loss=0.5, seconds=0.1)  # type: ignore[call-arg]
    assert (made.num_samples, made.samples) == (4, 8)
    with pytest.warns(DeprecationWarning, match="held"):
        assert made.held == 4  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match="held"):
        assert made._replace(held=5).num_samples == 5
    with pytest.warns(DeprecationWarning, match=r"Cohort\.registered is num_clients now"):
        cohort = Cohort(0, np.arange(2), registered=6, trainable=1, seed=0)  # type: ignore[call-arg]
    assert pickle.loads(pickle.dumps(cohort)).num_clients == 6


def test_there_are_no_placeholder_clients() -> None:
    table = RoundTable(plan_of([0]), 1)
    table.clients.add(update(0), 4.0, (0, 0), (0.0, 0.0))
    record = table.record(1.0, 8)
    with pytest.warns(DeprecationWarning, match=r"RoundRecord\.spare"):
        assert record.spare == ()
