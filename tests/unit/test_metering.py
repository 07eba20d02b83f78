"""Counted FLOPs against counts by hand."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_fedscale.devices.batches import form_of
from lightning_fedscale.ledger import count_parameters
from lightning_fedscale.metering import Meter
from tests.networks import KINDS, Classifier


def meter_of(module: pl.LightningModule, **options: Any) -> Meter:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return Meter(trainer, module, **options)


class Wrapped(pl.LightningModule):
    """Any network whose outputs are summed up."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.network(batch)
        return (output[0] if isinstance(output, tuple) else output).sum()

    def validation_step(self, batch: Any) -> None:
        self.log("loss", self.network(batch).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_multilayer_perceptron() -> None:
    module = Wrapped(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)))
    cost = meter_of(module).training(form_of(torch.zeros(8, 10)))
    first, second = 2 * 8 * 10 * 20, 2 * 8 * 20 * 5
    assert cost.forward == first + second
    assert cost.backward == first + 2 * second  # nobody asks for the gradient of the inputs
    assert (cost.optimizer, cost.samples, cost.tokens, cost.uncounted) == (0, 8, 8.0, 0.0)
    assert meter_of(module).evaluation(form_of(torch.zeros(4, 10))) == (first + second) / 2


def test_convolutions() -> None:
    module = Wrapped(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1)))
    cost = meter_of(module).training(form_of(torch.zeros(2, 3, 16, 16)))
    first, second = 2 * 2 * 16 * 16 * 9 * 3 * 8, 2 * 2 * 8 * 8 * 9 * 8 * 4
    assert cost.forward == first + second
    assert cost.backward == first + 2 * second


class Attention(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(inputs, inputs, inputs)


def test_attention() -> None:
    """On a CPU, where torch counts none."""
    module = Wrapped(nn.Sequential(nn.Linear(8, 8, bias=False), Attention()))
    batch, heads, length, width = 2, 3, 16, 8
    cost = meter_of(module).training(form_of(torch.zeros(batch, heads, length, width)))
    products = 2 * batch * heads * length * length * width  # one of the two products of attention
    linear = 2 * batch * heads * length * width * width
    assert cost.forward == linear + 2 * products
    # The fused backward recomputes the scores: five products.
    assert cost.backward == linear + 5 * products


def test_recurrent_layers() -> None:
    module = Wrapped(nn.LSTM(6, 7, batch_first=True))
    cost = meter_of(module).training(form_of(torch.zeros(2, 5, 6)))
    assert cost.forward == 2 * (2 * 5) * 4 * 7 * (6 + 7)
    assert cost.backward == 2 * cost.forward


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_linear_in_the_batch_and_leaves_no_trace(kind: str) -> None:
    make, batch_of = KINDS[kind]
    module = Classifier(make())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    meter, forms = meter_of(module), [form_of(batch_of(n)) for n in (4, 12)]
    state = torch.get_rng_state()
    one, three = map(meter.training, forms)
    assert 3 * one.flops == three.flops > 0
    assert one.samples == 4
    assert not meter.unknown
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_text_counts_tokens_and_six_flops_per_parameter() -> None:
    make, batch_of = KINDS["gpt"]
    module = Classifier(make())
    meter = meter_of(module)
    cost = meter.training(form_of(batch_of(4)))
    assert cost.tokens == 4 * 32
    assert meter.counts_text
    # The table of positions is no embedding layer but a few numbers; attention comes on top.
    assert 0.9 < cost.flops / (6 * count_parameters(module).non_embedding * cost.tokens) < 1.2


def test_steps_that_look_at_their_data_run_on_zeros() -> None:
    class Looks(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(batch).sum() * (2.0 if batch.abs().max().item() > 1 else 1.0)

    cost = meter_of(Looks(nn.Linear(4, 3))).training(form_of(torch.ones(5, 4)))
    assert cost.forward == 2 * 5 * 4 * 3


def test_manual_optimization_counts_all_of_its_step() -> None:
    class Manual(Wrapped):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 3))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.network(batch).sum())
            optimizer.step()

    cost = meter_of(Manual()).training(form_of(torch.ones(5, 4)))
    assert cost.flops == 2 * (2 * 5 * 4 * 3)


def test_unknown_operators_are_told() -> None:
    class Spectral(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.fft.rfft(inputs).abs()

    meter = meter_of(Wrapped(nn.Sequential(nn.Linear(64, 64), Spectral())))
    assert meter.training(form_of(torch.zeros(8, 64))).uncounted > 0.01
    assert any("fft" in name for name in meter.unknown)
    assert meter.uncounted > 0.01


def test_parameters_have_one_definition_each() -> None:
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    assert count_parameters(module) == (80, 80, 40)
    module[1].weight = module[0].weight  # a shared head multiplies
    assert count_parameters(module) == (40, 40, 40)
    module[1].weight = nn.Parameter(torch.zeros(10, 4), requires_grad=False)
    assert count_parameters(module) == (80, 40, 0)


def test_tokens_by_the_users_own_rule() -> None:
    module = Wrapped(nn.Linear(4, 3))
    assert meter_of(module, tokens_fn=lambda batch: batch.numel()).training(form_of(torch.ones(5, 4))).tokens == 20
    for nonsense in (-1, None, float("nan"), "many"):
        with pytest.raises(ValueError, match=r"tokens_fn returned .* above 0"):
            meter_of(module, tokens_fn=lambda batch, value=nonsense: value).training(form_of(torch.ones(5, 4)))
