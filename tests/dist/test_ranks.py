"""Law 1, ranks do not matter: 1, 2 and 3 processes give the same global weights, and everything else that users see."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_fedscale.samplers import uniform
from tests.dist import scenarios
from tests.laws import reference
from tests.strategies import sequential

Ranks: TypeAlias = list[dict[str, Any]]
Start: TypeAlias = Callable[[int], Ranks]


def _keeps(name: str) -> bool:
    """Whether clients keep anything, which then moves with them."""
    options = sequential(**scenarios.SCENARIOS[name].strategy())._options
    return options.keep_optimizers or options.algorithm.keep_state


TRAINED = sorted(name for name, each in scenarios.SCENARIOS.items() if not each.fails)
FLOAT64 = ["double", "phase_adaptive_server", "phase_noise"]
EXACT = [name for name in TRAINED if name not in FLOAT64]
COUNTED = 3  # of a record's side, see `RoundMeter.side`: steps whose operations were counted
TIMES = {"round/seconds", "round/idle"}
STATEFUL = [name for name in TRAINED if _keeps(name)]
several = pytest.mark.parametrize("world_size", [2, 3])


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


@several
@pytest.mark.parametrize("name", EXACT)
def test_weights_are_those_of_one_process_bit_for_bit(name: str, world_size: int, ranks: Start) -> None:
    one = ranks(1)[0][name]
    # The run did something: otherwise equality says nothing.
    moved = [
        reference.difference({"": one["weights"][key]}, {"": start})
        for key, start in one["start"].items()
        if one["weights"][key].shape == start.shape  # buffers may grow
    ]
    assert max(moved) > 1e-3
    for rank in ranks(world_size):
        assert_same(rank[name]["weights"], one["weights"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_where_states_lie_does_not_matter(world_size: int, ranks: Start) -> None:
    for rank in ranks(world_size):
        assert_same(rank["keep_in_files"]["weights"], rank["keep"]["weights"])


@several
@pytest.mark.parametrize("name", FLOAT64)
def test_weights_are_those_of_one_process_in_float64(name: str, world_size: int, ranks: Start) -> None:
    one = ranks(1)[0][name]["weights"]
    assert one["head.weight"].dtype == torch.float64
    for rank in ranks(world_size):
        assert reference.difference(rank[name]["weights"], one) < 1e-12


@several
@pytest.mark.parametrize("name", TRAINED)
def test_all_ranks_hold_the_same(name: str, world_size: int, ranks: Start) -> None:
    first, *others = (rank[name] for rank in ranks(world_size))
    assert [first["rank"], *(other["rank"] for other in others)] == list(range(world_size))
    for other in others:
        assert_same(other["weights"], first["weights"])
        assert other["rounds"] == first["rounds"] > 0
        # Every number of every record, times too: they cross the ranks with the rest.
        np.testing.assert_equal(other["records"], first["records"])
        assert other["metrics"] == first["metrics"]
        assert other["scale"] == first["scale"]


@several
@pytest.mark.parametrize("name", EXACT)
def test_each_client_sends_the_same_wherever_it_trains(name: str, world_size: int, ranks: Start) -> None:
    one = ranks(1)[0][name]["deltas"]
    sent = [(key, delta) for rank in ranks(world_size) for key, delta in rank[name]["deltas"].items()]
    assert sorted(key for key, _ in sent) == sorted(one)  # each client of each round on one rank only
    for key, delta in sent:
        np.testing.assert_array_equal(delta.numpy(), one[key].numpy())  # NaN, of rejected clients, equals NaN


@several
@pytest.mark.parametrize("name", TRAINED)
def test_round_metrics_are_those_of_one_process(name: str, world_size: int, ranks: Start) -> None:
    one, many = ranks(1)[0][name], ranks(world_size)[0][name]
    assert len(many["metrics"]) == len(one["metrics"]) == one["rounds"]
    for left, right in zip(many["metrics"], one["metrics"], strict=True):
        assert left.keys() == right.keys()
        exact = 0.0 if name in EXACT else 1e-12
        for metric in left.keys() - TIMES:
            assert left[metric] == pytest.approx(right[metric], rel=exact, abs=0), metric
        assert left["round/seconds"] > 0
        assert 0 <= left["round/idle"] < 1
        assert right["round/idle"] == 0


@several
@pytest.mark.parametrize("name", EXACT)
def test_records_are_those_of_one_process(name: str, world_size: int, ranks: Start) -> None:
    differs = {"ranks", "client_seconds", "seconds", "idle"}
    for left, right in zip(ranks(world_size)[0][name]["records"], ranks(1)[0][name]["records"], strict=True):
        assert left.keys() == right.keys() >= differs
        for field in left.keys() - differs - {"side"}:
            np.testing.assert_equal(left[field], right[field])
        # Each rank counts the first steps of its own; what these say of all steps is the same.
        np.testing.assert_equal(np.delete(left["side"], COUNTED), np.delete(right["side"], COUNTED))
        assert not len(left["side"]) or left["side"][COUNTED] >= right["side"][COUNTED]
        clients = len(left["clients"])
        assert set(left["ranks"]) == set(range(min(world_size, clients)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", ["reset", "keep_epochs", "double", "bf16", "talk", "workers"])
def test_logged_epoch_metrics_are_means_over_all_samples_of_all_ranks(name: str, world_size: int, ranks: Start) -> None:
    """With ``sync_dist=True``, and for torchmetrics: computed here from what each batch's forward pass gave."""
    results = [rank[name] for rank in ranks(world_size)]
    batches = [batch for result in results for batch in result["batches"]]
    per_rank = [sum(number for *_, number in result["batches"]) for result in results]
    assert world_size == 1 or len(set(per_rank)) > 1  # ranks have unequal work
    for epoch in range(results[0]["rounds"]):
        of_epoch = [batch for batch in batches if batch[0] == epoch]
        samples = sum(number for *_, number in of_epoch)
        loss = sum(value * number for _, value, _, number in of_epoch) / samples
        accuracy = sum(correct for _, _, correct, _ in of_epoch) / samples
        for result in results:
            logged = result["logged"][epoch]
            assert logged["loss"] == pytest.approx(loss, rel=1e-6)
            assert logged["loss_epoch"] == pytest.approx(loss, rel=1e-6)
            assert logged["accuracy"] == pytest.approx(accuracy, rel=1e-6)
            assert result["metrics"][epoch]["round/loss"] == pytest.approx(loss, rel=1e-6)


@several
@pytest.mark.parametrize("name", TRAINED)
def test_logged_metrics_are_those_of_one_process(name: str, world_size: int, ranks: Start) -> None:
    one = ranks(1)[0][name]["logged"]
    for rank in ranks(world_size):
        assert len(rank[name]["logged"]) == len(one) > 0
        for left, right in zip(rank[name]["logged"], one, strict=True):
            assert left.keys() == right.keys()
            for metric in left.keys() - TIMES:
                # Lightning adds up in float32, where terms of about 1 that cancel leave this much.
                assert left[metric] == pytest.approx(right[metric], rel=1e-6, abs=1e-7, nan_ok=True), metric


@several
@pytest.mark.parametrize("name", ["client_metrics", "personal_metrics"])
def test_what_clients_own_data_say_is_the_same_bit_for_bit(name: str, world_size: int, ranks: Start) -> None:
    one = ranks(1)[0][name]["logged"]
    for rank in ranks(world_size):
        for left, right in zip(rank[name]["logged"], one, strict=True):
            own = {metric for metric in right if metric.startswith(("clients/", "personal/"))}
            assert len(own) == {"client_metrics": 7, "personal_metrics": 14}[name]
            assert {metric: left[metric] for metric in own} == {metric: right[metric] for metric in own}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_and_test_see_the_global_model_and_all_samples(world_size: int, ranks: Start) -> None:
    for rank in ranks(world_size):
        result = rank["reset"]
        module = scenarios.Module()
        module.load_state_dict(result["weights"])
        module.eval()
        inputs, labels = scenarios.held_out().tensors
        with torch.no_grad():
            expected = float(nn.functional.cross_entropy(module.head(module.body(inputs)), labels))
        assert result["evaluated"].keys() == {"val_loss", "test_loss"}
        assert result["evaluated"]["val_loss"] == pytest.approx(expected, rel=1e-5)
        assert result["evaluated"]["test_loss"] == pytest.approx(expected, rel=1e-5)
        assert result["logged"][-1]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_simulated_hardware_drops_clients(ranks: Start) -> None:
    simulated = [record["simulated"] for record in ranks(1)[0]["population"]["records"]]
    seconds, totals, batch_sizes, _, dropped = zip(*simulated, strict=True)
    assert totals == pytest.approx(np.cumsum(seconds))
    assert len({size for sizes in batch_sizes for size in sizes}) == 2
    assert 0 < sum(map(len, dropped)) < sum(map(len, batch_sizes)) * 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", ["reset", "keep"])
def test_client_events_reach_callbacks_on_the_rank_that_trains(name: str, world_size: int, ranks: Start) -> None:
    per_round = {"reset": 5, "keep": 4}[name]
    for number, rank in enumerate(ranks(world_size)):
        expected: list[tuple[str, int, int]] = []
        for record in rank[name]["records"]:
            round = record["round"]
            cohort = uniform(seed=0, round=round, num_clients=scenarios.CLIENTS, clients_per_round=per_round).tolist()
            assert record["clients"] == cohort
            expected.append(("round_start", round, per_round))
            for client, trained_on in zip(cohort, record["ranks"], strict=True):
                if trained_on == number:
                    expected += [("client_start", round, client), ("client_end", round, client)]
            expected.append(("round_end", round, per_round))
        assert rank[name]["events"] == expected
        assert rank[name]["rounds"] == len(rank[name]["records"])


@several
@pytest.mark.parametrize("name", TRAINED)
def test_one_collective_per_round(name: str, world_size: int, ranks: Start) -> None:
    for rank in ranks(world_size):
        # By whomever: while a round runs, ranks meet once, and once more for what a callback measures.
        most = scenarios.SCENARIOS[name].collectives
        assert len(rank[name]["in_round"]) == rank[name]["rounds"]
        for calls in rank[name]["in_round"]:
            assert 1 <= len(calls) <= most
            assert set(calls) == {"all_reduce"}
        asked = [call for call, by_strategy in rank[name]["calls"] if by_strategy]
        at_most = most * rank[name]["rounds"] + scenarios.SCENARIOS[name].afterwards
        assert rank[name]["rounds"] <= asked.count("all_reduce") <= at_most
        if name not in STATEFUL:
            assert set(asked) == {"all_reduce"}
    assert not [call for call, by_strategy in ranks(1)[0][name]["calls"] if by_strategy]


@several
@pytest.mark.parametrize("name", ["keep", "keep_in_files", "keep_epochs", "manual", "rejected"])
def test_kept_optimizers_travel_only_with_clients_that_change_ranks(name: str, world_size: int, ranks: Start) -> None:
    sent, received = [0] * world_size, [0] * world_size
    holder: dict[int, int] = {}
    for record in ranks(world_size)[0][name]["records"]:
        for client, rank in zip(record["clients"], record["ranks"], strict=True):
            before = holder.get(client, rank)
            if before != rank:
                sent[before] += 1
                received[rank] += 1
            holder[client] = rank
    assert sum(sent) > 0
    for number, result in enumerate(ranks(world_size)):
        asked = [call for call, by_strategy in result[name]["calls"] if by_strategy]
        # One message tells how long the other is.
        assert asked.count("send") == 2 * sent[number]
        assert asked.count("recv") == 2 * received[number]
        assert len(asked) == 2 * (sent[number] + received[number]) + result[name]["rounds"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_collectives_inside_a_client_concern_it_alone(world_size: int, ranks: Start) -> None:
    steps = []
    for rank in ranks(world_size):
        result = rank["talk"]
        for (_, loss, _, _), (value, gathered, broadcast, reduced, decision) in zip(
            result["batches"], result["heard"], strict=True
        ):
            assert loss == value == gathered == broadcast == pytest.approx(reduced)
            assert decision == 0.0
        steps.append(len(result["heard"]))
    # As many batches on each rank would prove nothing about deadlocks.
    assert world_size == 1 or len(set(steps)) > 1


def test_loss_scale_after_a_round_is_the_smallest_that_any_client_left(ranks: Start) -> None:
    results = [ranks(world_size)[0]["fp16"] for world_size in (1, 2, 3)]
    assert 0 < results[0]["scale"] < 2.0**22
    assert results[0]["scale"] == results[1]["scale"] == results[2]["scale"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_clients_that_are_not_finite_are_left_out_by_all_ranks(world_size: int, ranks: Start) -> None:
    for rank in ranks(world_size):
        rejected = {client for record in rank["rejected"]["records"] for client in record["rejected"]}
        assert rejected == {2, 5}
        assert all(math.isfinite(float(value.sum())) for value in rank["rejected"]["weights"].values())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_a_finite_client_all_ranks_stop_with_the_last_good_model(world_size: int, ranks: Start) -> None:
    for rank in ranks(world_size):
        result = rank["all_rejected"]
        assert result["error"].startswith("Diverged: round 0: the updates of all 5 clients")
        assert result["rounds"] == 0
        assert_same(result["weights"], result["start"])


@several
def test_cohort_smaller_than_the_ranks_is_refused_on_every_rank(world_size: int, ranks: Start) -> None:
    for rank in ranks(world_size):
        error = rank["small_cohort"]["error"]
        assert error.startswith(f"ValueError: clients_per_round=1: each of the {world_size} ranks")
        assert rank["small_cohort"]["rounds"] == 0


@several
def test_private_rounds_do_not_depend_on_ranks(world_size: int, ranks: Start) -> None:
    one = ranks(1)[0]["private"]
    moved = [
        reference.difference({"": one["weights"][key]}, {"": start})
        for key, start in one["start"].items()
        if one["weights"][key].shape == start.shape  # buffers may grow
    ]
    assert max(moved) > 1e-3
    for rank in ranks(world_size):
        assert_same(rank["private"]["weights"], one["weights"])
        assert rank["private"]["records"][-1]["epsilon"] == one["records"][-1]["epsilon"] > 0


@several
def test_ranks_may_be_without_a_client_and_rounds_without_any(world_size: int, ranks: Start) -> None:
    one = ranks(1)[0]["shrinking_cohort"]
    assert [len(record["clients"]) for record in one["records"]] == [4, 1, 0, 4]
    for rank in ranks(world_size):
        result = rank["shrinking_cohort"]
        assert_same(result["weights"], one["weights"])
        for record, of_one in zip(result["records"], one["records"], strict=True):
            assert record["clients"] == of_one["clients"]
            assert record["weights"] == of_one["weights"]
            assert len(set(record["ranks"])) == min(world_size, len(record["clients"]))
        for numbers, of_one in zip(result["metrics"], one["metrics"], strict=True):
            assert numbers.keys() == of_one.keys()
            assert {name for name in numbers if numbers[name] != of_one[name]} <= TIMES
