"""The memory model against the account that torch's own allocator keeps of real steps."""

from __future__ import annotations

import ast
import copy
import gc
import itertools
import json
import os
import random
import shutil
import sys
import threading
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Accuracy, MetricCollection

from lightning_fedscale.devices import ON_CLIENT, SIMULATED, MemoryModel, estimate_memory
from lightning_fedscale.devices.probe import probe
from lightning_fedscale.devices.profiling import libraries, scratch
from lightning_fedscale.devices.profiling.batches import resized, samples_in
from lightning_fedscale.devices.profiling.costs import StepCost
from lightning_fedscale.devices.profiling.dry_run import DryRun, DryRunResult
from lightning_fedscale.devices.profiling.memory_tracker import Peak
from lightning_fedscale.devices.profiling.search import largest_within
from lightning_fedscale.utils.memory import format_bytes
from tests import keepers, pythons
from tests.keepers import KEEPERS, Last, Network
from tests.networks import GPT, KINDS, Classifier, mlp, resnet18, tokens, vectors


def given_out(step: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has given out in a step, by its own account, hidden copies included."""
    gc.freeze()  # what earlier tests left in cycles would count as given back
    torch._C._autograd._enable_profiler_legacy(scratch._MEMORY)
    try:
        step()
    finally:
        threads = torch._C._autograd._disable_profiler_legacy()
        gc.unfreeze()
    events: list[Any] = [event for thread in threads for event in thread]  # torch says that their kind is an int
    alive = [event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc"]
    return int(np.cumsum(alive).max())


def tracked(module: Any, batch: Any, *, accumulate: int = 1, dtype: torch.dtype | None = None) -> int:
    """Peak of two optimizer steps on real tensors, in the order in which Lightning runs them."""
    module = copy.deepcopy(module)
    module.log = lambda *args, **kwargs: None
    optimizer = module.configure_optimizers()
    there = [*module.parameters(), *module.buffers(), *tree_leaves(batch)]

    def closure(drop: bool) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = module.training_step(batch, 0)
        if drop:
            optimizer.zero_grad()
        (loss / accumulate).backward()
        return loss

    def steps() -> None:
        for batches in (1, accumulate):
            for number in range(batches):
                if number < batches - 1:
                    closure(number == 0)
                else:
                    optimizer.step(lambda drop=batches == 1: closure(drop))

    return given_out(steps) + sum(tensor.numel() * tensor.element_size() for tensor in there)


def allocated(model: MemoryModel, batch: int) -> int:
    """What of a peak torch's allocator gives out in a step: neither what libraries keep, nor what a round does."""
    return model.peak(batch) - kept(model, batch) - model.kept_besides


def kept(model: MemoryModel, batch: int) -> int:
    """What libraries keep for themselves."""
    return model.breakdown(batch).get("libraries", 0)


# One layer of a kind shows as much as several, of which `gpt` has two.
SHORTER: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet18(width=16, stages=2),
    "gpt with checkpointing": lambda: GPT(saving=True),
    "encoder": lambda: nn.Sequential(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Flatten(), nn.Linear(32 * 8, 10)
    ),
}
NETWORKS = {kind: (SHORTER.get(kind, make), batch_of) for kind, (make, batch_of) in KINDS.items()}


@pytest.fixture(name="assumed")
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what libraries keep the usual is assumed: no process is started to measure it."""
    monkeypatch.setattr(sys, "executable", "")


@cache
def model_of(kind: str) -> MemoryModel:
    """The memory model that several tests ask; see `assumed`."""
    make, batch_of = NETWORKS[kind]
    return estimate_memory(Classifier(make()), batch_of(2), extras=SIMULATED)


@cache
def keeper(kind: str) -> MemoryModel:
    """The memory model that several tests ask, with what libraries keep."""
    return KEEPERS[kind].model()


@cache
def small() -> MemoryModel:
    """The memory model that several tests ask, without extras."""
    return estimate_memory(Classifier(mlp()), vectors(2))


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
}
# The least and the most state with every network; how the state is updated depends on the parameters alone.
PAIRS = [
    *itertools.product(("sgd", "adamw"), KINDS),
    *itertools.product(("momentum", "foreach", "fused"), ("mlp", "gpt", "lstm")),
]


@pytest.mark.usefixtures("assumed")
@pytest.mark.parametrize(("optimizer", "kind"), PAIRS)
def test_predicted_is_tracked(optimizer: str, kind: str) -> None:
    make, batch_of = NETWORKS[kind]
    algorithm, options = OPTIMIZERS[optimizer]
    module = Classifier(make(), algorithm, **options)
    model = model_of(kind) if optimizer == "adamw" else estimate_memory(module, batch_of(2))
    assert model.exact
    # Each checkpoint keeps the state of the generator, which no operator makes.
    states = 2 * len(torch.get_rng_state()) if kind == "gpt with checkpointing" else 0
    for batch in (2, 33):
        assert allocated(model, batch) == pytest.approx(tracked(module, batch_of(batch)) - states, rel=0.01)


@pytest.mark.usefixtures("assumed")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", ["mlp", "gpt", "resnet18"])
def test_mixed_precision(kind: str, precision: str) -> None:
    make, batch_of = NETWORKS[kind]
    module = Classifier(make())
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    model = estimate_memory(module, batch_of(2), precision=precision)
    for batch in (2, 17):
        expected = tracked(module, batch_of(batch), dtype=dtype)
        assert allocated(model, batch) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_whole_precision(precision: str, dtype: torch.dtype) -> None:
    module, (inputs, targets) = Classifier(mlp()), vectors(8)
    expected = tracked(copy.deepcopy(module).to(dtype), (inputs.to(dtype), targets))
    assert estimate_memory(module, (inputs, targets), precision=precision).peak(8) == pytest.approx(expected, rel=0.01)


def test_accumulation_keeps_gradients() -> None:
    module, batch = Classifier(GPT(layers=1)), tokens(16)
    model = estimate_memory(module, batch, accumulate=3)
    assert model.peak(16) == pytest.approx(tracked(module, batch, accumulate=3), rel=0.01)


def test_frozen_parameters_take_neither_gradients_nor_state() -> None:
    module = Classifier(mlp())
    assert isinstance(module.network, nn.Sequential)
    module.network[0].requires_grad_(False)
    model = estimate_memory(module, vectors(2))
    free = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert model.trainable == free
    assert model.breakdown(1)["optimizer state"] == pytest.approx(2 * 4 * free, rel=0.01)
    assert model.breakdown(1)["gradients"] <= 4 * free
    assert model.peak(1) < estimate_memory(Classifier(mlp()), vectors(2)).peak(1) - 3 * 4 * (64 * 128)


def test_checkpointing_saves_activations() -> None:
    plain, saving = (model_of(kind).breakdown(64) for kind in ("gpt", "gpt with checkpointing"))
    assert saving["activations"] < 0.4 * plain["activations"]


@pytest.mark.usefixtures("assumed")
@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up(kind: str) -> None:
    make, batch_of = NETWORKS[kind]
    module, model = Classifier(make()), model_of(kind)
    parts = model.breakdown(8)
    assert sum(parts.values()) == model.peak(8)
    assert parts["parameters"] == model.parameter_bytes
    assert parts["batch"] == sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(batch_of(8)))
    numbers = sum(t.numel() for t in [*module.parameters(), *module.buffers()])
    assert parts["global model"] == parts["delta"] == parts["accumulator"] == 8 * numbers


def test_extras_are_bytes_per_number() -> None:
    module = Classifier(mlp())
    plain, client = small(), estimate_memory(module, vectors(2), extras=ON_CLIENT)
    assert client.peak(4) - plain.peak(4) == client.breakdown(4)["anchor"] == 4 * plain.trainable


def test_cuda_rounds_to_blocks_and_updates_at_once() -> None:
    module = Classifier(mlp())
    there = estimate_memory(module, vectors(2), device="cuda")
    assert all(size % 512 == 0 for size in there.breakdown(1).values())
    at_once = estimate_memory(Classifier(mlp(), foreach=True), vectors(2), device="cpu")
    one_by_one = small()
    assert at_once.peak(1) < there.peak(1) < at_once.peak(1) + 512 * 60
    assert at_once.breakdown(1)["temporaries"] != one_by_one.breakdown(1)["temporaries"]


LAYERS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "plain convolutions": (lambda: [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()], (3, 16, 16)),
    "without bias": (lambda: [nn.Conv2d(8, 24, 3, bias=False), nn.Conv2d(24, 24, 1, bias=False)], (8, 12, 12)),
    "depthwise": (lambda: [nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1)], (16, 12, 12)),
    "grouped and dilated": (lambda: [nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 32, 3, dilation=2)], (16, 14, 14)),
    "strided": (
        lambda: [nn.Conv2d(3, 32, 4, stride=4), nn.GroupNorm(1, 32), nn.Conv2d(32, 64, 2, stride=2)],
        (3, 32, 32),
    ),
    "transposed": (lambda: [nn.Conv2d(4, 16, 3), nn.ConvTranspose2d(16, 16, 2, stride=2)], (4, 12, 12)),
    "one dimension": (
        lambda: [nn.Conv1d(8, 32, 5), nn.BatchNorm1d(32), nn.Conv1d(32, 32, 3), nn.MaxPool1d(2)],
        (8, 64),
    ),
    "three dimensions": (
        lambda: [nn.Conv3d(2, 16, 3), nn.ReLU(), nn.Conv3d(16, 16, 3), nn.AvgPool3d(2)],
        (2, 8, 12, 12),
    ),
    "norms": (lambda: [nn.BatchNorm2d(8), nn.ReLU(), nn.InstanceNorm2d(8), nn.LocalResponseNorm(3)], (8, 16, 16)),
    "upsampling": (
        lambda: [nn.Upsample(scale_factor=2, mode="bicubic"), nn.ReflectionPad2d(2), nn.AvgPool2d(4)],
        (4, 12, 12),
    ),
    "lstm": (lambda: [Last(nn.LSTM(16, 32, 2, batch_first=True)), nn.ReLU()], (20, 16)),
    "both directions": (lambda: [Last(nn.LSTM(8, 24, bidirectional=True, batch_first=True))], (12, 8)),
    "gru": (lambda: [Last(nn.GRU(16, 32, batch_first=True)), nn.ReLU()], (6, 16)),
    "attention": (lambda: [nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)], (12, 32)),
    "gates": (lambda: [nn.Linear(64, 64), nn.Softmax(-1), nn.GLU(), nn.Mish(), nn.LayerNorm(32)], (64,)),
}


@pytest.mark.usefixtures("assumed")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in LAYERS), ("plain convolutions", torch.bfloat16), ("strided", torch.float64)],
)
def test_what_operators_take_while_they_run(kind: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[kind]
    module = Classifier(Network(*make()).to(dtype))
    module.network(torch.randn(2, *shape, dtype=dtype))  # its last layer now knows its size

    def batch_of(samples: int) -> Any:
        return torch.randn(samples, *shape, dtype=dtype), torch.randint(10, (samples,))

    model = estimate_memory(module.to(dtype), batch_of(2))
    assert model.exact
    for batch in (24, 70):
        assert allocated(model, batch) == pytest.approx(tracked(module, batch_of(batch)), rel=0.03)


def test_what_operators_take_is_learned_under_a_profiler_too() -> None:
    module, batch = Classifier(Network(nn.Conv2d(3, 32, 3), nn.ReLU())), KINDS["resnet18"][1](2)
    module.network(batch[0])
    expected = estimate_memory(module, batch).peak(40)
    with torch.profiler.profile():
        assert estimate_memory(module, batch).peak(40) == expected


class Told(NamedTuple):
    """What a process says that has run nothing before; see `tests.keepers`."""

    promised: int
    kept: dict[str, list[tuple[int, int]]]
    fits: list[bool]
    peaks: list[int]


@pytest.fixture(scope="module")
def told() -> Told:
    torch.set_num_threads(1)
    promised = keepers.PROMISED.model().max_batch(keepers.BUDGET)
    done = pythons.run("-m", "tests.keepers", promised, round(promised / 0.85), folder=pythons.REPOSITORY)
    assert done.returncode == 0, done.stderr
    return Told(promised, **json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("kind", KEEPERS)
def test_what_libraries_keep(kind: str, told: Told) -> None:
    model = keeper(kind)
    assert model.assumed == ""
    for batch, (code, buffers) in zip(keepers.BATCHES, told.kept[kind], strict=True):
        described = libraries.WITH_DESCRIPTION * code
        # The buffers of products are left to the headroom: they are as large for ten numbers as for millions.
        assert 0.9 * described - 2**19 <= kept(model, batch) <= 1.15 * described + buffers + 2**19
    assert (kept(model, 40) == 0) == (kind == "no libraries")


def test_the_prediction_alone_keeps_its_promise(told: Told) -> None:
    assert told.fits == [True, False]  # with what is predicted, and with 1 / 0.85 times as many samples


def nothing() -> None:
    """The process has run whatever other tests have run."""


def the_steps_themselves() -> None:
    module, batch = keepers.PROMISED.project()
    for samples in (*keepers.BATCHES, 16, 24):
        DryRun(module, batch).real_step(samples)()


def steps_under_a_profiler() -> None:
    with torch.profiler.profile():
        the_steps_themselves()


def a_probe_of_the_same() -> None:
    keepers.PROMISED.model().max_batch(keepers.BUDGET)


def more_code_than_is_kept() -> None:
    for samples in range(1, 1100):  # oneDNN keeps 1024
        torch.conv2d(torch.zeros(samples, 1, 3, 3), torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize(
    "before", [nothing, the_steps_themselves, steps_under_a_profiler, a_probe_of_the_same, more_code_than_is_kept]
)
def test_what_ran_before_makes_no_difference(before: Callable[[], None], told: Told) -> None:
    before()
    libraries._ask.cache_clear()
    model = keepers.PROMISED.model()
    assert [model.peak(batch) for batch in keepers.BATCHES] == told.peaks
    assert kept(model, 40) > 2**22


def test_a_process_of_its_own_leaves_nothing_open() -> None:
    libraries._ask.cache_clear()
    before = os.listdir("/proc/self/fd")
    KEEPERS["lstm"].model()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("interpreter", ["", "/nowhere/python", shutil.which("false"), shutil.which("true")])
def test_where_no_process_can_be_started_the_usual_is_assumed(
    interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = keeper("depthwise")
    libraries._ask.cache_clear()
    monkeypatch.setattr(sys, "executable", interpreter)
    model = KEEPERS["depthwise"].model()
    assert model.assumed
    assert 0.5 * kept(seen, 24) <= kept(model, 24) <= 2 * kept(seen, 24)
    found = probe(model, 2**30)
    assert found.assumed == model.assumed
    assert type(found)(**found.state_dict()) == found
    assert 2**22 < kept(KEEPERS["lstm"].model(), 24) < 2**24
    assert KEEPERS["no libraries"].model().assumed == ""  # nothing had to be measured


def test_what_measures_libraries_starts_with_torch_alone() -> None:
    tree = ast.parse(Path(libraries.__file__).read_text(encoding="utf-8"))
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"torch"}


# ---- the reverse


@pytest.mark.usefixtures("assumed")
@pytest.mark.parametrize("kind", KINDS)
def test_max_batch_is_the_last_that_fits(kind: str) -> None:
    for budget in (3 * 2**24, 2**30):
        model = as_new(model_of(kind))
        batch = model.max_batch(budget, headroom=0.1)
        assert model.peak(batch) <= 0.9 * budget < model.peak(batch + 1)
        assert len(model.sizes) <= 15


def as_new(model: MemoryModel) -> MemoryModel:
    """A copy that has run the smallest batch only."""
    again = copy.copy(model)
    again._known = {model.smallest: model._known[model.smallest]}
    return again


def test_peak_is_convex_where_no_library_takes_part() -> None:
    model = estimate_memory(Classifier(GPT(length=64, layers=1)), tokens(2, 64))
    peaks = [model.peak(batch) for batch in range(1, 40, 3)]
    assert (np.diff(peaks, 2) >= 0).all()
    # So two small sizes promise too much, which is why the search does not believe them.
    line = peaks[0] + (peaks[1] - peaks[0]) * 12
    assert line < peaks[12]


class Twice(Classifier):
    """Sees every sample twice, as contrastive learning does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return super().training_step((torch.cat([inputs, inputs]), torch.cat([targets, targets])), batch_idx)


@pytest.mark.parametrize("kind", KEEPERS)
def test_peak_grows_but_where_torch_goes_another_way(kind: str) -> None:
    model = keeper(kind)
    borders = [15] if kind in ("one by one", "inverted residuals") else []
    assert model._dry_run.borders == borders
    sizes = [2, 15, 16, 24, 25, 300]
    peaks = [model.peak(size) for size in sizes]
    for (size, less), (_, more) in itertools.pairwise(zip(sizes, peaks, strict=True)):
        assert less < more or size in borders
    if borders:  # the code is there at once: this is what is not convex
        assert peaks[2] > np.interp(16, [15, 300], [peaks[1], peaks[-1]])
        for budget, expected in ((peaks[1], 15), (peaks[2] - 1, 15), (peaks[2], 16)):
            assert model.max_batch(budget, headroom=0.0) == expected


def test_the_border_is_where_operators_meet_so_many_rows() -> None:
    module, batch = KEEPERS["one by one"].project()
    assert estimate_memory(Twice(module.network), batch)._dry_run.borders == [7]
    assert estimate_memory(Twice(mlp()), vectors(2))._dry_run.borders == []


@pytest.mark.parametrize("fall", [-300, 0, 70, 300])
def test_all_smaller_batches_fit_as_well(fall: int) -> None:
    """A peak that falls above 15 and again above 40 samples: the last batch of an epoch may be as small."""

    def needed(batch: int) -> int:
        return 10 * batch - fall * ((batch > 15) + (batch > 40))

    dry_run: Any = SimpleNamespace(
        run=lambda batch, **_: DryRunResult(Peak(1000 + needed(batch), {}), StepCost(0.0, 0.0), 0),
        learn=lambda known, smallest: None, makes_batches=False, borders=[15, 40], assumed="",
    )  # fmt: skip
    model = MemoryModel(dry_run, nn.Linear(1, 1), {})
    for budget in range(1010, 1900, 7):
        expected = next(batch for batch in range(1, 1000) if model.peak(batch + 1) > budget)
        assert model.max_batch(budget, headroom=0.0) == expected


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e6)), min_size=1, max_size=5),
    st.integers(1, 10**6),
    st.integers(1, 10**5),
    st.booleans(),
    st.tuples(st.integers(1, 10**5), st.integers(0, 10**6)),
)
def test_search_equals_scanning(
    lines: list[tuple[int, float]], bound: int, limit: int, gentle: bool, leap: tuple[int, int]
) -> None:
    def excess(n: int) -> float:
        return max(offset + slope * n for offset, slope in lines) + leap[1] * (n > leap[0]) - bound

    if excess(1) > 0:
        return
    seen: list[int] = []

    def watched(n: int) -> float:
        seen.append(n)
        return excess(n)

    found = largest_within(watched, limit, gentle=gentle)
    assert 1 <= found <= limit
    assert excess(found) <= 0
    assert found == limit or excess(found + 1) > 0
    assert len(seen) <= 80
    if gentle:
        fitting = [1]
        for n in seen:
            assert n <= 2 * fitting[-1] or n <= limit
            fitting += [n] * (excess(n) <= 0)


def test_search_without_values_where_it_does_not_fit() -> None:
    assert largest_within(lambda n: -1.0 if n <= 777 else float("inf"), 10**6) == 777


def test_not_one_sample_fits() -> None:
    model = small()
    with pytest.raises(ValueError, match="optimizer state") as told:
        model.max_batch(200_000, headroom=0.0)
    missing = model.peak(1) - 200_000
    assert f"{missing:,} bytes more" in str(told.value)
    assert format_bytes(model.peak(1)) in str(told.value)


@pytest.mark.parametrize(
    ("budget", "headroom", "name"),
    [
        ("8GiB", 0.1, "budget='8GiB'"),
        (0, 0.1, "budget=0"),
        (-5, 0.1, "budget=-5"),
        (10**6, 1.0, "headroom=1.0"),
        (10**6, -0.1, "headroom=-0.1"),
    ],
)
def test_bad_budgets(budget: Any, headroom: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        small().max_batch(budget, headroom)


@pytest.mark.parametrize("batch", [0, -1, 1.5])
def test_bad_batches(batch: Any) -> None:
    model = small()
    for ask in (
        model.peak,
        model.breakdown,
        lambda batch: model.max_clients(10**9, batch),
        lambda batch: model.max_batch(10**9, limit=batch),
    ):
        with pytest.raises(ValueError, match=f"={batch!r}: pass a number of samples"):
            ask(batch)


def test_vectorized_clients() -> None:
    model = model_of("mlp")
    own = small().peak(8)
    shared = model.peak(8) - own
    assert model.max_clients(shared + 5 * own + own // 2, 8, headroom=0.0) == 5
    with pytest.raises(ValueError, match=r"budget=.*: one client with batch=8"):
        model.max_clients(own, 8, headroom=0.0)


# ---- any training step, and nothing left behind


class Demanding(Classifier):
    """Uses much of what a training step may use."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10)))
        self.accuracy = Accuracy("multiclass", num_classes=10)
        self.scores = MetricCollection({"a": Accuracy("multiclass", num_classes=10)}, prefix="train/")
        self.seen: list[Tensor] = []
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        inputs, targets = batch
        outputs = self.network(inputs + torch.randn_like(inputs) * random.random() * np.random.rand())
        loss = nn.functional.cross_entropy(outputs, targets)
        self.accuracy(outputs, targets)
        self.log("accuracy", self.accuracy, on_step=True)
        self.log_dict(self.scores(outputs, targets))
        logger: Any = self.logger
        logger.experiment.add_scalar("x", loss, self.trainer.global_step)
        self.seen.append(loss)
        self.steps += 1
        return {"loss": loss, "outputs": outputs}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        total = self.trainer.estimated_stepping_batches
        assert isinstance(total, int)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def everything(module: nn.Module) -> list[Any]:
    drawn = np.random.get_state(legacy=False)["state"]["key"]
    states = [*module.state_dict().values(), torch.get_rng_state(), torch.from_numpy(drawn.copy())]
    return [*(state.clone() for state in states), random.getstate(), module.training]


def test_nothing_is_left_behind() -> None:
    module, batch = Demanding(), vectors(4)
    module.eval()
    before, shapes = everything(module), [leaf.clone() for leaf in batch]
    model = estimate_memory(module, batch)
    assert model.exact
    model.max_batch(10**8)
    for old, new in zip(before, everything(module), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    assert all(map(torch.equal, batch, shapes))
    assert module.seen == []
    assert module.steps == 0
    assert module._trainer is None
    assert "log" not in vars(module)
    assert all(p.grad is None for p in module.parameters())


class ByHand(Classifier):
    """Manual optimization with two optimizers."""

    network: nn.Sequential

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = cast(list[Any], self.optimizers())
        inputs, targets = batch
        for optimizer in (first, second):
            with optimizer.toggle_model():
                loss = nn.functional.cross_entropy(self.network(inputs), targets)
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5)
                optimizer.step()
        cast(Any, self.lr_schedulers()).step()

    def configure_optimizers(self) -> Any:
        parts = self.network[:2].parameters(), self.network[2:].parameters()
        optimizers = [torch.optim.Adam(part) for part in parts]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]


def test_manual_optimization() -> None:
    model = estimate_memory(ByHand(), vectors(2))
    assert model.exact
    parameters = model.breakdown(4)["parameters"]
    assert model.breakdown(4)["optimizer state"] == pytest.approx(2 * parameters, rel=0.01)


class Selective(Classifier):
    """Learns from some of the samples only: which, depends on the data."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        chosen = inputs[:, 0] > -10
        if chosen.sum() > 0:
            inputs, targets = inputs[chosen], targets[chosen]
        return nn.functional.cross_entropy(self.network(inputs), targets)


def test_the_reason_for_real_tensors_is_not_that_batch_norm_refuses_one_sample() -> None:
    network = mlp()
    model = estimate_memory(Selective(nn.Sequential(nn.BatchNorm1d(vectors(2)[0].shape[1]), network)), vectors(2))
    assert model.smallest == 2
    assert "DataDependent" in model.fallback


def test_data_dependent_modules_are_probed_for_real() -> None:
    module = Selective(mlp())
    model = estimate_memory(module, vectors(2))
    assert not model.exact
    assert "DataDependent" in model.fallback
    assert model.assumed == ""  # of products nothing is
    before = everything(module)
    batch = model.max_batch(3 * 10**6, headroom=0.0)
    assert all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, everything(module), strict=True)
    )
    assert model.peak(batch) <= 3 * 10**6 < model.peak(batch + 1)
    assert model.peak(batch) == pytest.approx(tracked(module, vectors(batch)), rel=0.02)


def test_what_real_tensors_do_not_tell_is_assumed() -> None:
    module, batch = KEEPERS["depthwise"].project()

    class Chosen(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            chosen = targets < 10 * (1 + int(targets.sum()))
            return super().training_step((inputs[chosen], targets[chosen]), batch_idx)

    model = estimate_memory(Chosen(module.network), batch)
    assert not model.exact
    assert "few samples" in model.assumed
    assert kept(model, 4) > 0


def test_collectives_concern_nobody_else() -> None:
    class Talking(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.trainer.strategy.barrier()
            return self.trainer.strategy.reduce(self.all_gather(loss)).mean()

    assert estimate_memory(Talking(mlp()), vectors(2)).exact


def test_modules_that_cannot_be_copied() -> None:
    module = Classifier(mlp())
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"module=Classifier cannot be copied.*lock"):
        estimate_memory(module, vectors(2))


def test_the_modules_own_error_is_shown() -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        estimate_memory(Broken(mlp()), vectors(2))


def test_tied_weights_and_meta_modules() -> None:
    with torch.device("meta"):
        there = Classifier(GPT())
    predicted = estimate_memory(there, tokens(2), extras=SIMULATED), model_of("gpt")
    assert predicted[0].peak(8) == predicted[1].peak(8)
    assert predicted[0].breakdown(8) == predicted[1].breakdown(8)


@pytest.mark.slow
def test_large_models_take_seconds_and_no_memory() -> None:
    with torch.device("meta"):
        large = Classifier(GPT(vocabulary=32_000, length=1024, width=4096, layers=4))
    assert sum(p.numel() for p in large.parameters()) > 9 * 10**8
    model = estimate_memory(large, tokens(1, 1024))
    assert model.breakdown(1)["optimizer state"] == pytest.approx(8 * model.trainable, rel=0.01)
    assert model.peak(4) > 16 * model.trainable


# ---- batches


def test_resizing() -> None:
    batch = {"x": torch.arange(6).reshape(3, 2), "y": [torch.arange(3), "text"], "scale": torch.tensor(2.0)}
    assert samples_in(batch) == 3
    larger = resized(batch, 7)
    assert larger["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5], [0, 1]]
    assert larger["y"][0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert larger["y"][1] == "text"
    assert larger["scale"] == 2.0
    assert resized(batch, 2)["x"].tolist() == [[0, 1], [2, 3]]


@dataclass
class Molecules:
    x: torch.Tensor
    names: list[str]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: UserDict(x=x, names=["a"]),
        lambda x: Molecules(x, ["a"]),
        lambda x: SimpleNamespace(x=x, names=["a"], again=x),
    ],
)
def test_batches_in_classes_of_their_own_are_resized_in_these(make: Callable[[torch.Tensor], Any]) -> None:
    batch = make(torch.arange(3))
    assert samples_in(batch) == samples_in([batch, 0]) == 3
    larger = resized(batch, 5)
    assert type(larger) is type(batch)
    found = larger if isinstance(larger, UserDict) else vars(larger)
    assert found["x"].tolist() == [0, 1, 2, 0, 1]
    assert found["names"] == ["a"]
    assert found.get("again", found["x"]) is found["x"]
    assert samples_in(batch) == 3
    with pytest.raises(ValueError, match=r"batch=SimpleNamespace: .*differ \(3, 4\)"):
        samples_in(SimpleNamespace(x=torch.zeros(3), y=torch.zeros(4)))


@pytest.mark.parametrize("batch", ["text", {}, torch.tensor(1.0), (torch.zeros(3), torch.zeros(4))])
def test_batches_that_cannot_be_resized(batch: Any) -> None:
    with pytest.raises(ValueError, match="make_batch="):
        estimate_memory(Classifier(mlp()), batch)


def test_make_batch() -> None:
    sizes: list[int] = []

    def make(samples: int) -> Any:
        sizes.append(samples)
        return vectors(samples)

    model = estimate_memory(Classifier(mlp()), None, make_batch=make)
    assert model.peak(9) == small().peak(9)
    assert max(sizes) == 9
    # Such batches are real, so the search feels its way up instead of leaping.
    best = model.max_batch(10**7)
    assert max(sizes) <= 2 * best
    assert best == small().max_batch(10**7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "8-bit"}, "precision='8-bit'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"accumulate": 0}, "accumulate=0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_memory(Classifier(mlp()), vectors(2), **arguments)


def test_no_training_step() -> None:
    with pytest.raises(TypeError, match="no training_step"):
        estimate_memory(mlp(), vectors(2))


# ---- costs and pictures


@pytest.mark.usefixtures("assumed")
def test_cost_counts_what_torch_leaves_out_on_a_cpu() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    make, batch_of = NETWORKS["resnet18"]
    module, batch = Classifier(make()), batch_of(4)
    with FlopCounterMode(display=False) as counter:
        module.training_step(batch, 0).backward()
    assert model_of("resnet18").cost(4).flops == counter.get_total_flops()
    # Recurrent layers: every weight of a gate meets every step of every sample, thrice.
    weights = 4 * 32 * (16 + 32) + 4 * 32 * (32 + 32)
    assert model_of("lstm").cost(5).flops == pytest.approx(3 * 2 * weights * 20 * 5, rel=0.01)
    # Attention grows with the square of the length.
    short, long = (estimate_memory(Classifier(GPT(length=n, layers=1)), tokens(2, n)).cost(2).flops for n in (64, 128))
    assert long > 2.1 * short


def test_table_and_plot() -> None:
    model = small()
    table = model.table([1, 10, 100])
    assert table.index.tolist() == [1, 10, 100]
    assert table["peak"].tolist() == [model.peak(batch) for batch in (1, 10, 100)]
    assert (table.drop(columns="peak").sum(axis=1) == table["peak"]).all()
    figure = model.plot([1, 10, 100], budgets={"phone": 2**20})
    (axis,) = figure.axes
    legend = axis.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert {"parameters", "gradients", "optimizer state"} <= set(texts)
    assert any("phone" in text for text in texts)
