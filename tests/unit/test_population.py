"""Who has which device and who comes in time: pure functions, checked against plain definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedscale.devices import DeviceClass, Population, estimate_memory
from lightning_fedscale.devices.communication import star
from lightning_fedscale.devices.fleet import ClientWorkload, Fleet, share_out
from lightning_fedscale.devices.performance import PerformanceModel, roofline, roofline_step_time
from lightning_fedscale.devices.population import select
from tests.networks import Classifier, mlp, vectors

MODEL = estimate_memory(Classifier(mlp()), vectors(2))


def device(name: str, **figures: Any) -> DeviceClass:
    return DeviceClass(
        name, **{"memory": MODEL.peak(64), "flops": 1e9, "memory_bandwidth": 1e9, "up": 1e6, "down": 4e6, **figures}
    )


SLOW, FAST = device("slow"), device("fast", memory=MODEL.peak(200), flops=8e9, memory_bandwidth=8e9, latency=0.1)
SIZE = MODEL.parameter_bytes
WORKLOAD = ClientWorkload(clients=5, local_steps=4, batch_size=32, largest=500, model_bytes=SIZE, update_bytes=SIZE)


# ---- who has what


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(1, 3000), st.integers(0, 99))
def test_shares_are_as_exact_as_whole_clients_allow(shares: list[float], clients: int, seed: int) -> None:
    population = Population({device(str(n)): share for n, share in enumerate(shares)}, seed=seed)
    counts = np.bincount(population.assign(clients), minlength=len(shares))
    exact = np.array(shares) / sum(shares) * clients
    assert counts.sum() == clients
    assert (np.abs(counts - exact) < 1).all()
    assert (population.assign(clients) == population.assign(clients)).all()


def test_who_has_what_depends_on_the_seed() -> None:
    one, other = (Population({"phone": 1, "jetson": 1}, seed=seed).assign(1000) for seed in (0, 1))
    assert 300 < (one != other).sum() < 700
    assert len(Population({"phone": 0.7, "jetson": 0.3}).assign(10**6)) == 10**6


# ---- who comes in time


@st.composite
def rounds(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 12))
    return {
        "clients": np.sort(np.array(draw(st.permutations(range(50)))[:count])),
        "seconds": np.array(draw(st.lists(st.floats(0.1, 9), min_size=count, max_size=count))),
        "unavailability": np.array(draw(st.lists(st.floats(0, 3), min_size=count, max_size=count))),
        "wanted": draw(st.integers(1, 12)),
        "deadline": draw(st.none() | st.floats(0.1, 9)),
        "min_clients": draw(st.integers(1, 5)),
    }


@given(rounds())
def test_closing_a_round(given_: dict[str, Any]) -> None:
    clients, seconds, unavailability = given_["clients"], given_["seconds"], given_["unavailability"]
    wanted, deadline, least = given_["wanted"], given_["deadline"], given_["min_clients"]
    found = select(clients, seconds, unavailability, wanted=wanted, deadline=deadline, min_clients=least)
    # The same by hand: a list of arrivals, taken one after the other.
    arrivals = sorted((s, c) for c, s, a in zip(clients, seconds, unavailability, strict=True) if a < 1)
    silent = sorted((a, c) for c, a in zip(clients, unavailability, strict=True) if a >= 1)
    kept = [c for s, c in arrivals if deadline is None or s <= deadline][:wanted]
    for client in [c for _, c in arrivals + silent]:
        if len(kept) < least and client not in kept:
            kept.append(client)
    assert found.clients.tolist() == sorted(kept)
    assert found.dropped.tolist() == sorted(set(clients) - set(kept))
    of = dict(zip(clients, seconds, strict=True))
    assert found.seconds.tolist() == [of[c] for c in sorted(kept)]
    assert found.round_seconds >= max(of[c] for c in kept)
    if deadline is None or len(kept) >= min(wanted, len(clients)):
        assert found.round_seconds == max(of[c] for c in kept)
    else:
        assert found.round_seconds == max(deadline, *(of[c] for c in kept))


@given(rounds(), st.randoms())
def test_the_order_of_clients_does_not_matter(given_: dict[str, Any], random: Any) -> None:
    order = list(range(len(given_["clients"])))
    random.shuffle(order)
    mixed = {name: given_[name][order] for name in ("clients", "seconds", "unavailability")}
    one, other = select(**given_), select(**{**given_, **mixed})
    assert set(one.clients) == set(other.clients)
    assert one.round_seconds == other.round_seconds


def test_availability_is_a_function_of_round_and_client() -> None:
    population = Population({device("shy", availability=0.3): 1}, headroom=0.0)
    fleet = Fleet(population, MODEL, 2000, WORKLOAD)
    everyone = np.arange(2000)
    one = fleet.select(7, 3, everyone, np.ones(2000), np.full(2000, 32.0), wanted=2000)
    assert 480 < len(one.clients) < 720
    some = np.sort(np.random.default_rng(0).choice(2000, 500, replace=False))
    part = fleet.select(7, 3, some, np.ones(500), np.full(500, 32.0), wanted=500)
    assert set(part.clients) == set(one.clients) & set(some)
    assert len(set(fleet.select(7, 4, everyone, np.ones(2000), np.ones(2000), 2000).clients) & set(one.clients)) < 350


# ---- batches


@given(
    st.floats(1, 200),
    st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 50), st.integers(1, 400)), min_size=1, max_size=6),
)
def test_sharing_out_keeps_the_mean(mean: float, classes: list[tuple[float, int, int]]) -> None:
    speeds, counts, most = (np.array(column) for column in zip(*classes, strict=True))
    sizes = share_out(mean, speeds, counts.astype(float), most)
    assert (sizes >= 1).all()
    assert (sizes <= most).all()
    total, clients = float((sizes * counts).sum()), float(counts.sum())
    assert total <= max(mean * clients, clients) + clients  # rounded up to 1 at most
    open_ = sizes < most
    if open_.any():
        assert total > mean * clients - clients  # less than one sample each is lost by rounding
        shares = sizes[open_] / speeds[open_]
        assert (sizes[open_] >= shares.max() * speeds[open_] - 1 - 1e-6 - shares.max() * 0).all() or sizes.min() == 1


def test_rules() -> None:
    def sizes(rule: Any, **options: Any) -> list[int]:
        population = Population({SLOW: 0.5, FAST: 0.5}, batch_size=rule, headroom=0.0, **options)
        return Fleet(population, MODEL, 10, WORKLOAD).batch_sizes.tolist()

    assert sizes("largest") == [64, 200]
    assert sizes("loader") == [32, 32]
    assert sizes({"slow": 7, "fast": 9}) == [7, 9]
    slow, fast = sizes("proportional")
    assert slow < 32 < fast
    assert slow + fast in (63, 64)
    for rule, noise in (("fastest", None), ("fastest", 300.0)):
        for number, (own, most) in enumerate([(SLOW, 64), (FAST, 200)]):
            model = PerformanceModel(
                roofline_step_time(MODEL.cost, own, (1, most)),
                star(MODEL.parameter_bytes, own.up, own.down, own.latency),
                noise,
                most,
            )
            assert sizes(rule, noise_scale=noise)[number] == model.best_batch(clients=5, local_steps=4)


def test_simulated_seconds_by_hand() -> None:
    population = Population({SLOW: 0.5, FAST: 0.5}, headroom=0.0)
    fleet = Fleet(population, MODEL, 10, WORKLOAD)
    clients = np.arange(10)
    kinds = population.assign(10)
    seconds = fleet.seconds(clients, np.full(10, 3.0), (3 * fleet.batch_sizes_of(clients)).astype(np.float64))
    for client, kind in zip(clients, kinds, strict=True):
        own, batch = ((SLOW, 64), (FAST, 200))[kind]
        step = roofline(MODEL.cost(batch), own)
        message = 2 * own.latency + MODEL.parameter_bytes / own.down + MODEL.parameter_bytes / own.up
        assert seconds[client] == pytest.approx(message + 3 * step)


def test_table() -> None:
    table = Fleet(Population({SLOW: 0.3, FAST: 0.7}, headroom=0.0), MODEL, 10, WORKLOAD).table()
    assert table["clients"].to_dict() == {"slow": 3, "fast": 7}
    assert table.loc["fast", "peak_bytes"] == MODEL.peak(200) == table.loc["fast", "memory"]
    assert table.loc["slow", "step_seconds"] == pytest.approx(roofline(MODEL.cost(64), SLOW))


# ---- what cannot be


@pytest.mark.parametrize(
    ("shares", "options", "message"),
    [
        ({}, {}, "shares={}"),
        ("phone", {}, "shares='phone'"),
        ({"phone": 0}, {}, r"shares\['phone'\]=0: "),
        ({"toaster": 1}, {}, "device_class='toaster' is not known"),
        ({"phone": 1, device("phone"): 1}, {}, "phone, phone: .*its own name"),
        ({"phone": 1}, {"batch_size": "huge"}, "batch_size='huge'"),
        ({"phone": 1}, {"batch_size": {"t4": 3}}, "pass one number for each of 'phone'"),
        ({"phone": 1}, {"batch_size": {"phone": 0}}, r"batch_size\['phone'\]=0: "),
        ({"phone": 1}, {"over_selection": 0.9}, "over_selection=0.9"),
        ({"phone": 1}, {"deadline": 0}, "deadline=0"),
        ({"phone": 1}, {"min_clients": 0}, "min_clients=0"),
        ({"phone": 1}, {"noise_scale": -1}, "noise_scale=-1"),
        ({"phone": 1}, {"headroom": 1}, "headroom=1"),
        ({"phone": 1}, {"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(shares: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Population(shares, **options)


def test_devices_that_are_too_small() -> None:
    tiny = device("tiny", memory=1000)
    with pytest.raises(ValueError, match=r"device class 'tiny': .*a step with one sample takes"):
        Fleet(Population({tiny: 1}), MODEL, 3, WORKLOAD)
    with pytest.raises(ValueError, match=r"batch_size=90 .*device class 'slow'.*at most 64"):
        Fleet(Population({SLOW: 1}, batch_size={"slow": 90}, headroom=0.0), MODEL, 3, WORKLOAD)


def test_over_selection_asks_for_more() -> None:
    population = Population({"phone": 1}, over_selection=1.3)
    assert population.asked(10, 100) == 13
    assert population.asked(10, 11) == 11
    assert Population({"phone": 1}).asked(10, 100) == 10
    assert not math.isnan(sum(population.description()["shares"]))
