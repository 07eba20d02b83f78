"""A local step without Lightning's full closure, for runs in which nothing needs the closure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_fedscale.core.lightning.module_state import set_hook
from lightning_fedscale.core.lightning.round_loops import outputs_of

_OF_CALLBACKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_OF_MODULE = (
    *_OF_CALLBACKS,
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "clip_gradients",
)
_OF_STRATEGY = ("training_step", "pre_backward", "backward", "post_backward", "optimizer_step")
_OF_PRECISION = ("pre_backward", "backward", "post_backward", "optimizer_step", "train_step_context", "clip_gradients")
_GRADIENTS_FIRST = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)
# Of the function that torch puts around each class's step, where nobody else has put another around it.
_PROFILED = Optimizer.profile_hook_step(lambda optimizer: None).__code__
_PRECISIONS = (Precision, DoublePrecision, HalfPrecision, MixedPrecision)


def reason_for_lightning_step(trainer: pl.Trainer) -> str | None:
    """Return why local batches need Lightning's full closure; None if they do not.

    Args:
        trainer: the Trainer with its optimizers built.
    """
    module, strategy, precision = trainer.lightning_module, trainer.strategy, trainer.precision_plugin
    if not module.automatic_optimization:
        return "the module uses manual optimization"
    if (hook := _overridden(module, pl.LightningModule, _OF_MODULE)) is not None:
        return f"the module overrides {hook}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (hook := _overridden(callback, pl.Callback, _OF_CALLBACKS)) is not None:
            return f"{type(callback).__name__} overrides {hook}"
    if (hook := _overridden(strategy, DDPStrategy, _OF_STRATEGY)) is not None:
        return f"{type(strategy).__name__} overrides {hook}"
    if strategy.model is not module:
        return "the strategy wraps the module"
    if type(precision) not in _PRECISIONS or getattr(precision, "scaler", None) is not None:
        return f"precision {precision.precision} takes part in the optimizer's step"
    if (hook := _overridden(precision, type(precision), _OF_PRECISION)) is not None:
        return f"{type(precision).__name__} overrides {hook}"
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if type(profiler) is not PassThroughProfiler:
        return f"{type(profiler).__name__} measures the parts of the closure"
    if not isinstance(trainer.optimizers[0], Optimizer):
        return f"the optimizer is a {type(trainer.optimizers[0]).__name__}"
    return None


def _overridden(instance: object, base: type, names: Sequence[str]) -> str | None:
    """Return the first method that differs from the base's; a mock, which counts calls, differs in all of them."""
    kind = type(instance)
    return next(
        (name for name in names if name in vars(instance) or getattr(kind, name, None) is not getattr(base, name)), None
    )


class FastStep:
    """Runs only training step, backward pass and optimizer step; results are bit-identical to Lightning's.

    Use it only if `reason_for_lightning_step` returns None.

    Args:
        trainer: the Trainer.
        takes_index: whether ``training_step`` takes the number of the batch.
        correct: changes the gradients before they are clipped; None for no change.
    """

    def __init__(
        self, trainer: pl.Trainer, *, takes_index: bool, correct: Callable[[Optimizer], None] | None = None
    ) -> None:
        self._trainer = trainer
        self._correct = correct
        self._module = trainer.lightning_module
        self._optimizer = trainer.optimizers[0]
        self._takes_index = takes_index
        precision = trainer.precision_plugin
        self._context: Any = nullcontext if type(precision) is Precision else precision.train_step_context
        usual = _overridden(self._optimizer, Optimizer, ("zero_grad",)) is None
        self._zero_grad = self._forget_grads if usual else self._optimizer.zero_grad
        self._by_closure = _wants_closure(self._optimizer)

    def step(self, batch: Any, batch_idx: int, *, last: bool, training: bool) -> dict[str, Any]:
        """See `lightning_fedscale.core.executors.local_step.LocalStep`."""
        window = self._trainer.accumulate_grad_batches
        if not training:
            return self._forward(batch, batch_idx, window)[1]
        steps = last or (batch_idx + 1) % window == 0
        if steps and self._by_closure:
            return self._step_by_closure(batch, batch_idx, window)
        _, outputs = self._forward_backward(batch, batch_idx, window)
        if steps:
            self._finish_gradients()
            self._step_optimizer()
        return outputs

    def _step_optimizer(self) -> None:
        """Step without an entry in torch's profiler if nobody looks: it takes two fifths of SGD's time."""
        optimizer, step = self._optimizer, type(self._optimizer).step
        hooks = optimizer._optimizer_step_post_hooks or _global_optimizer_post_hooks or _pre_hooks(optimizer)
        profiled = getattr(step, "__code__", None) is _PROFILED and "step" not in vars(optimizer)
        # Modes that see every operator, as `ComputeAccounting` has, tell the optimizer's by that entry.
        seen = torch._C._autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack()
        if profiled and not hooks and not seen:
            step.__wrapped__(optimizer)  # type: ignore[attr-defined]
        else:
            optimizer.step()

    def _step_by_closure(self, batch: Any, batch_idx: int, window: int) -> dict[str, Any]:
        outputs: dict[str, Any] | None = None

        def closure() -> Tensor | None:
            nonlocal outputs
            with torch.enable_grad():
                loss, outputs = self._forward_backward(batch, batch_idx, window)
            self._finish_gradients()
            return None if loss is None else loss.detach()

        self._optimizer.step(closure)  # type: ignore[arg-type]
        if outputs is None:
            raise MisconfigurationException(
                f"The closure hasn't been executed: {type(self._optimizer).__name__}.step(closure) must call the"
                " closure that it is given, which runs training_step and the backward pass."
            )
        return outputs

    def _forward_backward(self, batch: Any, batch_idx: int, window: int) -> tuple[Tensor | None, dict[str, Any]]:
        loss, outputs = self._forward(batch, batch_idx, window)
        if batch_idx % window == 0:
            self._zero_grad()
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss, outputs

    def _forward(self, batch: Any, batch_idx: int, window: int) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the loss for the backward pass and the outputs for hooks."""
        module = self._module
        set_hook(module, "training_step")
        with self._context():
            output = module.training_step(*((batch, batch_idx) if self._takes_index else (batch,)))
        set_hook(module, None)
        if window == 1 and isinstance(output, Tensor):
            return output, {"loss": output.detach().clone()}
        result = ClosureResult.from_training_step_output(output, window)
        if result.closure_loss is None:
            Closure.warning_cache.warn(
                "`training_step` returned `None`. If this was on purpose, ignore this warning..."
            )
        return result.closure_loss, outputs_of(result, window)

    def _forget_grads(self) -> None:
        """Reset gradients as ``Optimizer.zero_grad`` does, without an entry in torch's profiler."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _finish_gradients(self) -> None:
        if self._correct is not None:
            self._correct(self._optimizer)
        trainer = self._trainer
        if trainer.gradient_clip_val:
            self._module.configure_gradient_clipping(
                self._optimizer, trainer.gradient_clip_val, gradient_clip_algorithm=trainer.gradient_clip_algorithm
            )


def _wants_closure(optimizer: Optimizer) -> bool:
    """Return whether the optimizer may do other than call its closure exactly once, before all else."""
    return type(optimizer) not in _GRADIENTS_FIRST or is_patched(optimizer) or bool(_pre_hooks(optimizer))


def _pre_hooks(optimizer: Optimizer) -> Any:
    return optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks


def is_patched(optimizer: Optimizer) -> bool:
    """Return whether the object overrides its class's ``step`` or ``zero_grad``."""
    kind, own = type(optimizer), vars(optimizer)
    # Schedulers replace the step by one that counts the call and calls the class's step.
    step = own.get("step", kind.step)
    return kind.step not in (step, getattr(step, "__wrapped__", None)) or "zero_grad" in own
