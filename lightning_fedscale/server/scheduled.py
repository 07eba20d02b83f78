"""Server learning rates that change from round to round."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_fedscale.server.base import ServerOptimizer, own_state
from lightning_fedscale.types import Params
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def scheduled(rule: ServerOptimizer, scheduler: Callable[..., LRScheduler], **options: Any) -> ServerOptimizer:
    """Multiply a rule's steps as a torch scheduler would multiply a learning rate of 1, stepped once per server step.

    For most schedulers the schedule therefore starts at the rule's learning rate; ``eta_min`` of `CosineAnnealingLR`,
    ``max_lr`` of `OneCycleLR` and similar values are fractions of it.

    Args:
        rule: any server optimizer.
        scheduler: a class of ``torch.optim.lr_scheduler``, or a function of an optimizer that makes one, such as
            ``lambda optimizer: SequentialLR(optimizer, ...)``.
        options: arguments of the scheduler.

    Raises:
        TypeError: if ``rule`` is not a server optimizer, the scheduler rejects the options, or it follows a metric.

    Example:
        >>> from torch.optim.lr_scheduler import StepLR
        >>> from lightning_fedscale.server import fed_avg
        >>> server = scheduled(fed_avg(), StepLR, step_size=2, gamma=0.5)
        >>> params, delta = {"w": torch.tensor([1.0])}, {"w": torch.tensor([8.0])}
        >>> state, steps = server.init(params), []
        >>> for _ in range(5):
        ...     step, state = server.update(delta, state, params)
        ...     steps.append(step["w"].item())
        >>> steps
        [8.0, 8.0, 4.0, 4.0, 2.0]
    """
    if not isinstance(rule, ServerOptimizer):
        raise TypeError(f"scheduled: rule={rule!r}: pass a server optimizer, such as server.fed_adam(lr=0.01).")
    if scheduler is ReduceLROnPlateau:
        raise TypeError("scheduled: scheduler=ReduceLROnPlateau follows a metric, which is unknown here: pass another.")
    factors = _Factors(scheduler, options)
    try:
        factors[1]
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise TypeError(
            f"scheduled: {getattr(scheduler, '__name__', scheduler)}({given}) fails ({error}): pass a class of"
            " torch.optim.lr_scheduler and its arguments."
        ) from error
    return ServerOptimizer(
        partial(_init, rule=rule),
        partial(_update, rule=rule, factors=factors),
        reads_norms=rule.reads_norms,
        reads_params=rule.reads_params,
    )


def _init(params: Params, *, rule: ServerOptimizer) -> dict[str, Any]:
    return {"optimizer": "scheduled", "steps": 0, "rule": rule.init(params)}


def _update(
    delta: Params, state: Any, params: Params, *norms: float, rule: ServerOptimizer, factors: _Factors
) -> tuple[Params, dict[str, Any]]:
    state = own_state(state, "scheduled")
    step, after = rule.update(delta, state["rule"], params, *norms)
    factor = factors[state["steps"]]
    scaled = {name: factor * value for name, value in step.items()} if factor != 1 else step
    return scaled, {"optimizer": "scheduled", "steps": state["steps"] + 1, "rule": after}


class _Factors:
    """The learning rates by step of a schedule that starts at 1.

    This is a pure function of the step; the cache only saves work. A scheduler's own state is not stored in
    checkpoints, since it may contain any object.
    """

    def __init__(self, scheduler: Callable[..., LRScheduler], options: dict[str, Any]) -> None:
        self._scheduler, self._options = scheduler, options
        self._known: list[float] = []
        self._made: LRScheduler | None = None

    def __getitem__(self, step: int) -> float:
        while len(self._known) <= step:
            if self._made is None:
                optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.5)
                self._made = self._scheduler(optimizer, **self._options)
            else:
                self._made.optimizer.step()  # does nothing without gradients, but schedulers expect it
                self._made.step()
            self._known.append(float(self._made.optimizer.param_groups[0]["lr"]))
        return self._known[step]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Factors, (self._scheduler, self._options)
