"""Attacks: what hostile clients send, equal to their papers, the same on any number of ranks."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_fedscale.aggregators import Aggregator, aggregate, krum, mean, median
from lightning_fedscale.aggregators.base import Finish
from lightning_fedscale.aggregators.rows import norm_of
from lightning_fedscale.attacks import (
    Attack,
    a_little_is_enough,
    attacked,
    enough,
    flip_labels,
    gaussian,
    model_replacement,
    sign_flip,
)
from lightning_fedscale.types import ClientUpdate, Cohort

CLIENTS = np.array([2, 3, 5, 7, 11])
COHORT = Cohort(4, CLIENTS, num_clients=20, trainable=3, seed=1)


def updates(seed: int = 0) -> list[ClientUpdate]:
    rows = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [
        ClientUpdate(client, row, norm_of(row, COHORT), 10 + client, 20 + client, client, 0.5 * client, 0.25)
        for client, row in zip(CLIENTS.tolist(), rows, strict=True)
    ]


def seen(attack: Attack, attackers: Any, sent: list[ClientUpdate], ranks: int = 1) -> dict[int, ClientUpdate]:
    """The updates that reach the aggregator."""
    found: dict[int, ClientUpdate] = {}

    def accumulate(total: Tensor, update: ClientUpdate, weight: float, cohort: Cohort) -> Tensor:
        assert weight == update.num_samples
        found[update.client] = update._replace(delta=update.delta.clone())
        return total

    spy = Aggregator(
        lambda update: float(update.num_samples), lambda like, cohort: like, accumulate, lambda total, _: total
    )
    rule = attacked(spy, attack, attackers)
    parts = []
    for rank in range(ranks):
        total = rule.init(torch.zeros(4, dtype=torch.float64), COHORT)
        for update in sent[rank::ranks]:
            total = rule.accumulate(total, update, rule.weigh(update), COHORT)
        parts.append(total)
    finish = cast(Finish, rule.finish)
    assert finish(torch.stack(parts).sum(0), COHORT).shape == (4,)
    return found


def same(left: ClientUpdate, right: ClientUpdate) -> bool:
    return torch.equal(left.delta, right.delta) and left._replace(delta=right.delta) == right


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_only_attackers_change_and_only_what_is_trainable(ranks: int) -> None:
    sent = updates()
    found = seen(sign_flip(3.0), [3, 11, 12], sent, ranks)
    for update in sent:
        if update.client in (3, 11):
            assert torch.equal(found[update.client].delta[:3], -3.0 * update.delta[:3])
            assert found[update.client].delta[3] == update.delta[3]
            assert found[update.client].norm == pytest.approx(3.0 * update.norm)
            assert found[update.client]._replace(delta=update.delta, norm=update.norm) == update
        else:
            assert same(found[update.client], update)


@pytest.mark.parametrize("attackers", [[], [4, 6]])
def test_without_attackers_nothing_changes(attackers: list[int]) -> None:
    sent = updates()
    found = seen(sign_flip(), attackers, sent)
    assert all(same(found[update.client], update) for update in sent)


def test_clients_that_sent_nothing_stay_away() -> None:
    sent = updates()[1:]
    assert set(seen(sign_flip(), [2], sent)) == {3, 5, 7, 11}
    lost = updates()
    lost[0] = lost[0]._replace(loss=float("nan"))
    assert np.isnan(seen(sign_flip(), [3], lost)[2].loss)  # a loss that is not known travels too


def test_gaussian_depends_on_seed_round_and_client_only() -> None:
    first = seen(gaussian(2.0), [3, 5], updates(0))
    again = seen(gaussian(2.0), [5], updates(1), ranks=2)
    assert torch.equal(first[5].delta[:3], again[5].delta[:3])
    assert not torch.equal(first[5].delta[:3], first[3].delta[:3])


def test_gaussian_has_its_standard_deviation() -> None:
    rows = torch.ones(4, 20_000, dtype=torch.float64)
    noise = aggregate(attacked(mean(), gaussian(3.0), range(4)), rows) * 2  # the mean of 4 has half the deviation
    assert noise.std() == pytest.approx(3.0, rel=0.03)  # six standard errors
    assert abs(noise.mean()) < 6 * 3.0 / 20_000**0.5


@pytest.mark.parametrize("held", [[1, 1, 1, 1], [5, 2, 1, 9]])
def test_model_replacement_puts_the_attacker_in_place_of_the_mean(held: list[int]) -> None:
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, -2.0], [0.0, 0.0]])
    assert aggregate(attacked(mean(), model_replacement(), [2]), rows, held).tolist() == pytest.approx([1.0, -2.0])
    boosted = aggregate(attacked(mean("uniform"), model_replacement(boost=2.0), [2]), rows, held)
    assert boosted.tolist() == [0.5, -1.0]


@pytest.mark.parametrize(("clients", "attackers"), [(50, 24), (50, 12), (51, 12), (10, 2), (9, 1), (100, 20)])
def test_enough_is_the_papers_formula(clients: int, attackers: int) -> None:
    supporters = np.floor(clients / 2 + 1) - attackers
    expected = norm.ppf((clients - attackers - supporters) / (clients - attackers))
    assert enough(clients, attackers) == pytest.approx(expected, abs=1e-12)


def test_enough_for_the_papers_own_numbers() -> None:
    # 50 workers of which 24 are hostile need 2 supporters: about 1.5 in the paper's discussion, by a table.
    assert enough(50, 24) == pytest.approx(1.426, abs=1e-3)


@pytest.mark.parametrize(("clients", "attackers"), [(2, 1), (1, 1), (3, 3), (4, 4)])
def test_enough_without_an_honest_majority(clients: int, attackers: int) -> None:
    assert 0 <= enough(clients, attackers) < 10


def test_a_little_is_enough_sees_only_its_own() -> None:
    sent = updates()
    own = np.stack([update.delta[:3].numpy() for update in sent if update.client in (2, 7, 11)])
    found = seen(a_little_is_enough(0.7), [2, 7, 11], sent)
    for client in (2, 7, 11):
        np.testing.assert_allclose(found[client].delta[:3], own.mean(0) - 0.7 * own.std(0), rtol=1e-12)
    default = seen(a_little_is_enough(), [2, 7], sent)
    pair = np.stack([update.delta[:3].numpy() for update in sent if update.client in (2, 7)])
    np.testing.assert_allclose(default[2].delta[:3], pair.mean(0) - enough(5, 2) * pair.std(0), rtol=1e-12)


def test_an_attack_may_send_what_is_not_finite() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    rule = attacked(median(), lambda stack, rows, cohort: torch.full((1, 1), torch.nan), [2])
    assert aggregate(rule, rows).tolist() == [1.5]


def test_flipped_labels() -> None:
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    flipped = flip_labels(data, [1, 9], num_classes=10)
    assert len(flipped) == 10  # type: ignore[arg-type]
    assert [int(flipped[i][1]) for i in range(10)] == [0, 8, 2, 3, 4, 5, 6, 7, 8, 0]
    assert [float(flipped[i][0]) for i in range(10)] == list(range(10))
    assert flip_labels([("a", "b", 3)], [0], num_classes=5)[0] == ("a", "b", 1)


@pytest.mark.parametrize(
    "attackers",
    [(client for client in (2, 5)), map(int, "25"), {2: "a", 5: "b"}.keys(), {"a": 2, "b": 5}.values()],
    ids=["generator", "map", "keys", "values"],
)
def test_attackers_may_be_what_can_be_read_only_once(attackers: Iterable[int]) -> None:
    rule = attacked(mean(), sign_flip(), attackers)
    assert rule.arguments["attackers"] == (2, 5)
    for copied in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert copied.call == rule.call
        assert copied.arguments["attackers"] == (2, 5)
    assert "attackers=(2, 5)" in rule.call


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="attackers=-1: pass an integer of at least 0"):
        attacked(mean(), sign_flip(), [-1])
    with pytest.raises(TypeError, match=r"attackers=1\.5: pass an integer"):
        attacked(mean(), sign_flip(), [1.5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"attackers=3: pass the numbers of the hostile clients, such as \[2, 5\]"):
        attacked(mean(), sign_flip(), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scale='5': pass a finite number"):
        sign_flip("5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="std=-1: pass a number of at least 0"):
        gaussian(-1)
    with pytest.raises(ValueError, match="boost=nan: pass a finite number, or None"):
        model_replacement(math.nan)
    with pytest.raises(ValueError, match="z=inf: pass a finite number, or None"):
        a_little_is_enough(math.inf)
    with pytest.raises(ValueError, match="num_classes=1: pass"):
        flip_labels([], [], num_classes=1)
    with pytest.raises(TypeError, match=r"sample 0 is a dict: pass a dataset of tuples \(..., label\)"):
        flip_labels([{"label": 1}], [0], num_classes=2)[0]


def test_what_a_round_cannot_be_is_refused_at_its_beginning() -> None:
    like, cohort = torch.zeros(3), Cohort(0, np.arange(4), 4, 3, 0)
    with pytest.raises(ValueError, match="attackers: client 7 does not exist: pass numbers from 0 to 3"):
        attacked(mean(), sign_flip(), [7]).init(like, cohort)
    with pytest.raises(ValueError, match=r"krum\(attackers=1\): .*at least 5 clients"):
        attacked(krum(1), sign_flip(), [0]).init(like, cohort)
