"""Scaling of single optimizer steps, for any kind of optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

_FOLLOW_SCALE = (torch.optim.SGD, torch.optim.ASGD)
_OF_OWN_LENGTH = (torch.optim.Rprop,)
_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))


class UpdateScaling:
    """Multiplies the change of the parameters in an optimizer's next step.

    If updates are proportional to the gradients (SGD), the gradients are multiplied, so that momentum accumulates the
    scaled ones. Adam and others normalize gradients; for them the learning rate is multiplied for one step, and
    restored before anything reads it. Weight decay is not scaled, except where these optimizers add it to gradients.

    Args:
        optimizer: a torch optimizer.
        scale_weight_decay: whether to multiply weight decay as well.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> sgd = torch.optim.SGD([weight], lr=0.5)
        >>> scaling = UpdateScaling(sgd)
        >>> weight.grad = torch.ones(1)
        >>> scaling.apply(2.0)
        >>> sgd.step()
        >>> weight.item()
        0.0
    """

    def __init__(self, optimizer: Optimizer, scale_weight_decay: bool = False) -> None:
        self._optimizer = optimizer
        self._scale_decay = scale_weight_decay
        self._before: list[dict[str, Any]] = []
        self._hook = optimizer.register_step_post_hook(lambda *_: self.restore())
        self.by_gradient = isinstance(optimizer, _FOLLOW_SCALE)

    def check(self) -> None:
        """Refuse an optimizer whose steps cannot be scaled.

        Raises:
            ValueError: with the remedy.
        """
        if isinstance(self._optimizer, _OF_OWN_LENGTH):
            raise ValueError(
                f"action='scale': the steps of {type(self._optimizer).__name__} depend on neither the size of gradients"
                " nor the learning rate: choose another optimizer, or action='observe'."
            )

    def describe(self) -> str:
        """Return what is multiplied, in words."""
        name = type(self._optimizer).__name__
        if self.by_gradient:
            return f"the steps of {name} are proportional to gradients, so gradients are multiplied"
        return f"the steps of {name} are not proportional to gradients, so the learning rate is multiplied"

    def apply(self, factor: float) -> None:
        """Multiply the next step; call this when gradients are complete and clipped."""
        self.restore()
        if factor == 1.0:
            return
        if self.by_gradient:
            gradients = [
                p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            torch._foreach_mul_(gradients, factor)
            if self._scale_decay:
                self._set("weight_decay", lambda value: value * factor)
            return
        self._set("lr", lambda value: value * factor)
        if not self._scale_decay:
            # Decoupled weight decay is proportional to the learning rate.
            self._set("weight_decay", lambda value: value / factor, only_decoupled=True)

    def restore(self) -> None:
        """Restore the user's settings."""
        for group, before in zip(self._optimizer.param_groups, self._before, strict=False):
            group.update(before)
        self._before = []

    def remove(self) -> None:
        """Restore the optimizer and remove the hook."""
        self.restore()
        self._hook.remove()

    def _set(self, name: str, change: Any, *, only_decoupled: bool = False) -> None:
        groups = self._optimizer.param_groups
        self._before = self._before or [{} for _ in groups]
        for group, before in zip(groups, self._before, strict=True):
            if name not in group or (only_decoupled and not self._is_decoupled(group)):
                continue
            before[name] = group[name]
            group[name] = change(group[name])

    def _is_decoupled(self, group: dict[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", isinstance(self._optimizer, _DECOUPLED)))
