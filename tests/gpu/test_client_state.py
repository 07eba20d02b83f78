"""What clients keep, on a CUDA device: in three tiers, with the same bits; and optimizers made anew in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer, RMSprop

from lightning_fedscale.core.client_state import Files, Memory, OptimizerKeeper, PinnedMemory, StateStore
from tests.features.test_resume import equal
from tests.gpu.test_cuda import weights
from tests.laws import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def state(client: int) -> dict[str, Any]:
    """4 MB on the device and a counter that is not."""
    return {"moment": torch.full((1 << 20,), float(client), device="cuda"), "step": torch.tensor(float(client))}


def test_states_move_to_the_host_and_to_files_and_come_back_as_they_were() -> None:
    store = StateStore([Memory(5 << 20), PinnedMemory(5 << 20), Files()])
    before = torch.cuda.memory_allocated()
    for client in range(4):
        store.stage(client, "optimizers", state(client))
    store.commit()
    assert torch.cuda.memory_allocated() - before < 5 << 20
    saved = store.snapshot()["optimizers"]
    assert [saved[client]["moment"].device.type for client in range(4)] == ["cpu", "cpu", "cpu", "cuda"]
    assert saved[2]["moment"].is_pinned()
    for client in range(4):
        found = store.get(client, "optimizers")
        assert found is not None
        assert [tensor.device.type for tensor in found.values()] == ["cuda", "cpu"]
        assert equal(found, state(client))


@pytest.mark.parametrize("bound", [0, 20_000, "1GiB"])
def test_bounds_do_not_matter(bound: int | str) -> None:
    options: dict[str, Any] = {"client_optimizer": "keep", "local_steps": 5}
    assert reference.difference(weights(client_state_memory=bound, **options), weights(**options)) == 0.0


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [nn.Parameter(torch.randn(shape, device="cuda", generator=generator)) for shape in ((50, 30), (40,), ())]


def train(optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for _ in range(3):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop])
@pytest.mark.parametrize("way", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_refilled_state_takes_the_steps_of_a_new_optimizer(
    kind: type[Optimizer], way: dict[str, bool], capturable: bool
) -> None:
    if kind is RMSprop and "fused" in way:
        pytest.skip("RMSprop has no fused form")
    options: dict[str, Any] = {"lr": 0.1, "capturable": capturable, **way}
    shared, own = parameters(), parameters()
    optimizer = kind(shared, **options)
    keeper = OptimizerKeeper(optimizer)
    keeper.load(None)
    train(optimizer, seed=1)
    places = {key: value.device for key, value in optimizer.state[shared[0]].items()}
    with torch.no_grad():
        torch._foreach_copy_([*shared], [*own])
    keeper.load(None)
    assert {key: value.device for key, value in optimizer.state[shared[0]].items()} == places
    assert [float(held["step"]) for held in optimizer.state.values()] == [0.0] * 3
    train(optimizer, seed=2)
    train(kind(own, **options), seed=2)
    assert all(map(torch.equal, shared, own))
