"""The parts of which vectorized training is made: the clients' draws, captured steps, what a module keeps in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.nn import functional

from lightning_fedscale.core.executors.vectorized.graph_capture import CapturedStep, TrainerAccessed, hide_trainer
from lightning_fedscale.core.executors.vectorized.rng import ClientStreams, DrawPerClient
from lightning_fedscale.core.executors.vectorized.rows import Rows
from lightning_fedscale.utils import randomness

CPU = torch.device("cpu")
CLIENTS = 5

RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: functional.dropout(x, 0.3),
    "dropout twice": lambda x: functional.dropout(functional.dropout(x, 0.3) * 2, 0.5),
    "dropout2d": lambda x: functional.dropout2d(x[:, :, None, None], 0.3),
    "alpha dropout": lambda x: functional.alpha_dropout(x, 0.3, training=True),
    "rand": lambda x: x + torch.rand(8, 4),
    "randn": lambda x: x + torch.randn(4),
    "randn_like": lambda x: x + torch.randn_like(x),
    "randint": lambda x: x + torch.randint(0, 9, (8, 1)),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "normal": lambda x: torch.normal(x, 1.0),
    "gumbel": functional.gumbel_softmax,
    # What dropout is on a GPU: an operator that takes no generator.
    "fused dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "fused dropout after noise": lambda x: torch.native_dropout(x + torch.randn_like(x), 0.3, True)[0],
    "noise after fused dropout": lambda x: torch.native_dropout(x, 0.3, True)[0] + torch.rand_like(x),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.2),
}


def alone(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    results = []
    for client, row in enumerate(stack):
        randomness.seed_globals(100 + client, CPU)
        results.append(function(row))
    return torch.stack(results)


@pytest.mark.parametrize("name", RANDOM)
def test_every_client_draws_what_it_would_draw_alone(name: str) -> None:
    function, stack = RANDOM[name], torch.randn(CLIENTS, 8, 4)
    expected = alone(function, stack)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with DrawPerClient(ClientStreams(lambda client: 100 + client, CPU), range(CLIENTS)) as drawing:
        got = vmap(function, randomness="different")(stack)
    assert drawing.noticed
    assert torch.equal(got, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["dropout", "randn_like", "rand", "fused dropout", "noise after fused dropout"])
def test_a_captured_step_draws_from_the_streams_it_is_given(name: str) -> None:
    stack, other = torch.randn(CLIENTS, 8, 4), torch.randn(CLIENTS, 8, 4)
    captured = CapturedStep(lambda x: [vmap(RANDOM[name], randomness="different")(x)], [stack.clone()], CPU)
    for given in (stack, other):
        (got,) = captured.replay([given], ClientStreams(lambda client: 100 + client, CPU), range(CLIENTS))
        assert got is not None
        assert torch.equal(got, alone(RANDOM[name], given))


@pytest.mark.parametrize(
    "function", [lambda x: x + torch.randperm(8)[:, None], lambda x: torch.multinomial(x.sigmoid(), 2).float()]
)
def test_what_cannot_be_told_apart_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    streams = ClientStreams(lambda client: client, CPU)
    with pytest.raises(NotImplementedError, match="draws"), DrawPerClient(streams, range(CLIENTS)):
        vmap(function, randomness="different")(torch.randn(CLIENTS, 8, 4))


def test_an_operator_without_a_generator_switches_the_generator_of_its_device_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the states of all generators are copied, for every client in every step")

    monkeypatch.setattr(randomness, "capture", refuse)
    monkeypatch.setattr(randomness, "restore", refuse)
    with DrawPerClient(ClientStreams(lambda client: client, CPU), range(CLIENTS)) as drawing:
        vmap(RANDOM["fused dropout"], randomness="different")(torch.randn(CLIENTS, 8, 4))
    assert drawing.noticed


ATEN = torch.ops.aten
FUSED_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention.default: (),
    ATEN._scaled_dot_product_efficient_attention.default: (None, True),
    ATEN._scaled_dot_product_cudnn_attention.default: (None, True),
}


@pytest.mark.parametrize("operator", FUSED_ATTENTION, ids=str)
def test_fused_attention_draws_only_with_dropout(operator: Any) -> None:
    streams, others = ClientStreams(lambda client: client, CPU), FUSED_ATTENTION[operator]
    with FakeTensorMode():
        # vmap puts the clients of these operators into the batch, of 4 samples here.
        q = torch.empty(CLIENTS * 4, 2, 16, 32, device="cuda")
        with DrawPerClient(streams, range(CLIENTS)) as drawing:
            assert operator(q, q, q, *others)[0].shape == q.shape
            assert operator(q, q, q, *others, 0.0)[0].shape == q.shape
        assert not drawing.noticed
        with pytest.raises(NotImplementedError, match="draws"), DrawPerClient(streams, range(CLIENTS)):
            operator(q, q, q, *others, 0.1)


def test_a_captured_step_keeps_attention_without_dropout_as_it_is() -> None:
    """The CPU's fused attention counts as random too."""

    def attention(q: Tensor) -> list[Tensor | None]:
        return [ATEN._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]]

    q = torch.randn(CLIENTS * 4, 2, 16, 32)
    (got,) = CapturedStep(attention, [q], CPU).replay([q], ClientStreams(lambda client: client, CPU), range(CLIENTS))
    assert got is not None
    assert torch.equal(got, attention(q)[0])  # type: ignore[arg-type]


def test_captured_gradients_have_the_bits_of_autograd() -> None:
    torch.manual_seed(0)
    weights, inputs = torch.randn(CLIENTS, 16, 8), torch.randn(CLIENTS, 10, 8)

    def gradients(weights: Tensor, inputs: Tensor) -> list[Tensor | None]:
        leaf = weights.detach().requires_grad_()
        loss = vmap(lambda w, x: functional.linear(x, w).relu().pow(2).mean())(leaf, inputs)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), [leaf])]

    expected = gradients(weights, inputs)
    captured = CapturedStep(gradients, [weights.clone(), inputs.clone()], CPU)
    streams = ClientStreams(lambda client: client, CPU)

    def is_same() -> bool:
        again = captured.replay([weights, inputs], streams, range(CLIENTS))
        return all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))  # type: ignore[arg-type]

    assert is_same()
    captured.improve(is_same)
    assert is_same()


def test_a_captured_step_sees_no_trainer() -> None:
    module = pl.LightningModule()
    for read in (
        lambda: module.trainer.current_epoch,
        lambda: module.current_epoch,
        lambda: module.global_step,
        lambda: module.logger,
    ):
        with hide_trainer(module), pytest.raises(TrainerAccessed):
            read()
    assert module._trainer is None


@pytest.mark.parametrize(
    "use",
    [lambda i: i == 0, lambda i: i + 1, lambda i: f"{i}", lambda i: [1, 2][i], bool, hash, lambda i: i % 2, float],
)
def test_a_captured_step_cannot_use_the_number_of_its_batch(use: Callable[[object], object]) -> None:
    with hide_trainer(pl.LightningModule()) as number, pytest.raises((TrainerAccessed, TypeError)):
        use(number)


@pytest.mark.parametrize("indices", [[0], [1, 2, 3], [0, 3], [0, 1, 2, 3, 4]])
def test_rows(indices: list[int]) -> None:
    stack = torch.arange(15.0).reshape(5, 3)
    expected = stack.clone()
    rows = Rows(indices)
    values = rows.of(stack)
    assert torch.equal(values, expected[indices])
    values.mul_(2)
    rows.write(stack, values)
    expected[indices] *= 2
    assert torch.equal(stack, expected)
    rows.add(stack, torch.ones_like(values))
    expected[indices] += 1
    assert torch.equal(stack, expected)
