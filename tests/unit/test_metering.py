"""Counted FLOPs against counts by hand."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from lightning_fedscale.devices import operators
from lightning_fedscale.devices.batches import Form, form_of
from lightning_fedscale.metering import Meter
from lightning_fedscale.model_size import count_parameters
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
    assert (cost.samples, cost.tokens) == (8, 8.0)
    assert cost.optimizer == 10 * 20 + 20 + 20 * 5 + 5  # SGD: p += -lr * gradient, one operation an element
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
    assert all(seen.kind != "unknown" for seen in meter.operators.values())
    assert meter.uncounted == 0.0
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
    assert 0.9 < cost.flops / (6 * count_parameters(module).active * cost.tokens) < 1.2


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
    assert cost.forward == cost.backward == 2 * 5 * 4 * 3
    assert cost.optimizer == 4 * 3 + 3


def test_unknown_operators_are_told() -> None:
    class Spectral(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.fft.rfft(inputs).abs()

    meter = meter_of(Wrapped(nn.Sequential(nn.Linear(64, 64), Spectral())))
    assert meter.training(form_of(torch.zeros(8, 64))).flops > 0
    assert any("fft" in name for name, seen in meter.operators.items() if seen.kind == "unknown")
    assert 0.01 < meter.uncounted < 1.0


def test_parameters_have_one_definition_each() -> None:
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    assert count_parameters(module) == (80, 80, 40, 40)
    module[1].weight = module[0].weight  # a shared head multiplies
    assert count_parameters(module) == (40, 40, 40, 40)
    module[1].weight = nn.Parameter(torch.zeros(10, 4), requires_grad=False)
    assert count_parameters(module) == (80, 40, 40, 0)


def test_pruned_parameters_are_not_active() -> None:
    module = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 2))
    prune.random_unstructured(module[0], "weight", amount=13)
    assert count_parameters(module) == (72, 72, 72, 72 - 13)
    prune.remove(module[0], "weight")  # zeros for good are parameters again
    assert count_parameters(module).active == 72


def test_adapters_alone_are_active() -> None:
    base = nn.Linear(8, 8).requires_grad_(False)
    module = nn.ModuleDict({"base": base, "down": nn.Linear(8, 2, bias=False), "up": nn.Linear(2, 8, bias=False)})
    assert count_parameters(module) == (104, 32, 104, 32)


def test_tokens_by_the_users_own_rule() -> None:
    module = Wrapped(nn.Linear(4, 3))
    assert meter_of(module, tokens_fn=lambda batch: batch.numel()).training(form_of(torch.ones(5, 4))).tokens == 20


@pytest.mark.parametrize(
    ("tokens_fn", "message"),
    [
        *((lambda batch, value=value: value, "tokens_fn returned .* above 0") for value in (-1, 0, None, "many", True)),
        (lambda batch: float("nan"), "tokens_fn returned nan"),
        (lambda batch: (batch != 0).sum(), "tokens_fn returned a tensor, whose contents are not known"),
        (lambda batch: int((batch != 0).sum()), "tokens_fn failed .* tell the number of tokens from shapes"),
        (lambda batch: batch["text"].numel(), "tokens_fn failed"),
    ],
)
def test_tokens_that_cannot_be(tokens_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meter_of(Wrapped(nn.Linear(4, 3)), tokens_fn=tokens_fn).training(form_of(torch.ones(5, 4)))


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.zeros(4, 7, dtype=torch.int64), True),
        ({"input_ids": torch.zeros(4, 7, dtype=torch.int32), "weight": torch.zeros(4)}, True),
        (torch.zeros(4, 3, 7, 7, dtype=torch.uint8), False),  # images
        (torch.zeros(4, 7, dtype=torch.uint8), False),
        (torch.zeros(4, 7), False),
        ([torch.zeros(4), torch.zeros(4, 7, dtype=torch.int64)], False),
    ],
)
def test_integers_in_two_dimensions_are_text(batch: Any, text: bool) -> None:
    class Odd(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(torch.ones(4, 4)).sum()

    meter = meter_of(Odd(nn.Linear(4, 3)))
    assert meter.training(form_of(batch)).tokens == (28 if text else 4)
    assert meter.counts_text == text


class Encoding(UserDict[str, Tensor]):
    """As Hugging Face's tokenizers return."""


def test_any_mapping_is_a_batch() -> None:
    class Reads(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(batch["x"]).sum()

    cost = meter_of(Reads(nn.Linear(4, 3))).training(form_of(Encoding(x=torch.ones(5, 4))))
    assert (cost.forward, cost.samples) == (2 * 5 * 4 * 3, 5)


@dataclass
class Graph:
    nodes: Tensor


def test_objects_are_counted_by_the_first_one() -> None:
    class Reads(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(batch.nodes).sum()

    meter = meter_of(Reads(nn.Linear(4, 3)))
    for nodes in (5, 9):
        graph = Graph(torch.ones(nodes, 4))
        assert meter.training(form_of(graph), graph).forward == 2 * 5 * 4 * 3


def test_texts_make_no_new_forms() -> None:
    class Reads(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            runs.append(batch[1])
            return self.network(batch[0]).sum()

    runs: list[Any] = []
    meter = meter_of(Reads(nn.Linear(4, 3)))
    for text in ("a", "b", "c"):
        batch = [torch.ones(2, 4), [text, text]]
        assert meter.training(form_of(batch), batch).forward == 2 * 2 * 4 * 3
    assert runs == [["a", "a"]]


def test_a_step_that_cannot_be_copied_is_told_and_left_out() -> None:
    class Fails(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise OSError("no such file")

    with pytest.warns(UserWarning, match="the FLOPs of training_step are left out, .*OSError: no such file"):
        cost = meter_of(Fails(nn.Linear(4, 3))).training(form_of(torch.ones(5, 4)))
    assert (cost.flops, cost.samples) == (0, 5)


def test_what_is_frozen_is_counted_anew() -> None:
    module = Wrapped(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    meter, form = meter_of(module), form_of(torch.ones(5, 4))
    first, second = 2 * 5 * 4 * 6, 2 * 5 * 6 * 2
    assert meter.training(form).backward == first + 2 * second
    assert meter.size.active == 30 + 14
    module.network[0].requires_grad_(False)
    assert meter.training(form).backward == second
    assert meter.size.active == 14
    assert meter.training(form).optimizer == 14


def test_evaluation_of_transformers_is_counted() -> None:
    """Torch runs their layers in one fused operator then, whose products it does not count."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    batch, length, width = 3, 5, 8
    linear = 2 * batch * length * (4 * width * width + 2 * width * 16)
    attention = 2 * (2 * batch * length * length * width)
    assert meter_of(Wrapped(layer)).evaluation(form_of(torch.zeros(batch, length, width))) == linear + attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_on_meta_is_that_on_a_cpu() -> None:
    """Counted by torch itself where it can: forward the same, and backward without the scores computed again."""
    inputs = torch.zeros(2, 3, 16, 8, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        nn.functional.scaled_dot_product_attention(inputs, inputs, inputs).sum().backward()
    products = 2 * 2 * 3 * 16 * 16 * 8
    module = Wrapped(nn.Sequential(nn.Linear(8, 8, bias=False), Attention()))
    cost = meter_of(module).training(form_of(torch.zeros(2, 3, 16, 8)))
    linear = 2 * 2 * 3 * 16 * 8 * 8
    assert counter.get_total_flops() == 6 * products == (cost.flops - 2 * linear) - products


@pytest.mark.parametrize("layer", [nn.GRU, nn.RNN])
def test_other_recurrent_layers(layer: Any) -> None:
    cost = meter_of(Wrapped(layer(6, 7, batch_first=True))).training(form_of(torch.zeros(2, 5, 6)))
    gates = 3 if layer is nn.GRU else 1
    assert cost.forward == 2 * (2 * 5) * gates * 7 * (6 + 7)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_costs_the_same_fused_or_not(options: dict[str, Any]) -> None:

    class Fused(Wrapped):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, **options)

    assert meter_of(Fused(nn.Linear(4, 3))).training(form_of(torch.ones(5, 4))).optimizer == 15


def test_lbfgs_does_not_stop_the_count() -> None:
    class Whole(Wrapped):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    assert meter_of(Whole(nn.Linear(4, 3))).training(form_of(torch.ones(5, 4))).flops == 2 * 2 * 5 * 4 * 3


@pytest.mark.parametrize("name", ["aten::upsample_bilinear2d", "aten::linalg_vector_norm", "aten::add", "aten::relu"])
def test_what_is_free_is_not_unknown(name: str) -> None:
    operator = getattr(torch.ops.aten, name.removeprefix("aten::"))
    assert operators._kind(getattr(operator, operator.overloads()[0]), 0.0) == "free"


def test_forms_are_keys_also_where_their_nesting_has_no_hash() -> None:
    """As in older releases of torch."""

    class Nesting:
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, name: str) -> None:
            self.name = name

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Nesting) and other.name == self.name

    leaves = form_of(torch.ones(2)).leaves
    known = {Form(Nesting("list"), leaves): 1, Form(Nesting("dict"), leaves): 2}
    assert known[Form(Nesting("list"), leaves)] == 1
    assert Form(Nesting("set"), leaves) not in known
