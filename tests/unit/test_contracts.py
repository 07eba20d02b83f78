"""What every method of every room keeps to.

The methods are those of the rooms' ``FACTORIES``; the example of each is its expression in the table of
docs/papers.md. So a method that is added to its room and to the table is tested here without another line.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fedscale import aggregators, compressors, local_rules, privacy, samplers, server
from lightning_fedscale.local_rules import LocalRule, Merged, Outcome
from lightning_fedscale.server import ServerOptimizer
from lightning_fedscale.types import ClientUpdate, Cohort

ROOMS = {
    "server": server,
    "local_rules": local_rules,
    "aggregators": aggregators,
    "compressors": compressors,
    "samplers": samplers,
    "privacy": privacy,
}
PLACE = "docs/papers.md"
TABLE = (Path(__file__).parents[2] / "docs" / "papers.md").read_text("utf8").partition("\n## ")[0]
METHODS = [
    (room, name) for room, module in ROOMS.items() for name in getattr(module, "FACTORIES", {}) if name[0].isalpha()
]


def expressions(room: str, name: str) -> Iterator[str]:
    """Where the table says ``room.name``, with the arguments that follow."""
    for found in re.finditer(rf"\b{room}\.{name}\b", TABLE):
        end, depth = found.end(), 0
        while end < len(TABLE) and (depth or TABLE[end] == "("):
            depth += {"(": 1, ")": -1}.get(TABLE[end], 0)
            end += 1
        yield TABLE[found.start() : end]


def example(room: str, name: str) -> Any:
    """The method as the table shows it first."""
    names = {**ROOMS, "torch": torch, "SGD": torch.optim.SGD, "StepLR": torch.optim.lr_scheduler.StepLR}
    shown = next(expressions(room, name), None)
    assert shown is not None, f"{PLACE}: add a row with the expression {room}.{name}(...)"
    return eval(shown, names)


def of(room: str) -> list[str]:
    return [name for each, name in METHODS if each == room]


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_each_has_a_row_in_the_table(room: str, name: str) -> None:
    assert example(room, name) is not None


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_each_is_public_and_documented(room: str, name: str) -> None:
    module = ROOMS[room]
    assert name in module.__all__
    factory = module.FACTORIES[name]
    assert getattr(module, name) is factory
    assert ">>>" in (factory.__doc__ or ""), "an example that is executed"


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_each_survives_pickling(room: str, name: str) -> None:
    """``start_method="spawn"`` sends the strategy to other processes."""
    pickle.loads(pickle.dumps(example(room, name)))


def test_the_table_names_only_what_there_is() -> None:
    for room, name in re.findall(rf"\b({'|'.join(ROOMS)})\.(\w+)", TABLE):
        if not re.search(rf"tests/\w+/.*{room}\.{name}", TABLE):
            assert hasattr(ROOMS[room], name), f"{room}.{name}"
    tests = set(re.findall(r"`(tests/[\w/]+\.py)`", TABLE))
    assert tests
    assert all((Path(__file__).parents[2] / test).is_file() for test in tests)


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def vectors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator).double() for name, size in (("a", (2, 3)), ("b", (4,)))}


# ---- server optimizers


@pytest.mark.parametrize("name", of("server"))
def test_server_state_goes_through_checkpoints(name: str) -> None:
    rule: ServerOptimizer = example("server", name)
    params, norms = vectors(0), ((50.0,) if example("server", name).reads_norms else ())
    state = fresh = rule.init(params)
    for number in range(1, 5):
        arguments = (vectors(number), state, params)
        before = copy.deepcopy(arguments)
        step, after = rule.update(*arguments, *norms)
        again, through = rule.update(vectors(number), saved(state), params, *norms)
        assert str(arguments) == str(before), "update changed its arguments"
        assert list(step) == list(params)
        assert all(torch.equal(step[key], again[key]) and step[key].isfinite().all() for key in params)
        assert str(after) == str(through)
        state = after
    assert rule.init(params) is not state
    assert str(fresh) == str(rule.init(params))


@pytest.mark.parametrize("name", of("server"))
def test_servers_that_say_so_do_not_read_parameters(name: str) -> None:
    """They are given zeros in place of the parameters."""
    rule, delta = example("server", name), {"w": torch.tensor([0.5, -0.25], dtype=torch.float64)}
    steps = []
    for value in (0.0, 7.0):
        params = {"w": torch.full((2,), value, dtype=torch.float64)}
        norms = (1.0,) if rule.reads_norms else ()
        state = rule.init(params)
        for _ in range(2):
            step, state = rule.update(delta, state, params, *norms)
        steps.append(step["w"])
    assert rule.reads_params or torch.equal(*steps)


@pytest.mark.parametrize("name", of("server"))
def test_servers_refuse_the_state_of_others(name: str) -> None:
    rule: ServerOptimizer = example("server", name)
    params, norms = vectors(0), ((50.0,) if rule.reads_norms else ())
    if rule.init(params) == {}:
        rule.update(vectors(1), {"optimizer": "another"}, params, *norms)  # has none of its own
    else:
        with pytest.raises(ValueError, match=r"server_optimizer=.*: the checkpoint has the state of another"):
            rule.update(vectors(1), {"optimizer": "another"}, params, *norms)


@pytest.mark.parametrize("name", of("server"))
def test_servers_bear_layers_that_freeze_and_unfreeze(name: str) -> None:
    rule: ServerOptimizer = example("server", name)
    params, norms = vectors(0), ((50.0,) if rule.reads_norms else ())
    state = rule.init(params)
    for names in (["a", "b"], ["b"], ["b", "a"], ["a"]):
        here = {key: params[key] for key in names}
        step, state = rule.update({key: vectors(1)[key] for key in names}, saved(state), here, *norms)
        assert list(step) == names


# ---- local rules


def outcome(number: int) -> Outcome:
    rows = torch.from_numpy(np.random.default_rng(number).normal(size=(2, 5)))
    return Outcome(rows[0].clone(), steps=3, lr=0.1, momentum=0.0, gradient=rows[1].clone())


@pytest.mark.parametrize("name", of("local_rules"))
def test_local_rules_do_what_they_announce(name: str) -> None:
    rule: LocalRule = example("local_rules", name)
    assert rule.name == name
    cohort = Cohort(0, np.array([1, 4]), num_clients=6, trainable=5, seed=0)
    server_state = rule.init(torch.zeros(5, dtype=torch.float64))
    clients: dict[int, Any] = {}
    for round in range(3):
        before = copy.deepcopy((server_state, clients))
        reports = []
        for client in cohort.clients.tolist():
            for kept in (clients.get(client), saved(clients.get(client))):
                correction = rule.begin(kept, saved(server_state))
                assert correction.shift is None or correction.shift.shape == (5,)
                assert correction.proximal >= 0
            without = outcome(9 * round + client)
            if not rule.needs_gradient:
                without = without._replace(gradient=None)
            reports.append(rule.finish(without, clients.get(client), server_state))
            assert without.delta.isfinite().all()
        assert str((server_state, clients)) == str(before), "begin or finish changed a state"
        for client, report in zip(cohort.clients.tolist(), reports, strict=True):
            assert (report.state is not None) == rule.keeps_state
            assert (report.message is not None) == rule.sends_message
            assert report.normalizer > 0
            clients[client] = saved(report.state)
        sent = [report.message for report in reports if report.message is not None]
        messages = sum(sent, torch.zeros(5)) if rule.sends_message else None
        arguments = (Merged(torch.ones(5, dtype=torch.float64), messages, 2.0, 2, cohort), server_state)
        kept_state = str(server_state)
        delta, server_state = rule.merge(*arguments)
        assert str(arguments[1]) == kept_state, "merge changed a state"
        assert delta.shape == (5,)
        server_state = saved(server_state)
    assert rule.vectors_up >= 1
    assert rule.vectors_down >= 1


# ---- compressors


@pytest.mark.parametrize("name", of("compressors"))
def test_compressors_send_what_they_count(name: str) -> None:
    rule = example("compressors", name)
    state = rule.init(vectors(0))
    for number in range(1, 4):
        delta = vectors(number)
        before = copy.deepcopy((delta, state))
        encoded, after = rule.encode(delta, state, np.random.default_rng(number))
        again, through = rule.encode(delta, saved(state), np.random.default_rng(number))
        assert str((delta, state)) == str(before), "encode changed its arguments"
        assert encoded.bits == again.bits
        assert str(after) == str(through)
        message = encoded.payload()
        assert len(message) == math.ceil(encoded.bits / 8)
        decoded = rule.decode(message, delta)
        for key, value in delta.items():
            assert encoded.seen[key].shape == value.shape
            assert torch.equal(encoded.seen[key], again.seen[key])
            assert torch.equal(encoded.seen[key], decoded[key])
        state = after


# ---- aggregators


@pytest.mark.parametrize("name", of("aggregators"))
def test_aggregators_heed_neither_ranks_nor_order(name: str) -> None:
    rule = example("aggregators", name)
    clients = np.arange(0, 22, 2)
    cohort = Cohort(0, clients, num_clients=30, trainable=4, seed=0)
    deltas = np.random.default_rng(0).normal(size=(len(clients), 5))

    def update(place: int) -> ClientUpdate:
        norm = float(np.linalg.norm(deltas[place][:4]))
        delta = torch.from_numpy(deltas[place].copy())
        return ClientUpdate(int(clients[place]), delta, norm, 3 + place, 3 + place, 2, 1.0, 0.1)

    def aggregate(*ranks: list[int]) -> Tensor:
        totals = []
        for places in ranks:
            total = rule.init(torch.zeros(5, dtype=torch.float64), cohort)
            for place in places:
                total = rule.accumulate(total, update(place), rule.weigh(update(place)), cohort)
            totals.append(total)
        state = rule.fresh_state(torch.zeros(5, dtype=torch.float64), cohort)
        result, after = rule.finish_with(torch.stack(totals).sum(0), cohort, state)
        assert str(saved(after)) == str(after)
        return result

    everyone = list(range(len(clients)))
    whole = aggregate(everyone)
    assert whole.shape == (5,)
    assert whole.isfinite().all()
    torch.testing.assert_close(aggregate(everyone[::-1]), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(aggregate(everyone[::3], everyone[1::3], everyone[2::3]), whole, rtol=1e-12, atol=1e-12)


# ---- samplers


@pytest.mark.parametrize("name", of("samplers"))
def test_samplers_are_pure_and_ascending(name: str) -> None:
    sampler = example("samplers", name)
    for round in range(20):
        asked = {"seed": 3, "round": round, "num_clients": 4, "clients_per_round": 2}
        cohort = sampler(**asked)
        assert cohort.dtype == np.int64
        assert (np.diff(cohort) > 0).all()
        assert set(cohort.tolist()) <= set(range(4))
        assert sampler(**asked).tolist() == cohort.tolist()
        assert samplers.reads_losses(sampler) in (False, True)


# ---- names


@pytest.mark.parametrize("room", [room for room, module in ROOMS.items() if hasattr(module, "by_name")])
def test_unknown_names_are_answered_with_the_known_ones(room: str) -> None:
    by_name: Callable[[str], Any] = import_module(f"lightning_fedscale.{room}").by_name
    with pytest.raises(ValueError, match="nonesuch") as caught:
        by_name("nonesuch")
    for name in of(room):
        try:
            by_name(name)
        except ValueError as error:
            assert "pass" in str(error), f"{name} needs arguments, which are not named"  # noqa: PT017
        else:
            assert repr(name) in str(caught.value)
