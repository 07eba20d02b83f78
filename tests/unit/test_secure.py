"""Secure aggregation: masks cancel, also those of clients that dropped out; one masked update tells nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from lightning_fedscale.aggregators import aggregate, norm_clipped
from lightning_fedscale.attacks import attacked, sign_flip
from lightning_fedscale.privacy import secure_mean, shamir
from lightning_fedscale.privacy.secure import FIELD, dequantized, masked, quantized, unmasked
from lightning_fedscale.types import ClientUpdate, Cohort

quick = settings(max_examples=40)


def cohort(clients: int, seed: int = 0, round: int = 3) -> Cohort:
    return Cohort(round, np.sort(np.random.default_rng(clients).choice(1000, clients, replace=False)), 1000, 4, seed)


@quick
@given(st.integers(2, 9), st.integers(0, 10**6), st.data())
def test_the_sum_is_exact_whoever_drops_out(clients: int, seed: int, data: st.DataObject) -> None:
    everyone, needed = cohort(clients, seed), -(-2 * clients // 3)
    values = np.random.default_rng(seed).integers(0, 1 << 16, (clients, 4))
    present = data.draw(st.permutations(range(clients)))[: data.draw(st.integers(needed, clients))]
    sent = np.stack([masked(values[place], place, everyone, needed) for place in present]).sum(0)
    assert (unmasked(sent % FIELD, present, everyone, needed) == values[present].sum(0)).all()


@quick
@given(st.integers(2, 9), st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 3))
def test_equals_the_plain_mean_of_rounded_updates_on_any_number_of_ranks(
    clients: int, seed: int, bits: int, ranks: int
) -> None:
    rule, everyone = secure_mean(clip=0.5, bits=bits), cohort(clients, seed)
    rows = torch.randn(clients, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    dropped = {0} if clients > 3 else set()
    parts = []
    for rank in range(ranks):
        total = rule.init(rows[0], everyone)
        for place in range(rank, clients, ranks):
            if place not in dropped:
                update = ClientUpdate(int(everyone.clients[place]), rows[place], 1.0, 5, 5, 1, 0.0, 0.0)
                total = rule.accumulate(total, update, rule.weigh(update), everyone)
        parts.append(total)
    found, _ = rule.finish_with(torch.stack(parts).sum(0), everyone, None)
    kept = [row for place, row in enumerate(rows) if place not in dropped]
    plain = np.stack([quantized(row, 0.5, bits) for row in kept]).sum(0)
    assert found.tolist() == (dequantized(plain, len(kept), 0.5, bits) / len(kept)).tolist()
    # And that is the mean of clipped updates but for the rounding.
    exact = torch.stack(kept).clamp(-0.5, 0.5).mean(0)
    assert (found - exact).abs().max() <= 0.5 / (2**bits - 1) * (1 + 1e-9)


def test_a_masked_update_looks_uniform_and_like_no_other() -> None:
    everyone = cohort(3)
    zeros, ones = np.zeros(20_000, np.int64), np.full(20_000, 60_000)
    for values in (zeros, ones):
        for place in range(3):
            sent = masked(values, place, everyone, 2)
            assert sent.min() >= 0
            assert sent.max() < FIELD
            assert kstest(sent / FIELD, "uniform").pvalue > 1e-3
    first, second = masked(zeros, 0, everyone, 2), masked(zeros, 1, everyone, 2)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert (masked(zeros, 0, cohort(3, round=4), 2) != first).mean() > 0.99
    # Nor do all but one of them tell anything together.
    assert kstest((first + second) % FIELD / FIELD, "uniform").pvalue > 1e-3


def test_too_few_updates_leave_the_masks_where_they_are() -> None:
    rows = torch.full((6, 2), torch.nan)
    rows[:3] = 0.25
    with pytest.raises(RuntimeError, match=r"3 of 6 clients sent a finite update in round 0, .* takes 4: "):
        aggregate(secure_mean(1.0), rows)
    rows[3] = 0.25
    assert aggregate(secure_mean(1.0), rows).tolist() == pytest.approx([0.25, 0.25], abs=1e-4)


@quick
@given(st.integers(0, shamir.PRIME - 1), st.integers(1, 6), st.randoms(use_true_random=False))
def test_enough_shares_tell_the_secret(secret: int, needed: int, random: np.random.RandomState) -> None:
    draws = np.random.default_rng(needed)
    coefficients = [secret, *(int(draws.integers(1, 1 << 62)) for _ in range(needed - 1))]
    shares = {holder: shamir.share(coefficients, holder) for holder in range(9)}
    holders = list(range(9))
    random.shuffle(holders)
    assert shamir.secret({holder: shares[holder] for holder in holders[:needed]}) == secret
    assert shamir.secret(shares) == secret
    if needed > 1:
        fewer = {holder: shares[holder] for holder in holders[: needed - 1]}
        assert shamir.secret(fewer) != secret


def test_wrappers_go_around_it() -> None:
    rows = torch.tensor([[0.5], [0.25], [0.75]])
    assert aggregate(norm_clipped(0.25, inner=secure_mean(1.0)), rows).item() == pytest.approx(0.25, abs=1e-4)
    assert aggregate(attacked(secure_mean(1.0), sign_flip(), [1]), rows).item() == pytest.approx(1 / 3, abs=1e-4)


def test_the_sum_must_fit_into_the_field() -> None:
    rule, like = secure_mean(1.0, bits=16), torch.zeros(1)
    rule.init(like, Cohort(0, np.arange(32768), 32768, 1, 0))
    with pytest.raises(ValueError, match=r"sum of 32769 clients does not fit into 31 bits: pass at most 15"):
        rule.init(like, Cohort(0, np.arange(32769), 32769, 1, 0))
    with pytest.raises(ValueError, match="needs at least 2 clients"):
        rule.init(like, Cohort(0, np.arange(1), 1, 1, 0))


@pytest.mark.parametrize("options", [{"clip": 0}, {"bits": 0}, {"bits": 31}, {"threshold": 0}, {"threshold": 1.5}])
def test_wrong_arguments(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: pass"):
        secure_mean(**{"clip": 1.0, **options})  # type: ignore[arg-type]


def test_arguments_of_another_kind() -> None:
    with pytest.raises(TypeError, match="clip='1': pass the largest absolute value"):
        secure_mean(clip="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"bits=1\.5: pass an integer from 1 to 30"):
        secure_mean(clip=1.0, bits=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="threshold='all': pass a share"):
        secure_mean(clip=1.0, threshold="all")  # type: ignore[arg-type]
