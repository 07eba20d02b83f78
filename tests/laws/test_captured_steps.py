"""A captured step is replayed only while everything that its Python code reads is as it was."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import functools
import importlib
import itertools
import os
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from tests.laws import reference, settings_of_steps
from tests.laws.test_executors import Run, assert_alike

RATE = 1.0
TABLE = {"deep": [{"rate": 1.0}]}
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("rate", default=1.0)
FILE = Path(tempfile.gettempdir()) / f"rate of {os.getpid()}"
HALF_WAY = 2  # rounds; the next one is the last


@dataclasses.dataclass
class Config:
    rate: float = 1.0


class Counter:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 1.0


class Inner(nn.Module):
    rate = 1.0

    def forward(self, value: Tensor) -> Tensor:
        return value * self.rate if self.training else value * 3


class Step(pl.LightningModule):
    """Its loss is multiplied by what `factor` gives, a function of the module; `change` is called half way."""

    of_class = 1.0
    of_class_list = [1.0]  # noqa: RUF012

    def __init__(self, factor: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))
        self.inner = Inner()
        self.factor = factor
        self.number = 1.0
        self.cfg = OmegaConf.create({"loss": {"kl": {"rate": 1.0}}})
        self.config, self.slotted, self.space = (
            Config(),
            Counter(),
            types.SimpleNamespace(a=types.SimpleNamespace(b=1.0)),
        )
        self.nested = [{"a": [{"rate": 1.0}]}]
        self.plain, self.large = torch.ones((), dtype=torch.float64), torch.ones(20_000, dtype=torch.float64)
        self.scalar, self.array = np.float64(1.0), np.ones(2)
        self.weights = collections.deque([1.0])
        self.save_hyperparameters({"rate": 1.0})

    @property
    def indirect(self) -> float:
        return self.config.rate * TABLE["deep"][0]["rate"]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.inner(self.net(batch[0])), batch[1])
        self.log("loss", loss)
        return loss * self.factor(self)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def by_default(module: Step, table: dict[str, float] = {"rate": 1.0}) -> float:  # noqa: B006
    return table["rate"]


def closure() -> Callable[[Step], float]:
    rate = 1.0

    def read(module: Step) -> float:
        return rate

    def change() -> None:
        nonlocal rate
        rate = 0.1

    read.change = change  # type: ignore[attr-defined]
    return read


def imported(module: Step) -> float:
    from tests.laws.settings_of_steps import RATE as now

    return now


@functools.lru_cache
def cached() -> float:
    return RATE


def file() -> float:
    return float(FILE.read_text()) if FILE.exists() else 1.0


CYCLE = itertools.cycle([1.0, 0.5, 0.1])


def item_of(module: Step) -> float:
    return float(module.plain)


def change_global(module: Any = None) -> None:
    global RATE
    RATE = 0.1


def change_cached(module: Any) -> None:
    change_global()
    cached.cache_clear()


def fill(values: Any) -> None:
    values.data.fill_(0.1)


def frozen(module: Step) -> None:
    module.net[0].weight.requires_grad_(False)


def parametrized(module: Step) -> None:
    parametrize.register_parametrization(module.inner, "scale", nn.Identity())


def set_method(module: Step) -> None:
    Inner.forward = lambda self, value: value * 0.1  # type: ignore[method-assign]


def set_instance_method(module: Step) -> None:
    module.inner.forward = lambda value: value * 0.1  # type: ignore[method-assign]


class Case(NamedTuple):
    """What a step reads, and what changes that half way.

    Attributes:
        factor: reads it.
        change: changes it.
        captured: whether the step can be captured all the same.
        forgotten: how often captured steps cease to hold, if that is not once.
    """

    factor: Callable[[Any], Any]
    change: Callable[[Any], object]
    captured: bool = True
    forgotten: int | None = None


one: Callable[[Any], float] = lambda m: 1.0  # noqa: E731
CASES: dict[str, Case] = {
    "number": Case(lambda m: m.number, lambda m: setattr(m, "number", 0.1)),
    "true": Case(lambda m: 3.0 if m.number is True else 1.0, lambda m: setattr(m, "number", True)),
    "OmegaConf": Case(lambda m: m.cfg.loss.kl.rate, lambda m: setattr(m.cfg.loss.kl, "rate", 0.1)),
    "dataclass": Case(lambda m: m.config.rate, lambda m: setattr(m.config, "rate", 0.1)),
    "list of dicts": Case(lambda m: m.nested[0]["a"][0]["rate"], lambda m: m.nested[0]["a"][0].update(rate=0.1)),
    "namespace": Case(lambda m: m.space.a.b, lambda m: setattr(m.space.a, "b", 0.1)),
    "slots": Case(lambda m: m.slotted.rate, lambda m: setattr(m.slotted, "rate", 0.1)),
    "deque": Case(lambda m: m.weights[0], lambda m: m.weights.appendleft(0.1)),
    "property": Case(lambda m: m.indirect, lambda m: setattr(m.config, "rate", 0.1)),
    "property of a global": Case(lambda m: m.indirect, lambda m: TABLE["deep"][0].update(rate=0.1)),
    "global": Case(lambda m: RATE, change_global),
    "global dict": Case(lambda m: TABLE["deep"][0]["rate"], lambda m: TABLE["deep"][0].update(rate=0.1)),
    "imported module": Case(lambda m: settings_of_steps.RATE, lambda m: setattr(settings_of_steps, "RATE", 0.1)),
    "object of an imported module": Case(
        lambda m: settings_of_steps.CONFIG.loss["rate"][0],
        lambda m: settings_of_steps.CONFIG.loss["rate"].__setitem__(0, 0.1),
    ),
    "import inside": Case(imported, lambda m: setattr(settings_of_steps, "RATE", 0.1)),
    "name of a module's variable": Case(
        lambda m: getattr(settings_of_steps, "rate".upper()), lambda m: setattr(settings_of_steps, "RATE", 0.1), False
    ),
    "closure": Case(closure(), lambda m: m.factor.change()),
    "default argument": Case(by_default, lambda m: by_default.__defaults__[0].update(rate=0.1)),  # type: ignore[index]
    "class attribute": Case(lambda m: m.of_class, lambda m: setattr(type(m), "of_class", 0.1)),
    "list of the class": Case(lambda m: m.of_class_list[0], lambda m: m.of_class_list.__setitem__(0, 0.1)),
    "class of a submodule": Case(one, lambda m: setattr(Inner, "rate", 0.1)),
    "float of a submodule": Case(one, lambda m: setattr(m.net[1], "eps", 10.0)),
    "mode of a submodule": Case(one, lambda m: m.inner.eval()),
    "requires_grad": Case(one, frozen, forgotten=0),
    "tensor replaced": Case(lambda m: m.plain, lambda m: setattr(m, "plain", m.plain * 0.1)),
    "tensor written to": Case(lambda m: m.plain, lambda m: m.plain.mul_(0.1)),
    "tensor's data": Case(lambda m: m.plain, lambda m: fill(m.plain)),
    "large tensor's data": Case(lambda m: m.large[5], lambda m: fill(m.large), forgotten=0),  # read where it lies
    "number of a tensor": Case(item_of, lambda m: fill(m.plain), False),
    "element of a large tensor": Case(lambda m: m.large[5].item(), lambda m: fill(m.large), False),
    "list of a tensor": Case(lambda m: m.large.tolist()[0], lambda m: fill(m.large), False),
    "numpy scalar": Case(lambda m: float(m.scalar), lambda m: setattr(m, "scalar", np.float64(0.1))),
    "numpy array": Case(lambda m: float(m.array[0]), lambda m: m.array.fill(0.1)),
    "hparams": Case(lambda m: m.hparams.rate, lambda m: m.hparams.update(rate=0.1)),
    "epoch": Case(lambda m: 1.0 if m.trainer.current_epoch < HALF_WAY else 0.1, one, False),
    "environment": Case(lambda m: float(os.environ.get("RATE", "1")), lambda m: os.environ.update(RATE="0.1")),
    "file": Case(lambda m: file(), lambda m: FILE.write_text("0.1"), False),
    "time": Case(lambda m: 1.0 if time.time() < 1e12 else 0.1, lambda m: setattr(time, "time", lambda: 1e13), False),
    "context variable": Case(lambda m: VARIABLE.get(), lambda m: VARIABLE.set(0.1), False),
    "cached function": Case(lambda m: cached(), change_cached, False),
    "forward hook": Case(one, lambda m: m.inner.register_forward_hook(lambda part, given, out: out * 0.1)),
    "forward pre-hook": Case(
        one,
        lambda m: m.inner.register_forward_pre_hook(
            lambda part, given, more: ((given[0] * 0.1,), more), with_kwargs=True
        ),
    ),
    "method of the instance": Case(one, set_instance_method),
    "method of the class": Case(one, set_method),
    "function of the instance": Case(one, lambda m: setattr(m, "factor", lambda m: 0.1)),
    "function of a library": Case(
        one, lambda m: setattr(nn.functional, "cross_entropy", lambda a, b: a.square().mean() + 0 * b.sum())
    ),
    "dtype": Case(
        lambda m: 1.0 if torch.get_default_dtype() is torch.float32 else 0.1,
        lambda m: torch.set_default_dtype(torch.float64),
    ),
    "matmul precision": Case(
        lambda m: 1.0 if torch.get_float32_matmul_precision() == "highest" else 0.1,
        lambda m: torch.set_float32_matmul_precision("high"),
    ),
    "deterministic algorithms": Case(
        lambda m: 0.1 if torch.are_deterministic_algorithms_enabled() else 1.0,
        lambda m: torch.use_deterministic_algorithms(True),
    ),
}


class Changes(Callback):
    def __init__(self, change: Callable[[Any], object]) -> None:
        self._change = change

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == HALF_WAY:
            self._change(module)


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Puts back whatever a case changes, after each run."""
    classes = [(kind, dict(vars(kind))) for kind in (Step, Inner)]
    functions = nn.functional.cross_entropy, time.time

    def restore() -> None:
        global RATE
        RATE = 1.0
        importlib.reload(settings_of_steps)
        TABLE["deep"][0]["rate"] = 1.0
        Step.of_class_list[0] = 1.0
        by_default.__defaults__[0]["rate"] = 1.0  # type: ignore[index]
        cached.cache_clear()
        for kind, attributes in classes:
            for name in ("of_class", "rate", "forward", "training_step"):
                if name in attributes:
                    setattr(kind, name, attributes[name])
        nn.functional.cross_entropy, time.time = functions
        VARIABLE.set(1.0)
        os.environ.pop("RATE", None)
        FILE.unlink(missing_ok=True)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)

    monkeypatch.setattr("lightning_fedscale.core.executors.vectorized.captured_steps._CAPTURE_AT", 3)
    restore()
    yield restore
    restore()


OPTIONS: dict[str, Any] = {"rounds": HALF_WAY + 1, "clients_per_round": 3, "partition": reference.equal_clients(3, 24)}


def captured_steps_of(run: Run) -> Any:
    federation = run.strategy._federation
    assert federation is not None
    step = federation.fit.executor._vectorized._batched_step
    assert step is not None
    return step.captured


@functools.cache
def unchanged() -> dict[str, Tensor]:
    """The weights if nothing changes; every factor is 1 at first."""
    return Run("sequential", lambda: Step(one), **OPTIONS).state


@pytest.mark.parametrize("name", CASES)
def test_a_change_half_way_is_followed(name: str, as_before: Callable[[], None]) -> None:
    case = CASES[name]
    runs = []
    for executor in ("sequential", "vectorized"):
        factor = closure() if name == "closure" else case.factor
        runs.append(Run(executor, functools.partial(Step, factor), callbacks=[Changes(case.change)], **OPTIONS))
        as_before()
    sequential, vectorized = runs
    assert_alike(vectorized, sequential, rtol=1e-6)
    if name != "deterministic algorithms":
        assert max((unchanged()[key] - value).abs().max() for key, value in sequential.state.items()) > 1e-6
    assert vectorized.kind == "vectorized"
    captured_steps = captured_steps_of(vectorized)
    assert bool(captured_steps.made) == case.captured, captured_steps.reason
    assert captured_steps.forgotten == (case.captured if case.forgotten is None else case.forgotten)


@pytest.mark.parametrize("name", ["number", "global dict", "OmegaConf"])
def test_auto_follows_it_too(name: str, as_before: Callable[[], None]) -> None:
    case = CASES[name]
    runs = []
    for executor in ("sequential", "auto"):
        options = {**OPTIONS, "rounds": 2 * HALF_WAY}
        runs.append(Run(executor, lambda: Step(case.factor), callbacks=[Changes(case.change)], **options))
        as_before()
    assert runs[1].kind == "vectorized"
    assert_alike(runs[1], runs[0], rtol=1e-6)


class Transfers(Step):
    """Its hook is called between captured steps, and sets a value for each that is the same for all clients."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        self.number = 1.0 / (1 + int(batch[0][0, 0]))
        return batch


def test_hooks_between_steps_are_followed(as_before: Callable[[], None]) -> None:
    inputs, labels = reference.dataset(dtype=torch.float64).tensors
    inputs = inputs.clone()
    inputs[:72, 0] = torch.arange(24).div(8, rounding_mode="floor").repeat(3)  # the number of the batch
    options = {**OPTIONS, "data": TensorDataset(inputs, labels), "loader": {"shuffle": False}}
    runs = [Run(kind, lambda: Transfers(lambda m: m.number), **options) for kind in ("sequential", "vectorized")]
    assert_alike(runs[1], runs[0], rtol=1e-6)
