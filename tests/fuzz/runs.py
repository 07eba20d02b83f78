"""One training of a recipe, and what can be seen of it afterwards."""

from __future__ import annotations

import math
import random
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

import lightning_fedscale
from lightning_fedscale.core.executors import auto as choice
from lightning_fedscale.core.executors.vectorized import captured_steps
from tests.fuzz.build import build, make_strategy, make_trainer
from tests.fuzz.habits import GLOBALS
from tests.fuzz.recipes import Recipe
from tests.ids import stable

# What rounds log of clocks, and of how clients were put into waves.
_OF_EXECUTORS = re.compile(r"round/(seconds|idle|padding)$")
_LIBRARY = str(Path(str(lightning_fedscale.__file__)).parent)


@dataclass
class Outcome:
    """What can be seen of a training: everything that should not depend on how it was executed.

    Attributes:
        tensors: parameters and buffers at the end, by name.
        python: attributes of the module that are numbers, texts, tensors or containers of these.
        logged: the Trainer's metrics after each epoch.
        records: what the strategy tells of every round.
        drawn: the next numbers of the global generators.
        vectorized: whether clients trained vectorized to the end.
        error: what ended the training, None if nothing did.
        refused: whether the error is one of the library's own messages.
        where: the last lines of the error's traceback.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    python: dict[str, Any] = field(default_factory=dict)
    logged: list[dict[str, float]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    vectorized: bool = False
    error: str | None = None
    refused: bool = False
    where: str = ""


class Notes(pl.Callback):
    """Writes down what is logged after every epoch."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        record = getattr(trainer.strategy, "last_round", None)
        if record is not None:
            self.outcome.records.append(
                {
                    "clients": record.clients.tolist(),
                    "losses": record.losses.tolist(),
                    "norms": record.delta_norms.tolist(),
                    "weights": record.weights.tolist(),
                    "steps": record.local_steps.tolist(),
                }
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.outcome.logged.append({})


class Metrics(pl.Callback):
    """The last of the callbacks: the Trainer's metrics are complete only when the next epoch begins."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def _take(self, trainer: pl.Trainer) -> None:
        if self.outcome.logged and not self.outcome.logged[-1]:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.outcome.logged[-1] = {name: value for name, value in metrics.items() if not _OF_EXECUTORS.match(name)}

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._take(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._take(trainer)


class Keep(pl.Callback):
    """Saves a checkpoint at the end of an epoch."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def run(
    recipe: Recipe,
    executor: str,
    *,
    save: Path | None = None,
    resume: Path | None = None,
    capture: bool = True,
    **options: Any,
) -> Outcome:
    """Train.

    Args:
        recipe: what.
        executor: "sequential", "vectorized", "auto", or "none": a plain Trainer without the strategy.
        save: where to write a checkpoint in the middle.
        resume: a checkpoint to go on from.
        capture: whether steps are captured as soon as can be, rather than after the usual number of times.
        options: other arguments of the Trainer.
    """
    outcome = Outcome()
    # In order: what a loader shuffles by is the user's, and in no checkpoint.
    validation = build(replace(recipe, shuffle=False, noisy=False)).loader if "evaluated" in recipe.hooks else None
    module, loader, _ = build(recipe)
    callbacks: list[pl.Callback] = [Notes(outcome), Metrics(outcome)]
    if save is not None:
        callbacks.append(Keep(save, middle(recipe)))
    with quiet() as told, eager(capture):
        try:
            strategy = "auto" if executor == "none" else make_strategy(recipe, executor)
            trainer = make_trainer(recipe, strategy, callbacks, **options)
            path = None if resume is None else str(resume)
            trainer.fit(module, loader, validation, ckpt_path=path, weights_only=True)
        except Exception as error:
            outcome.error = stable(f"{type(error).__name__}: {error}")
            frames = traceback.extract_tb(error.__traceback__)
            raised = (frames[-1].line or "").startswith("raise ")  # an error of torch's own has its caller's line
            outcome.refused = raised and frames[-1].filename.startswith(_LIBRARY)
            outcome.where = "".join(traceback.format_list(frames[-4:]))
    gave_up = any("they cannot be vectorized: " in str(each.message) for each in told)
    outcome.vectorized = executor in ("vectorized", "auto") and outcome.error is None and not gave_up
    state = {**module.state_dict(), **dict(module.named_buffers())}
    outcome.tensors = {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}
    outcome.python = {name: value for name, value in vars(module).items() if name[0] != "_" and _is_plain(value)}
    outcome.python |= {f"global {name}": value for name, value in GLOBALS.items() if _is_plain(value)}
    outcome.python["requires_grad"] = [parameter.requires_grad for parameter in module.parameters()]
    outcome.drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return outcome


def middle(recipe: Recipe) -> int:
    """The epoch after which a training is stopped."""
    rounds = int(recipe.trainer.get("max_steps", "-1")), int(recipe.strategy.get("rounds_per_epoch", "1"))
    epochs = recipe.epochs if rounds[0] < 0 else min(recipe.epochs, math.ceil(rounds[0] / rounds[1]))
    return (epochs - 1) // 2


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, bool | int | float | str | Tensor | np.ndarray | type(None))


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings are collected; nothing is printed, and the generators start from the same numbers."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.set_num_threads(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield told


@contextmanager
def eager(capture: bool) -> Iterator[None]:
    """Steps are captured soon, and "auto" takes the vectorized executor wherever it can: clocks decide nothing."""
    usual = captured_steps._CAPTURE_AT
    with (
        mock.patch.object(captured_steps, "_CAPTURE_AT", 2 if capture else usual),
        mock.patch.object(choice, "_MARGIN", 0.0),
    ):
        yield


# ---- comparisons

TOLERANCES = {"64-true": 1e-8, "32-true": 1e-3, "bf16-mixed": 0.1, "bf16-true": 0.3}
"""Of differences relative to the values, or to 1 where these are smaller; rounding errors grow while models train."""


def difference(
    left: Outcome, right: Outcome, tolerance: float, *, python: bool = True, epochs: int | None = None
) -> str | None:
    """What differs by more than ``tolerance``, in one line; None if nothing does.

    Args:
        left: one training.
        right: another one.
        tolerance: 0 asks for the same bits.
        python: whether attributes count.
        epochs: only the last so many epochs of what was logged are compared; None for all.
    """
    if left.error or right.error:
        return None if left.error == right.error else f"errors: {left.error} | {right.error}"
    pairs: list[tuple[str, Any, Any]] = [("tensors", left.tensors, right.tensors)]
    if epochs is None:
        pairs += [("logged", left.logged, right.logged), ("records", left.records, right.records)]
    elif epochs:
        pairs += [("logged", left.logged[-epochs:], right.logged[-epochs:])]
        pairs += [("records", left.records[-1:], right.records[-1:])]
    if python:
        pairs += [("python", left.python, right.python)]
    if epochs is None:
        pairs += [("drawn", left.drawn, right.drawn)]
    for name, one, other in pairs:
        # Lightning and torchmetrics add up in single precision, and Lightning the first value of a run otherwise.
        found = _differ(one, other, max(tolerance, 1e-5) if name == "logged" else tolerance, name)
        if found is not None:
            return found
    return None


def _differ(one: Any, other: Any, tolerance: float, path: str) -> str | None:
    if isinstance(one, np.ndarray):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
    if type(one) is not type(other) and not (isinstance(one, float | int) and isinstance(other, float | int)):
        return f"{path}: {type(one).__name__} | {type(other).__name__}"
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{path}: {sorted(map(str, one.keys() ^ other.keys()))} only on one side"
        children = ((f"{path}.{name}", one[name], other[name]) for name in one)
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{path}: {len(one)} | {len(other)} entries"
        children = ((f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True)))
    elif isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{path}: {one.dtype} {tuple(one.shape)} | {other.dtype} {tuple(other.shape)}"
        return _far(one.detach(), other.detach(), tolerance, path)
    elif isinstance(one, float | int) and not isinstance(one, bool):
        return _far(torch.tensor(float(one)).double(), torch.tensor(float(other)).double(), tolerance, path)
    else:
        return None if one == other else f"{path}: {one!r} | {other!r}"
    return next((found for name, a, b in children if (found := _differ(a, b, tolerance, name)) is not None), None)


def _far(one: Tensor, other: Tensor, tolerance: float, path: str) -> str | None:
    if not one.numel() or torch.equal(one, other):
        return None
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    one, other = one.double(), other.double()
    if torch.equal(one.isfinite(), other.isfinite()):
        apart = (one - other).abs() / other.abs().clamp(min=1.0)
        # Infinite and NaN in the same places are the same.
        far = float(apart[one.isfinite()].max()) if one.isfinite().any() else 0.0
        if far <= tolerance:
            return None
    else:
        far = math.nan
    return f"{path}: {_shown(one)} | {_shown(other)}, apart by {far:.2g}"


def _shown(tensor: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in tensor.flatten()[:3].tolist())
