"""Counted FLOPs against counts by hand."""

from __future__ import annotations

import copy
import io
from collections import UserDict
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fedscale.callbacks.compute_accounting.client_costs import ClientTally
from lightning_fedscale.callbacks.compute_accounting.flop_meter import BatchCost, Meter
from lightning_fedscale.callbacks.compute_accounting.parameter_counts import count_parameters
from lightning_fedscale.callbacks.compute_accounting.signature_costs import CostTable
from lightning_fedscale.devices.profiling import costs
from lightning_fedscale.devices.profiling import operator_counter as operators
from lightning_fedscale.devices.profiling.batches import BatchSignature, signature_of
from tests.networks import KINDS, Classifier


def run(module: Any, batch: Any, meter: Meter, name: str = "training_step", samples: int | None = None) -> BatchCost:
    """A real step, as Lightning runs it, and what it cost."""
    optimizer = module.configure_optimizers()
    with meter.step(batch, samples, name=name) as step:
        module._current_fx_name = name
        output = getattr(module, name)(*((batch, 0) if name == "training_step" else (batch,)))
        module._current_fx_name = None
        if isinstance(output, Tensor) and module.automatic_optimization:
            output.backward()
            optimizer.step(lambda: output.detach())
    return step.cost


def cost_of(module: Any, batch: Any, **options: Any) -> BatchCost:
    return run(module, batch, Meter(module), **options)


class Wrapped(pl.LightningModule):
    """Any network whose outputs are summed up."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.network(batch)
        return (output[0] if isinstance(output, tuple) else output).sum()

    def validation_step(self, batch: Any) -> None:
        self.network(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_multilayer_perceptron() -> None:
    module = Wrapped(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)))
    cost = cost_of(module, torch.zeros(8, 10))
    first, second = 2 * 8 * 10 * 20, 2 * 8 * 20 * 5
    assert cost.forward == first + second
    assert cost.backward == first + 2 * second  # nobody asks for the gradient of the inputs
    assert (cost.samples, cost.tokens) == (8, 8.0)
    meter = Meter(module)
    run(module, torch.zeros(8, 10), meter)
    assert meter.optimizer_cost() == 10 * 20 + 20 + 20 * 5 + 5  # SGD: p += -lr * gradient, one operation an element
    assert cost_of(module, torch.zeros(4, 10), name="validation_step").forward == (first + second) / 2


def test_text_counts_tokens_and_six_flops_per_parameter() -> None:
    make, batch_of = KINDS["gpt"]
    module = Classifier(make())
    meter = Meter(module)
    module.log = lambda *_: None  # type: ignore[method-assign]
    cost = run(module, batch_of(4), meter)
    assert cost.tokens == 4 * 32
    # The table of positions is no embedding layer but a few numbers; attention comes on top.
    assert 0.9 < cost.flops / (6 * count_parameters(module).active * cost.tokens) < 1.2


def test_unknown_operators_are_told() -> None:
    class Spectral(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.fft.rfft(inputs).abs()

    meter = Meter(Wrapped(nn.Sequential(nn.Linear(64, 64), Spectral())))
    assert run(meter.module, torch.zeros(8, 64), meter).flops > 0
    assert any("fft" in name for name, seen in meter.coverage.operators.items() if seen.kind == "unknown")
    assert 0.01 < meter.coverage.uncounted < 1.0


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

    meter = Meter(Odd(nn.Linear(4, 3)))
    assert run(meter.module, batch, meter).tokens == (28 if text else 4)


class Encoding(UserDict[str, Tensor]):
    """As Hugging Face's tokenizers return."""


def test_any_mapping_is_a_batch() -> None:
    class Reads(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(batch["x"]).sum()

    cost = cost_of(Reads(nn.Linear(4, 3)), Encoding(x=torch.ones(5, 4)))
    assert (cost.forward, cost.samples) == (2 * 5 * 4 * 3, 5)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_costs_the_same_fused_or_not(options: dict[str, Any]) -> None:

    class Fused(Wrapped):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, **options)

    meter = Meter(module := Fused(nn.Linear(4, 3)))
    run(module, torch.ones(5, 4), meter)
    assert meter.optimizer_cost() == 15


def test_lbfgs_does_not_stop_the_count() -> None:
    class Whole(Wrapped):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    assert cost_of(Whole(nn.Linear(4, 3)), torch.ones(5, 4)).flops == 2 * 2 * 5 * 4 * 3


@pytest.mark.parametrize("name", ["aten::upsample_bilinear2d", "aten::linalg_vector_norm", "aten::add", "aten::relu"])
def test_what_is_free_is_not_unknown(name: str) -> None:
    operator = getattr(torch.ops.aten, name.removeprefix("aten::"))
    assert operators._kind(getattr(operator, operator.overloads()[0])) == "free"


def test_forms_are_keys_also_where_their_nesting_has_no_hash() -> None:
    """As in older releases of torch."""

    class Nesting:
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, name: str) -> None:
            self.name = name

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Nesting) and other.name == self.name

    leaves = signature_of(torch.ones(2)).leaves
    known = {BatchSignature(Nesting("list"), leaves): 1, BatchSignature(Nesting("dict"), leaves): 2}
    assert known[BatchSignature(Nesting("list"), leaves)] == 1
    assert BatchSignature(Nesting("set"), leaves) not in known


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_linear_in_the_batch_and_changes_nothing(kind: str) -> None:
    make, batch_of = KINDS[kind]
    torch.manual_seed(0)
    module, batches = Classifier(make()), [batch_of(n) for n in (4, 12)]
    module.log = lambda *_: None  # type: ignore[method-assign]
    twin, meter = copy.deepcopy(module), Meter(module)
    state = torch.get_rng_state()
    one, three = (run(module, batch, meter) for batch in batches)
    drawn, costs = torch.get_rng_state(), (one.flops, three.flops)
    torch.set_rng_state(state)
    for batch in batches:
        optimizer = twin.configure_optimizers()
        twin.training_step(batch, 0).backward()
        optimizer.step()
    assert 3 * costs[0] == costs[1] > 0
    assert (one.samples, one.counted) == (4, True)
    assert all(seen.kind != "unknown" for seen in meter.coverage.operators.values())
    assert meter.coverage.uncounted == 0.0
    assert torch.equal(torch.get_rng_state(), drawn)
    for (name, mine), theirs in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_tokens_by_the_users_own_rule() -> None:
    module = Wrapped(nn.Linear(4, 3))
    meter = Meter(module, tokens_fn=lambda batch: int((batch > 0).sum()))
    assert [run(module, batch, meter).tokens for batch in (torch.ones(5, 4), torch.eye(4))] == [20, 4]


@pytest.mark.parametrize(
    ("tokens_fn", "message"),
    [
        *((lambda batch, value=value: value, "tokens_fn returned .* above 0") for value in (-1, 0, None, "many", True)),
        (lambda batch: float("nan"), "tokens_fn returned nan"),
        (lambda batch: (batch != 0).sum(), "tokens_fn returned a tensor: return a number"),
        (lambda batch: batch["text"].numel(), "tokens_fn failed on a batch"),
    ],
)
def test_tokens_that_cannot_be(tokens_fn: Any, message: str) -> None:
    module = Wrapped(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        run(module, torch.ones(5, 4), Meter(module, tokens_fn=tokens_fn))


def test_what_is_frozen_is_counted_anew() -> None:
    module, batch = Wrapped(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))), torch.ones(5, 4)
    meter = Meter(module)
    first, second = 2 * 5 * 4 * 6, 2 * 5 * 6 * 2
    assert run(module, batch, meter).backward == first + 2 * second
    assert meter.parameters.size.active == 30 + 14
    assert isinstance(module.network, nn.Sequential)
    module.network[0].requires_grad_(False)
    module.zero_grad()
    assert run(module, batch, meter).backward == second
    assert meter.parameters.size.active == 14
    assert meter.optimizer_cost() == 14


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_evaluation_of_transformers_is_counted(inference: bool, padded: bool) -> None:
    """Torch runs their layers in one operator then, padding left out, and in inference mode takes others apart late."""
    batch, length, width, lengths = 3, 5, 8, [5, 2, 4]
    mask = torch.arange(length)[None] >= torch.tensor(lengths)[:, None] if padded else None
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True), 2)

    class Evaluated(Wrapped):
        network: nn.ModuleList

        def validation_step(self, batch: Any) -> None:
            self.network[1](self.network[0](batch, src_key_padding_mask=mask))

    module = Evaluated(nn.ModuleList([encoder, nn.Linear(width, 3)])).eval()
    with torch.inference_mode() if inference else torch.no_grad():
        cost = cost_of(module, torch.zeros(batch, length, width), name="validation_step")
    rows, pairs = (sum(lengths), sum(n * n for n in lengths)) if padded else (15, 75)
    layer = 2 * rows * (4 * width * width + 2 * width * 16) + 2 * (2 * pairs * width)
    assert cost.forward == 2 * layer + 2 * batch * length * width * 3
    assert torch.backends.mha.get_fastpath_enabled()


class Costs:
    """A module of one product whose cost is told from outside, and the numbers of the steps that were counted."""

    def __init__(self, wide: Callable[[int], int]) -> None:
        class Told(Wrapped):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self.network(batch[:1].expand(wide(number), -1)).sum()

        self.module, number = Told(nn.Linear(4, 3)), 0
        self.meter = Meter(self.module)
        self.costs, self.counted = [], []
        for number in range(600):
            cost = run(self.module, torch.ones(5, 4), self.meter)
            self.costs.append(cost)
            self.counted += [number] * cost.counted
        self.truth = [2 * 2 * wide(number) * 4 * 3 for number in range(600)]


def test_steps_that_cost_the_same_are_counted_less_and_less() -> None:
    found = Costs(lambda number: 5)
    assert [cost.flops for cost in found.costs] == found.truth
    assert not any(cost.error for cost in found.costs)
    assert found.counted[:8] == list(range(8))
    # Then one each time before their number has doubled.
    octaves = [sum(low <= number < 2 * low for number in found.counted) for low in (8, 16, 32, 64, 128, 256)]
    assert octaves == [1] * 6


@pytest.mark.parametrize(
    "wide",
    [
        lambda number: 9 if number % 5 == 0 else 2,  # such as a generator and its critic
        lambda number: 9 if number % 7 == 6 else 2,
        lambda number: 1 + (number * 2654435761 >> 7) % 8,  # such as random depth
        lambda number: 1 + number // 60,  # growing
    ],
    ids=["period of 5", "end of 7", "random", "growing"],
)
def test_costs_that_vary_have_a_mean_and_an_interval(wide: Callable[[int], int]) -> None:
    found = Costs(wide)
    total, truth = sum(cost.flops for cost in found.costs), sum(found.truth)
    error = sum(cost.error for cost in found.costs)
    assert all(cost.flops == found.truth[number] for number, cost in enumerate(found.costs) if cost.counted)
    assert len(found.counted) < 250
    assert 0 < error < 0.3 * truth
    assert abs(total - truth) < 2 * error


def test_what_is_known_outlives_an_interruption() -> None:
    """The same steps are counted, and the others cost the same to the last bit, if the run goes on elsewhere."""

    def wide(number: int) -> int:
        return 1 + (number * 2654435761 >> 7) % 8

    number = 0

    class Told(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(batch[:1].expand(wide(number), -1)).sum()

    def go_on(module: Any, meter: Meter, numbers: Any) -> list[BatchCost]:
        nonlocal number
        found = []
        for one in numbers:
            number = one
            found.append(run(module, torch.ones(5, 4), meter))
        return found

    module = Told(nn.Linear(4, 3))
    whole = go_on(module, Meter(module), range(200))
    go_on(module, meter := Meter(module), range(90))
    state = io.BytesIO()
    torch.save(meter.state_dict(), state)
    state.seek(0)
    resumed = Meter(Told(nn.Linear(4, 3)))
    resumed.load_state_dict(torch.load(state, weights_only=True))
    assert go_on(resumed.module, resumed, range(90, 200)) == whole[90:]


def test_counts_of_the_first_release_are_found() -> None:
    """A checkpoint names a signature by a digest, which no renamed class may change."""
    saved = {"steps": 7, "counted": 3, "varies": False, "recent": [[2.0, 3.0, 0.0, 4.0]]}
    table = CostTable()
    table.load({"b39de44d58c8ef7a241954a8b3be92f7": saved})
    costs, _ = table.of("training_step", signature_of(torch.ones(2, 3)).anonymous(), (True,))
    assert costs.state() == saved
    assert table.state() == {"b39de44d58c8ef7a241954a8b3be92f7": saved}


def test_many_sizes_are_told_by_those_before() -> None:
    """Batches of more sizes than can be counted: the others by what each number in them costs."""
    module = Wrapped(nn.Linear(4, 3))
    meter = Meter(module)
    costs = [run(module, torch.ones(rows, 4), meter) for rows in range(1, 301)]
    assert [cost.flops for cost in costs] == pytest.approx([2 * 2 * rows * 4 * 3 for rows in range(1, 301)])
    assert sum(cost.counted for cost in costs) < 100


@pytest.mark.parametrize(
    "beside", [float, lambda rows: Graph(rows), lambda rows: float("nan")], ids=["number", "object", "nan"]
)
def test_whatever_is_beside_the_tensors_is_not_counted_for_ever(beside: Callable[[int], Any]) -> None:
    class Reads(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.network(batch[0]).sum()

    meter = Meter(module := Reads(nn.Linear(4, 3)))
    costs = [run(module, [torch.ones(5, 4), beside(number)], meter) for number in range(300)]
    assert {cost.flops for cost in costs} == {2 * 2 * 5 * 4 * 3}
    assert sum(cost.counted for cost in costs) < 90
    assert len(meter.state_dict()["known"]) < 70


class Graph:
    def __init__(self, nodes: int) -> None:
        self.nodes = nodes


def test_a_formula_that_fails_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> int:
        raise AssertionError("such shapes are not known")

    monkeypatch.setitem(costs._OWN, torch.ops.aten.addmm, fails)
    meter = Meter(module := Wrapped(nn.Linear(4, 3)))
    assert run(module, torch.ones(5, 4), meter).forward == 0
    assert meter.coverage.operators["aten.addmm"].kind == "unknown"


def test_other_code_in_a_step_is_none_of_its_cost() -> None:
    """Such as a callback that trains something on the side, in a hook of its own."""
    module = Wrapped(nn.Linear(4, 3))
    meter = Meter(module)
    with meter.step(torch.ones(5, 4)) as step:
        module._current_fx_name = "on_before_backward"
        nn.Linear(4, 4)(torch.ones(2, 4)).sum().backward()
        module._current_fx_name = "training_step"
        loss = module.training_step(torch.ones(5, 4), 0)
        module._current_fx_name = "backward"
        loss.backward()
        module._current_fx_name = None
    assert step.cost.forward == step.cost.backward == 2 * 5 * 4 * 3


def test_a_step_that_fails_says_nothing() -> None:
    meter = Meter(module := Wrapped(nn.Linear(4, 3)))
    with pytest.raises(OSError, match="no such file"), meter.step(torch.ones(5, 4)):
        raise OSError("no such file")
    assert meter.expected(signature_of(torch.ones(5, 4))) is None
    assert run(module, torch.ones(5, 4), meter).flops == 2 * 2 * 5 * 4 * 3


def test_vectorized_batches_cost_what_one_alone_did() -> None:
    module, told = Wrapped(nn.Linear(4, 3)), []
    meter = Meter(module)
    tally, form = ClientTally(meter, lambda *both: told.append(both)), signature_of(torch.ones(5, 4))
    tally.add(form, 5)  # before anything is known
    with meter.alone(torch.ones(5, 4), 5):
        module._current_fx_name = "training_step"
        module.training_step(torch.ones(5, 4), 0).backward()
    module._current_fx_name = None
    tally.add(form, 5)
    tally.add(signature_of(torch.ones(10, 4)), 10)  # like nothing that was counted: by samples
    cost = tally.total(3)
    assert (cost.forward, cost.backward, cost.tokens) == (20 * 24, 20 * 24, 20)
    assert told == [(tally, cost)]


def test_what_is_compiled_stays_compiled_and_is_counted() -> None:
    compiled = []

    def backend(graph: Any, examples: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    module = Wrapped(torch.compile(nn.Linear(4, 3), backend=backend))  # type: ignore[arg-type]
    assert cost_of(module, torch.ones(5, 4)).flops == 2 * 2 * 5 * 4 * 3
    # Releases of torch that cannot compile while operators are seen run it as it is.
    assert len(compiled) == hasattr(TorchDispatchMode, "ignore_compile_internals")
