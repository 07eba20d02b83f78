"""Every rule of every registry: what it returns and keeps is on the device, also after a checkpoint was read.

Rules come from the registries, and their arguments from docs/papers.md, so a new one is tested without another line.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_fedscale import aggregators, attacks, compressors, privacy, server
from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.core.client_state import ClientStore
from lightning_fedscale.core.executors.shared_tensors import shared_tensors_of
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.round.server_step import OPTIMIZER, GlobalModel
from lightning_fedscale.local_rules import Merged, Outcome
from lightning_fedscale.server import ServerOptimizer
from tests.second_device.device import DEVICE, Seen, is_there, second_device, through_checkpoint
from tests.second_device.models import CLIENTS, cohort, net, update, vector
from tests.unit.test_contracts import example, of

RESUMED = pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
CLIENT = 7


def kept_by_a_client(state: Any, *, resumed: bool) -> Any:
    """What a client finds in its next round; ``resumed`` if the run was interrupted before."""
    if state is None:
        return None
    store = ClientStore()
    store.states.put(CLIENT, "kept", state)
    if resumed:
        saved = through_checkpoint(store.state_dict())
        store = ClientStore()
        store.load_state_dict(saved, DEVICE)
    return store.states.get(CLIENT, "kept")


# ---- servers


def rounds(rule: ServerOptimizer, seen: Seen, *, resumed: bool) -> list[int]:
    """Take three steps; return how often each of them waits for the device."""
    shared = shared_tensors_of(net())
    params = shared.named(shared.view.read())
    norms, state, reads = ((50.0,) if rule.reads_norms else ()), rule.init(params), list[int]()
    for _ in range(3):
        seen.clear()
        step, state = rule.update(shared.named(shared.view.empty()), state, params, *norms)
        reads.append(seen.reads.total())
        assert is_there(step)
        if resumed:
            model = GlobalModel(AlgorithmOptions(None, None, None, aggregators.mean()), rule)
            model.load_states({OPTIMIZER: through_checkpoint(state)}, DEVICE)
            state = model.states[OPTIMIZER]
    return reads


def servers() -> Iterator[Any]:
    yield from (pytest.param(example("server", name), id=name) for name in of("server"))
    for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "RMSprop", "SGD"):
        yield pytest.param(server.from_torch(getattr(torch.optim, name), lr=0.1), id=f"from_torch({name})")


@pytest.mark.parametrize("rule", list(servers()))
def test_a_server_waits_no_more_often_after_resuming(rule: ServerOptimizer) -> None:
    with second_device() as seen:
        assert rounds(rule, seen, resumed=True) == rounds(rule, seen, resumed=False)


# ---- clients


@RESUMED
@pytest.mark.parametrize("name", of("local_rules"))
def test_local_rules(name: str, resumed: bool) -> None:
    rule = example("local_rules", name)
    with second_device():
        state, kept = rule.init(vector(5)), None
        for _ in range(3):
            assert is_there(rule.begin(kept, state))
            outcome = Outcome(vector(5), 3, 0.1, 0.0, vector(5) if rule.needs_gradient else None)
            report = rule.finish(outcome, kept, state)
            assert is_there(report)
            messages = vector(5) if rule.sends_message else None
            delta, state = rule.merge(Merged(vector(5), messages, 2.0, 2, cohort(5)), state)
            assert is_there((delta, state))
            kept = kept_by_a_client(report.state, resumed=resumed)


def all_compressors() -> Iterator[Any]:
    for name in of("compressors"):
        rule = example("compressors", name)
        yield pytest.param(rule, id=name)
        if rule.contractive and not rule.keeps_error and name != "top_k":
            yield pytest.param(compressors.error_feedback(rule), id=f"error_feedback({name})")
    for name, wrap in compressors.WRAPPERS.items():
        required = [p for p in inspect.signature(wrap).parameters.values() if p.default is p.empty]
        given: dict[str, Any] = {"phase": SimpleNamespace(critical=True)}
        yield pytest.param(wrap(**{p.name: given.get(p.name, compressors.top_k(0.1)) for p in required}), id=name)


@RESUMED
@pytest.mark.parametrize("rule", list(all_compressors()))
def test_compressors(rule: Compressor, resumed: bool) -> None:
    with second_device():
        delta = {"a": vector(600).view(20, 30), "b": vector(4)}
        state = rule.init(delta)
        for _ in range(3):
            encoded, state = rule.encode(delta, state, np.random.default_rng(0))
            assert is_there(encoded.seen)
            state = kept_by_a_client(state, resumed=resumed)


# ---- the sum over clients


def all_aggregators() -> Iterator[Any]:
    yield from (pytest.param(example("aggregators", name), id=name) for name in of("aggregators"))
    yield pytest.param(aggregators.mean("uniform"), id="uniform mean")
    for name in of_privacy():
        if isinstance(rule := example("privacy", name), Aggregator):
            yield pytest.param(rule, id=name)
    for name, attack in every_attack():
        yield pytest.param(attacks.attacked(aggregators.median(), attack, attackers=[2, 4]), id=name)


def every_attack() -> Iterator[tuple[str, attacks.Attack]]:
    """Every attack of the module, with 1 for each argument that has no default."""
    for name, make in inspect.getmembers(attacks, inspect.isfunction):
        if name[0] != "_" and inspect.signature(make).return_annotation == "Attack":
            required = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty]
            yield name, make(**{parameter.name: 1.0 for parameter in required})


def of_privacy() -> list[str]:
    """Every rule for privacy that can be chosen."""
    return [name for name in privacy.__all__ if name[0].islower()]


@RESUMED
@pytest.mark.parametrize("rule", list(all_aggregators()))
def test_aggregators(rule: Aggregator, resumed: bool) -> None:
    length = 9
    with second_device():
        who = cohort(length - 1)
        state = rule.fresh_state(vector(length), who)
        for _ in range(2):
            total = rule.init(vector(length), who)
            for place in range(len(CLIENTS)):
                one = update(place, vector(length))
                total = rule.accumulate(total, one, rule.weigh(one), who)
            delta, state = rule.finish_with(total, who, state)
            assert is_there(delta)
            assert delta.shape == (length,)
            if resumed:
                model = GlobalModel(AlgorithmOptions(None, None, None, rule), server.fed_avg())
                model.load_states({"aggregator": through_checkpoint(state)}, DEVICE)
                state = model.states["aggregator"]


@pytest.mark.parametrize("name", of("aggregators"))
def test_rows_on_the_device_are_aggregated_there(name: str) -> None:
    with second_device():
        assert is_there(aggregators.aggregate(example("aggregators", name), torch.empty(11, 9, device=DEVICE)))


@pytest.mark.parametrize("where", ["server", "client"])
@pytest.mark.parametrize("adaptive", [None, privacy.AdaptiveClipping()], ids=["", "adaptive"])
def test_private_means(where: Any, adaptive: privacy.AdaptiveClipping | None) -> None:
    rule = privacy.dp_fed_avg(1.0, noise_multiplier=0.2, delta=1e-5, noise=where, adaptive=adaptive)
    with second_device():
        state = rule.calibrated(0.5, len(CLIENTS)).init()
        for _ in range(2):
            rule.clip(vector(9), state)
            mean, state = rule.finish(vector(9), 3.0, state, cohort(9), 4.0, np.random.default_rng(0))
            assert is_there(mean)
            state = through_checkpoint(state)


def test_nothing_that_can_be_chosen_for_privacy_is_left_out() -> None:
    covered = {"dp_fed_avg", *(name for name in of_privacy() if isinstance(example("privacy", name), Aggregator))}
    assert covered == set(of_privacy()), "add what is new to test_private_means"
