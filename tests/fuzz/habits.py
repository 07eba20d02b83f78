"""What people do in and around a `training_step`: state that it reads or writes, logging, losses, hooks."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torchmetrics
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.layers import CLASSES, WIDTH

GLOBALS: dict[str, Any] = {}
"""What steps read from the program around them; empty before every run."""

COEFFICIENT = 1.0


class State(NamedTuple):
    """A coefficient of the loss that is kept somewhere.

    Attributes:
        make: puts it in its place.
        read: what ``training_step`` takes from there.
        change: what a callback does at the start of an epoch; None if nothing does.
    """

    make: Callable[[Any], None]
    read: Callable[[Any, int], Any]
    change: Callable[[Any, int], None] | None = None


def _at(epoch: int) -> float:
    """The schedule that coefficients follow: it stays for two epochs, so that steps are recorded."""
    return 1.0 + 0.25 * (epoch // 2 % 3)


class Kind(enum.Enum):
    FEW = 1
    MANY = 2


@dataclasses.dataclass
class Settings:
    scale: float = 1.0
    inner: Any = None


class Slots:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Own:
    """An object with a property and a method."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    @property
    def scale(self) -> float:
        return self._scale

    def times(self, value: Any) -> Any:
        return value * self._scale


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value() if callable(value) else value)


def _change_global(_module: Any, epoch: int) -> None:
    global COEFFICIENT
    COEFFICIENT = _at(epoch)


def _reset_global(module: Any) -> None:
    _change_global(module, 0)


def _change_class(module: Any, epoch: int) -> None:
    type(module).coefficient = _at(epoch)


def _function(epoch: int) -> Callable[[float], float]:
    return lambda value: value * _at(epoch)


READ: dict[str, State] = {
    "number": State(_set("beta", 1.0), lambda m, i: m.beta, lambda m, e: setattr(m, "beta", _at(e))),
    "whole_number": State(_set("beta", 1), lambda m, i: m.beta, lambda m, e: setattr(m, "beta", 1 + e // 2)),
    "flag": State(_set("warm", True), lambda m, i: 1.0 if m.warm else 2.0, lambda m, e: setattr(m, "warm", e < 2)),
    "word": State(
        _set("mode", "first"),
        lambda m, i: {"first": 1.0, "then": 2.0}[m.mode],
        lambda m, e: setattr(m, "mode", "first" if e < 2 else "then"),
    ),
    "enum": State(
        _set("kind", Kind.FEW),
        lambda m, i: m.kind.value,
        lambda m, e: setattr(m, "kind", Kind.FEW if e < 3 else Kind.MANY),
    ),
    "in_dict": State(
        _set("cfg", lambda: {"beta": 1.0}), lambda m, i: m.cfg["beta"], lambda m, e: m.cfg.update(beta=_at(e))
    ),
    "in_deep_dict": State(
        _set("cfg", lambda: {"a": {"b": {"c": {"d": {"e": 1.0}}}}}),
        lambda m, i: m.cfg["a"]["b"]["c"]["d"]["e"],
        lambda m, e: m.cfg["a"]["b"]["c"]["d"].update(e=_at(e)),
    ),
    "in_list": State(
        _set("betas", lambda: [1.0]), lambda m, i: m.betas[0], lambda m, e: m.betas.__setitem__(0, _at(e))
    ),
    "in_namespace": State(
        _set("cfg", lambda: SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=SimpleNamespace(d=1.0))))),
        lambda m, i: m.cfg.a.b.c.d,
        lambda m, e: setattr(m.cfg.a.b.c, "d", _at(e)),
    ),
    "in_dataclass": State(
        _set("cfg", lambda: Settings(inner=Settings())),
        lambda m, i: m.cfg.inner.scale,
        lambda m, e: setattr(m.cfg.inner, "scale", _at(e)),
    ),
    "in_omegaconf": State(
        _set("cfg", lambda: OmegaConf.create({"loss": {"kl": {"beta": 1.0}}})),
        lambda m, i: m.cfg.loss.kl.beta,
        lambda m, e: setattr(m.cfg.loss.kl, "beta", _at(e)),
    ),
    "in_hparams": State(
        lambda m: m.save_hyperparameters({"beta": 1.0}),
        lambda m, i: m.hparams.beta,
        lambda m, e: setattr(m.hparams, "beta", _at(e)),
    ),
    "in_slots": State(
        _set("cfg", lambda: Slots(1.0)), lambda m, i: m.cfg.scale, lambda m, e: setattr(m.cfg, "scale", _at(e))
    ),
    "in_property": State(
        _set("cfg", lambda: Own(1.0)), lambda m, i: m.cfg.scale, lambda m, e: setattr(m.cfg, "_scale", _at(e))
    ),
    "in_method": State(
        _set("times", lambda: Own(1.0).times),
        lambda m, i: m.times(1.0),
        lambda m, e: setattr(m.times.__self__, "_scale", _at(e)),
    ),
    "in_array": State(
        _set("array", lambda: np.ones(2)), lambda m, i: float(m.array[1]), lambda m, e: m.array.__setitem__(1, _at(e))
    ),
    "in_deque": State(
        _set("recent", lambda: deque([1.0], 2)), lambda m, i: m.recent[-1], lambda m, e: m.recent.append(_at(e))
    ),
    "in_function": State(
        _set("scaled", lambda: _function(0)),
        lambda m, i: m.scaled(1.0),
        lambda m, e: setattr(m, "scaled", _function(e)),
    ),
    "in_partial": State(
        _set("scaled", lambda: functools.partial(max, 0.0, 1.0)),
        lambda m, i: m.scaled(0.5),
        lambda m, e: setattr(m, "scaled", functools.partial(max, 0.0, _at(e))),
    ),
    "in_class": State(lambda m: _change_class(m, 0), lambda m, i: type(m).coefficient, _change_class),
    "in_module_of_python": State(_reset_global, lambda m, i: COEFFICIENT, _change_global),
    "in_global_dict": State(
        lambda m: GLOBALS.update(beta=1.0), lambda m, i: GLOBALS["beta"], lambda m, e: GLOBALS.update(beta=_at(e))
    ),
    "in_global_object": State(
        lambda m: GLOBALS.update(cfg=SimpleNamespace(beta=1.0)),
        lambda m, i: GLOBALS["cfg"].beta,
        lambda m, e: setattr(GLOBALS["cfg"], "beta", _at(e)),
    ),
    "in_tensor": State(_set("beta", lambda: torch.ones(())), lambda m, i: m.beta, lambda m, e: m.beta.fill_(_at(e))),
    "in_new_tensor": State(
        _set("beta", lambda: torch.ones(())), lambda m, i: m.beta, lambda m, e: setattr(m, "beta", torch.tensor(_at(e)))
    ),
    "in_tensor_of_list": State(
        _set("betas", lambda: [torch.ones(2)]), lambda m, i: m.betas[0][1], lambda m, e: m.betas[0].mul_(0).add_(_at(e))
    ),
    "in_tensor_read": State(
        _set("beta", lambda: torch.ones(())), lambda m, i: m.beta.item(), lambda m, e: m.beta.fill_(_at(e))
    ),
    "in_tensor_of_global": State(
        lambda m: GLOBALS.update(beta=torch.ones(())),
        lambda m, i: GLOBALS["beta"],
        lambda m, e: GLOBALS["beta"].fill_(_at(e)),
    ),
    "in_buffer": State(
        lambda m: m.register_buffer("kept", torch.ones(())), lambda m, i: m.kept, lambda m, e: m.kept.fill_(_at(e))
    ),
    "in_submodule": State(
        lambda m: setattr(m.head, "scale", 1.0),
        lambda m, i: m.head.scale,
        lambda m, e: setattr(m.head, "scale", _at(e)),
    ),
    "in_dropout": State(
        lambda m: setattr(m, "drop", nn.Dropout(0.0)),
        lambda m, i: m.drop(torch.ones(4)).mean(),
        lambda m, e: setattr(m.drop, "p", 0.1 * (e // 2 % 3)),
    ),
    "in_mode_of_part": State(
        lambda m: setattr(m, "drop", nn.Dropout(0.5)),
        lambda m, i: m.drop(torch.ones(4)).mean(),
        lambda m, e: m.drop.train(e % 4 < 2) and None,
    ),
    "in_new_module": State(
        lambda m: setattr(m, "act", nn.Identity()),
        lambda m, i: m.act(torch.tensor(1.0)),
        lambda m, e: setattr(m, "act", nn.Identity() if e < 2 else nn.Softplus()),
    ),
    "frozen_then_free": State(
        lambda m: m.head.requires_grad_(False) and None,
        lambda m, i: 1.0,
        lambda m, e: m.head.requires_grad_(e >= 2) and None,
    ),
    "batch_idx": State(lambda m: None, lambda m, i: 1.0 + 0.2 * (i % 2)),
    "batch_idx_branch": State(lambda m: None, lambda m, i: 2.0 if i == 1 else 1.0),
    "epoch": State(lambda m: None, lambda m, i: 1.0 + 0.1 * m.current_epoch),
    "step": State(lambda m: None, lambda m, i: 1.0 + 0.1 * (m.global_step % 3)),
    "last_batch": State(lambda m: None, lambda m, i: 1.5 if m.trainer.is_last_batch else 1.0),
    "python_random": State(lambda m: None, lambda m, i: 1.0 + random.random()),
    "numpy_random": State(lambda m: None, lambda m, i: 1.0 + float(np.random.rand())),
    "torch_random": State(lambda m: None, lambda m, i: 1.0 + torch.rand(())),
    "torch_random_read": State(lambda m: None, lambda m, i: 1.0 + torch.rand(()).item()),
}
"""Where a step may find a coefficient that it does not change itself."""


def _count(module: Any, _index: int) -> float:
    module.calls += 1
    return 1.0 / (1 + 0.05 * module.calls)


def _append(module: Any, _index: int) -> float:
    module.losses.append(float(len(module.losses)))
    return 1.0 / (1 + 0.05 * len(module.losses))


def _note(module: Any, index: int) -> float:
    module.notes[index] = module.notes.get(index, 0) + 1
    return 1.0 / (1 + 0.05 * module.notes[index])


def _add(module: Any, _index: int) -> Tensor:
    module.total += 0.1
    return 1.0 / module.total


def _replace(module: Any, _index: int) -> Tensor:
    module.total = module.total + 0.1
    return 1.0 / module.total


def _add_in_list(module: Any, _index: int) -> Tensor:
    module.totals[0].add_(0.1)
    return 1.0 / module.totals[0]


def _add_in_global(_module: Any, _index: int) -> Tensor:
    GLOBALS["total"].add_(0.1)
    return 1.0 / GLOBALS["total"]


def _count_in_global(_module: Any, _index: int) -> float:
    GLOBALS["calls"] = GLOBALS.get("calls", 0) + 1
    return 1.0 / (1 + 0.05 * GLOBALS["calls"])


def _count_deep(module: Any, _index: int) -> float:
    module.cfg.a.b.c.d += 1
    return 1.0 / (1 + 0.05 * module.cfg.a.b.c.d)


def _count_in_slots(module: Any, _index: int) -> float:
    module.cfg.scale += 0.1
    return 1.0 / module.cfg.scale


def _count_in_array(module: Any, _index: int) -> float:
    module.array[0] += 0.1
    return 1.0 / float(module.array[0])


def _write_frozen(module: Any, _index: int) -> Tensor:
    with torch.no_grad():
        module.scale.mul_(0.99)
    return module.scale


def _set_data(module: Any, _index: int) -> Tensor:
    module.scale.data = module.scale.data * 0.99
    return module.scale


def _parameter_clamped(module: Any, _index: int) -> Tensor:
    """As Wasserstein critics are clipped, before they are used."""
    with torch.no_grad():
        module.clipped.clamp_(-0.3, 0.3)
    return 1.0 + module.clipped.sum()


def _own_generator(module: Any, _index: int) -> Tensor:
    return 1.0 + torch.rand((), generator=module.generator)


def _next(module: Any, _index: int) -> float:
    return 1.0 + 0.01 * next(module.numbers)


WRITTEN: dict[str, State] = {
    "count": State(_set("calls", 0), _count),
    "append": State(_set("losses", list), _append),
    "note": State(_set("notes", dict), _note),
    "add": State(_set("total", lambda: torch.ones(())), _add),
    "replace": State(_set("total", lambda: torch.ones(())), _replace),
    "add_in_list": State(_set("totals", lambda: [torch.ones(())]), _add_in_list),
    "add_in_global": State(lambda m: GLOBALS.update(total=torch.ones(())), _add_in_global),
    "count_in_global": State(lambda m: None, _count_in_global),
    "count_deep": State(
        _set("cfg", lambda: SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=SimpleNamespace(d=0))))), _count_deep
    ),
    "count_in_slots": State(_set("cfg", lambda: Slots(1.0)), _count_in_slots),
    "count_in_array": State(_set("array", lambda: np.ones(2)), _count_in_array),
    "own_generator": State(_set("generator", lambda: torch.Generator().manual_seed(0)), _own_generator),
    "next": State(_set("numbers", itertools.count), _next),
}
"""State that the step itself changes, which neither a checkpoint nor another rank knows of."""

TENSORS_WRITTEN: dict[str, State] = {
    "frozen_written": State(_set("scale", lambda: nn.Parameter(torch.ones(()), requires_grad=False)), _write_frozen),
    "frozen_data": State(_set("scale", lambda: nn.Parameter(torch.ones(()), requires_grad=False)), _set_data),
    "clamped": State(_set("clipped", lambda: nn.Parameter(torch.randn(3) / 2)), _parameter_clamped),
}
"""Parameters that the step itself changes."""

STATES = {**READ, **WRITTEN, **TENSORS_WRITTEN}


# ---- logging

Log = Callable[[Any, Tensor, Tensor, Tensor, int], None]
"""Of the module, its loss, its outputs, the labels and the number of the batch."""


def _log_accuracy(module: Any, _loss: Tensor, outputs: Tensor, labels: Tensor, _index: int) -> None:
    module.accuracy(outputs.detach().float(), labels)
    module.log("accuracy", module.accuracy, on_step=False, on_epoch=True)


def _log_collection(module: Any, _loss: Tensor, outputs: Tensor, labels: Tensor, _index: int) -> None:
    module.collection(outputs.detach().float(), labels)
    module.log_dict(module.collection, on_step=False, on_epoch=True)


def _log_updated(module: Any, loss: Tensor, _outputs: Tensor, labels: Tensor, _index: int) -> None:
    module.mean_loss.update(loss.detach().double(), weight=len(labels))
    module.log("mean_loss", module.mean_loss, on_step=False, on_epoch=True)


def _log_by_class(module: Any, _loss: Tensor, outputs: Tensor, labels: Tensor, _index: int) -> None:
    for label in labels.unique().tolist():
        share = (outputs.detach().argmax(1) == label).double().mean()
        module.log(f"share_{label}", share, batch_size=len(labels), **EVERY)


def _log_at_second(module: Any, loss: Tensor, _outputs: Tensor, _labels: Tensor, index: int) -> None:
    if index == 1:
        module.log("second", loss, batch_size=3, **EVERY)


def _log_dict(module: Any, loss: Tensor, outputs: Tensor, _labels: Tensor, _index: int) -> None:
    values = {"a": loss, "b": outputs.detach().square().mean()}
    module.log_dict(values, batch_size=len(outputs), **EVERY)


def _log_norm(module: Any, _loss: Tensor, _outputs: Tensor, _labels: Tensor, _index: int) -> None:
    module.log("norm", module.head.bias.norm(), batch_size=1, **EVERY)


EVERY: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
LOGS: dict[str, Log] = {
    "plain": lambda m, loss, o, y, i: m.log("loss", loss),
    "epoch": lambda m, loss, o, y, i: m.log("mean", loss, **EVERY),
    "both": lambda m, loss, o, y, i: m.log("both", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True),
    "batch_size": lambda m, loss, o, y, i: m.log("sized", loss, batch_size=len(y), **EVERY),
    "sum": lambda m, loss, o, y, i: m.log("total", loss, reduce_fx="sum", **EVERY),
    "largest": lambda m, loss, o, y, i: m.log("largest", loss, reduce_fx="max", **EVERY),
    "smallest": lambda m, loss, o, y, i: m.log("smallest", loss, reduce_fx=torch.min, **EVERY),
    "number": lambda m, loss, o, y, i: m.log("batch", float(i), batch_size=len(y), **EVERY),
    "item": lambda m, loss, o, y, i: m.log("item", loss.item(), batch_size=len(y), **EVERY),
    "dict": _log_dict,
    "accuracy": _log_accuracy,
    "collection": _log_collection,
    "updated": _log_updated,
    "by_class": _log_by_class,
    "at_second": _log_at_second,
    "norm": _log_norm,
}


def make_metrics(module: Any, logs: tuple[str, ...]) -> None:
    """The torchmetrics that these ways to log need."""
    if "accuracy" in logs:
        module.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
    if "collection" in logs:
        right = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
        module.collection = torchmetrics.MetricCollection({"right": right})
    if "updated" in logs:
        module.mean_loss = torchmetrics.MeanMetric()


# ---- losses

Loss = Callable[[Tensor, Tensor, Tensor, int], Any]
"""Of the outputs, the labels, the coefficient and the number of the batch: what `training_step` returns."""


def _entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels)


LOSSES: dict[str, Loss] = {
    "entropy": lambda o, y, c, i: _entropy(o, y) * c,
    "smooth": lambda o, y, c, i: (
        F.cross_entropy(o, y, label_smoothing=0.1, ignore_index=3, reduction="sum") * c / len(y)
    ),
    "weighted": lambda o, y, c, i: F.cross_entropy(o, y, weight=torch.linspace(0.5, 1.0, CLASSES, dtype=o.dtype)) * c,
    "squares": lambda o, y, c, i: F.mse_loss(o, F.one_hot(y, CLASSES).to(o.dtype)) * c,
    "binary": lambda o, y, c, i: F.binary_cross_entropy_with_logits(o, F.one_hot(y, CLASSES).to(o.dtype)) * c,
    "margin": lambda o, y, c, i: F.multi_margin_loss(o, y) * c,
    "gathered": lambda o, y, c, i: -o.log_softmax(1).gather(1, y[:, None]).mean() * c,
    "indexed": lambda o, y, c, i: -o.log_softmax(1)[torch.arange(len(y)), y].mean() * c,
    "selected": lambda o, y, c, i: o[y > 0].square().sum() / len(y) * c + _entropy(o, y),
    "dict": lambda o, y, c, i: {"loss": _entropy(o, y) * c, "outputs": o.detach()},
    "one_element": lambda o, y, c, i: (_entropy(o, y) * c).reshape(1),
    "none_at_second": lambda o, y, c, i: None if i == 1 else _entropy(o, y) * c,
    "none_by_data": lambda o, y, c, i: None if int(y[0]) == 2 else _entropy(o, y) * c,
    "branch": lambda o, y, c, i: _entropy(o, y) * (2.0 if float(o.detach().sum()) > 0 else 1.0) * c,
    "contrast": lambda o, y, c, i: _entropy(o @ o.T / WIDTH, torch.arange(len(y))) * c,
}


# ---- hooks of the LightningModule, each a class to inherit from


class _BatchStart:
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.head.bias.data.mul_(0.99)  # type: ignore[attr-defined]


class _SkipsThird:
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class _BatchEnd:
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.head.bias.data.clamp_(-0.5, 0.5)  # type: ignore[attr-defined]


class _BeforeTransfer:
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class _AfterTransfer:
    """Only these forms have a first column to add noise to."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if type(batch) in (tuple, list) and isinstance(batch[0], Tensor) and batch[0].layout == torch.strided:
            first = batch[0] + 0.1 * torch.randn_like(batch[0])
            return type(batch)([first, *batch[1:]])
        return batch


class _Clipping:
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.3)  # type: ignore[attr-defined]


class _AfterBackward:
    def on_after_backward(self) -> None:
        for parameter in self.parameters():  # type: ignore[attr-defined]
            if parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad.mul_(0.5)


class _BeforeStep:
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("steps", 1.0, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)  # type: ignore[attr-defined]


class _OwnStep:
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


class _OwnZero:
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class _OwnBackward:
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * 0.5).backward()


class _EpochHooks:
    def on_train_epoch_start(self) -> None:
        self.log("epoch_begun", float(self.current_epoch))  # type: ignore[attr-defined]

    def on_train_epoch_end(self) -> None:
        self.log("epoch_ended", self.head.bias.detach().norm())  # type: ignore[attr-defined]


class _OwnLog:
    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        super().log(f"own_{name}", value, *args, **options)  # type: ignore[misc]


class _Manual:
    """Set by `tests.fuzz.build.Fuzzed`, which then steps itself."""

    manual = True


class _Evaluated:
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.random.fork_rng():  # what evaluation draws is the user's, and in no checkpoint
            torch.manual_seed(batch_idx)
            loss = self.evaluate(batch)  # type: ignore[attr-defined]
        self.log("val_loss", loss, sync_dist=True, batch_size=1)  # type: ignore[attr-defined]


HOOKS: dict[str, type] = {
    "batch_start": _BatchStart,
    "skips_third": _SkipsThird,
    "batch_end": _BatchEnd,
    "before_transfer": _BeforeTransfer,
    "after_transfer": _AfterTransfer,
    "clipping": _Clipping,
    "after_backward": _AfterBackward,
    "before_step": _BeforeStep,
    "own_step": _OwnStep,
    "own_zero": _OwnZero,
    "own_backward": _OwnBackward,
    "epochs": _EpochHooks,
    "own_log": _OwnLog,
    "manual": _Manual,
    "evaluated": _Evaluated,
}
