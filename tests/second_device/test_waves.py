"""Waves of vectorized clients, and what they draw, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_fedscale.core.client_state import OptimizerKeeper
from lightning_fedscale.core.executors.shared_tensors import shared_tensors_of
from lightning_fedscale.core.executors.vectorized import rng
from lightning_fedscale.core.executors.vectorized.clipping import Clip, _clip_by_norm, _clip_by_value
from lightning_fedscale.core.executors.vectorized.rng import ClientStreams, DrawPerClient
from lightning_fedscale.core.executors.vectorized.wave import ClientStart, Wave
from tests.second_device.device import DEVICE, is_there, second_device
from tests.second_device.models import net, vector
from tests.unit.test_contracts import example, of

CLIPS: list[Clip | None] = [None, partial(_clip_by_norm, bound=1.0), partial(_clip_by_value, bound=1.0)]


@pytest.mark.parametrize("name", [None, *of("local_rules")], ids=str)
@pytest.mark.parametrize("rows", [(0, 1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {}), (AdamW, {"fused": True})], ids=str
)
def test_a_wave(kind: type[Optimizer], options: dict[str, Any], rows: tuple[int, ...], name: str | None) -> None:
    with second_device() as seen:
        module = net()
        optimizer = kind([p for p in module.parameters() if p.requires_grad], **{"lr": 0.1, **options})
        keeper, wave, shared = OptimizerKeeper(optimizer), Wave(optimizer), shared_tensors_of(module, ["out.*"])
        rule, length = None if name is None else example("local_rules", name), shared.view.trainable
        correction = None if rule is None else rule.begin(None, rule.init(vector(length)))
        wave.begin(shared, [keeper.fresh] * 3, [ClientStart(None, {}, correction)] * 3)
        chosen = wave.rows(rows)
        gradients: list[Tensor | None] = [torch.empty_like(p) for p in wave.parameters(chosen)]
        for step, clip in enumerate([*CLIPS, *CLIPS]):
            if step == len(CLIPS):
                seen.clear()  # what steps need once is on the device now
            wave.step(chosen, wave.parameters(chosen), list(gradients), clip)
            wave.set_buffers(chosen, wave.buffers(chosen))
        assert not seen.reads, "a step waits for the device"
        assert not seen.copies, "a step copies between host and device"
        wave.accumulate(chosen, gradients)
        wave.step_accumulated(chosen, None)
        assert is_there(list(wave.deltas(shared, [shared.view.read()])))
        for state in wave.optimizer_state(rows[-1]).values():
            assert is_there([value for key, value in state.items() if key != "step"])
        wave.write_to(shared, 0)


class Generator:
    """A generator of the device, of which a CPU build of torch has none; it has a state, which has a name."""

    def __init__(self, state: str) -> None:
        self.state = state

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


@contextmanager
def drawing(monkeypatch: pytest.MonkeyPatch, clients: list[int]) -> Iterator[list[str]]:
    """Yield the states from which operators without an argument for a generator draw inside the context."""
    default, drawn = Generator("the run's"), list[str]()
    streams = ClientStreams(int, DEVICE)
    for client in clients:
        streams._generators[client, DEVICE.type] = Generator(f"client {client}'s")  # type: ignore[assignment]
    monkeypatch.setattr(rng, "default_generator", lambda device: default)
    inside = streams.of_operator

    @contextmanager
    def noted(client: int, device: torch.device) -> Iterator[None]:
        with inside(client, device):
            drawn.append(default.state)
            yield

    monkeypatch.setattr(streams, "of_operator", noted)
    with DrawPerClient(streams, clients):
        yield drawn
    assert default.state == "the run's"


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda row: nn.functional.dropout(row, 0.5),
    "dropout of noise": lambda row: nn.functional.dropout(row, 0.5) + nn.functional.dropout(row, 0.1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_draws_from_the_generator_of_each_client(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with second_device() as seen, drawing(monkeypatch, [3, 5]) as drawn:
        torch.func.vmap(LAYERS[name], randomness="different")(torch.empty(2, 8, device=DEVICE))
    assert drawn == ["client 3's", "client 5's"] * (1 + (name != "dropout"))
    assert not seen.reads
    assert not seen.copies
