"""What a step reads and calls is noted, and what cannot be guarded is told from what can."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import datetime
import functools
import gc
import importlib
import logging
import math
import operator
import os
import random
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo import mutation_guard

from lightning_fedscale.core.executors.vectorized.captured_steps import CapturedSteps
from lightning_fedscale.core.user_code.guards import Guard, NoValues, Reads, Unguarded
from lightning_fedscale.core.user_code.state import PythonState


class Point(NamedTuple):
    x: float


@dataclasses.dataclass
class Config:
    rate: float = 1.0


class Reader:
    def __init__(self) -> None:
        self.values = [1.0]

    def total(self) -> float:
        return sum(value for value in self.values) + helper(self.values)


def helper(values: list[float]) -> float:
    return SETTINGS["rate"] * max(values)


SETTINGS = {"rate": 1.0}
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("rate", default=1.0)
TENSOR = torch.ones(3)

PURE: dict[str, Callable[[], object]] = {
    "math": lambda: math.sqrt(2.0) + operator.add(1, 2) + functools.reduce(operator.mul, [1, 2]),
    "builtins": lambda: (
        len([1]),
        isinstance(1, int),
        sorted([2, 1], key=lambda v: -v),
        list(zip([1], [2], strict=True)),
    ),
    "containers": lambda: ({"a": 1}.get("a"), [1].append(2), "{}".format(1), " ".join("ab"), {1}.union({2})),  # type: ignore[func-returns-value]  # noqa: UP032
    "deque": lambda: collections.deque([1]).append(2),
    "objects": lambda: (Point(1.0)._replace(x=2.0), dataclasses.replace(Config(), rate=2.0), Reader().total()),
    "torch": lambda: torch.einsum("i,i->", TENSOR, torch.stack([TENSOR.exp(), TENSOR]).sum(0)),
    "functional": lambda: nn.functional.layer_norm(nn.functional.relu(TENSOR), (3,)),
    "modules": lambda: nn.Linear(3, 2)(TENSOR),
    "distributions": lambda: torch.distributions.Normal(TENSOR, 1.0).log_prob(TENSOR),
    "contexts": lambda: torch.no_grad().__enter__(),
    "numpy": lambda: np.exp(np.ones(2)).sum() + np.mean(np.array([1.0])),
    "random numbers": lambda: torch.randn(3) + torch.rand_like(TENSOR),
}
IMPURE: dict[str, Callable[[], object]] = {
    "print": lambda: print("seen"),
    "open": lambda: open(os.devnull),  # noqa: SIM115
    "path": lambda: Path(os.devnull).read_text(),
    "exists": lambda: os.path.exists(os.devnull),
    "time": lambda: time.time(),
    "clock": lambda: time.perf_counter(),
    "now": lambda: datetime.datetime.now(),
    "random": lambda: random.random(),
    "choice": lambda: random.choice([1, 2]),
    "context": lambda: VARIABLE.get(),
    "thread": lambda: threading.current_thread(),
    "logging": lambda: logging.getLogger("x").debug("seen"),
    "warning": lambda: warnings.warn("seen", stacklevel=2),
    "item": lambda: TENSOR[0].item(),
    "tolist": lambda: TENSOR.tolist(),
    "numpy": lambda: TENSOR.numpy(),
    "asarray": lambda: np.asarray(TENSOR),
    "seed": lambda: torch.initial_seed(),
    "state": lambda: torch.get_rng_state(),
    "generator": lambda: torch.default_generator.initial_seed(),
    "frame": lambda: sys._getframe(),
    "globals": lambda: globals(),
    "variables": lambda: vars(sys),
    "id": lambda: id(TENSOR),
    "import": lambda: importlib.import_module("math"),
    "evaluated": lambda: eval("1"),
    "seeded": lambda: pl.seed_everything(0),
    "cuda": lambda: torch.cuda.is_available(),
    "saved": lambda: torch.save(TENSOR, os.devnull),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _untouched_generators() -> Any:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with torch.no_grad():
        yield
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def watched(function: Callable[[], object]) -> Reads:
    reads = Reads()
    with warnings.catch_warnings(), reads.watching():
        function()
    return reads


@pytest.mark.parametrize("name", PURE)
def test_what_depends_on_its_arguments_can_be_captured(name: str) -> None:
    with torch.enable_grad():
        assert watched(PURE[name]).reason is None


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)


def test_modules_are_made_and_freed_as_ever_once_something_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__", "__setstate__"):
        monkeypatch.setattr(nn.Module, name, getattr(nn.Module, name))
    monkeypatch.setattr(nn.Module, "___needs_generation_tag_patch", True, raising=False)
    mutation_guard.install_generation_tagging_init()
    assert watched(lambda: nn.Linear(3, 2)(TENSOR)).reason is None
    assert watched(lambda: Own().layer(TENSOR)).reason is None


@pytest.mark.parametrize("name", IMPURE)
def test_what_looks_elsewhere_cannot(name: str) -> None:
    warnings.simplefilter("ignore")
    reads = watched(IMPURE[name])
    assert reads.reason is not None
    with pytest.raises(Unguarded):
        reads.sources()


def test_numpys_own_generator_is_no_variable_like_others() -> None:
    module = nn.Linear(1, 1)
    with pytest.raises(Unguarded):
        Guard(module).add(watched(lambda: np.random.rand()), PythonState(module))


def test_a_profiler_is_left_alone() -> None:
    seen = []
    sys.setprofile(lambda *event: seen.append(event))
    try:
        reads = watched(lambda: None)
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert reads.reason is not None


def test_a_collection_of_garbage_is_no_part_of_a_step() -> None:
    def collected(phase: str, info: dict[str, int]) -> None:
        os.getpid()

    before = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1)
    reads = Reads()
    try:
        with reads.watching():
            [[index] for index in range(1000)]
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(collected)
    assert reads.reason is None


def test_what_functions_read_in_turn_is_watched() -> None:
    module = nn.Linear(1, 1)
    guard, reader = Guard(module), Reader()
    guard.add(watched(lambda: reader.total()), PythonState(module))
    assert guard.holds()
    SETTINGS["rate"] = 2.0
    try:
        assert not guard.holds()
    finally:
        SETTINGS["rate"] = 1.0
    assert guard.holds()


@pytest.mark.parametrize("read", [bool, float, lambda t: f"{t}", lambda t: [1, 2][t.long()], lambda t: t.nonzero()])
def test_values_of_tensors_are_not_given_to_python(read: Callable[[Any], object]) -> None:
    with pytest.raises(Unguarded), NoValues():
        read(torch.ones(()))
    with NoValues():
        torch.ones(3).sum()


def test_forms_that_do_not_come_again_are_forgotten() -> None:
    captured_steps = CapturedSteps(pl.LightningModule())
    for number in range(10_000):
        assert not captured_steps.is_due(f"a text of step {number}")
    assert len(captured_steps._uses) < 100


def test_nothing_is_kept_after_a_run() -> None:
    module = pl.LightningModule()
    captured_steps = CapturedSteps(module)
    captured_steps.capture_at = 1
    captured_steps.open_wave(PythonState(module))
    assert captured_steps.is_due("a")
    captured_steps.add("a", lambda: lambda: None, watched(lambda: None))
    assert captured_steps.made == len(captured_steps) == 1
    assert captured_steps.find("a") is not None
    captured_steps.close()
    assert captured_steps.find("a") is None
    assert captured_steps._state is None


def test_a_captured_step_is_checked_again_after_python_ran() -> None:
    module: Any = pl.LightningModule()
    module.rate = 1.0
    captured_steps = CapturedSteps(module)
    captured_steps.capture_at = 1
    captured_steps.open_wave(PythonState(module))
    captured_steps.is_due("a")
    captured_steps.add("a", lambda: lambda: None, watched(lambda: None))
    captured_steps.open_wave(PythonState(module))
    module.rate = 2.0
    captured_steps.suspect()
    assert captured_steps.find("a") is None
    assert captured_steps.forgotten == 1


def test_module_objects_of_the_user_are_not_seen_through() -> None:
    module: Any = nn.Module()
    module.settings = types.ModuleType("settings")
    assert not PythonState(module).complete
    module.settings = math
    assert PythonState(module).complete
