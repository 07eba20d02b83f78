"""One optimizer as observed by `CriticalPhase`: its steps, and the sums and noise of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale.callbacks.critical_phase.update_scaling import UpdateScaling
from lightning_fedscale.phases.noise import Diagonal, diagonal_init, diagonal_noise, diagonal_update


class StepHold:
    """Observes an optimizer while a module trains: it scales its steps, and reports each of them once.

    Lightning announces steps when gradients are complete: before the step, or within its closure, as often as the
    optimizer computes gradients. It does not announce steps by ``self.optimizers(use_pl_optimizer=False)``, which are
    found by hooks of torch.

    Args:
        optimizer: the Trainer's optimizer.
        scale_weight_decay: see `UpdateScaling`.
        see: called with the optimizer before a step that Lightning has not announced.
    """

    def __init__(self, optimizer: Any, scale_weight_decay: bool, see: Callable[[Optimizer], None]) -> None:
        self.optimizer: Optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        self.scaling = UpdateScaling(self.optimizer, scale_weight_decay)
        self._see = see
        self._announced = False  # by Lightning, before the step
        self._asking = False  # within a step with a closure
        self._asked = False  # whether that step has called its closure
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def announce(self) -> bool:
        """Record that Lightning has announced complete gradients; return whether they are the first of the step."""
        first = not (self._asking and self._asked)
        self._announced, self._asked = True, True
        return first

    def remove(self) -> None:
        """Restore the optimizer and remove the hooks."""
        self.scaling.remove()
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._asking = any(callable(each) for each in (*args[1:], kwargs.get("closure")))  # args[0] is the optimizer
        if self._asking:
            self._asked = False
        elif not self._announced:
            self._see(optimizer)

    def _after_step(self, *_: Any) -> None:
        self._announced = self._asking = False


class GradientMemory:
    """Sums and moments of an optimizer's gradients; a gradient that is missing in a step counts as zero."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._summed = 0
        self._diagonal: Diagonal | None = None
        self._places: list[int] | None = []  # positions of its tensors among the optimizer's parameters

    def to(self, device: torch.device) -> None:
        """Move all tensors."""
        self._sums = {place: tensor.to(device) for place, tensor in self._sums.items()}
        self._diagonal = None if self._diagonal is None else self._diagonal.to(device)

    def add_up(self, gradients: dict[int, Tensor], steps: int) -> list[Tensor] | None:
        """Add gradients to the sum, and return it once it has ``steps`` steps."""
        self._number(gradients)
        for place, gradient in gradients.items():
            if place in self._sums:
                self._sums[place].add_(gradient)
            else:
                self._sums[place] = gradient.to_dense() if gradient.is_sparse else gradient.clone()
        self._summed += 1
        if self._summed < steps:
            return None
        sums, self._sums, self._summed = self._sums, {}, 0
        return [sums[place] for place in sorted(sums)]

    def take_in(self, gradients: dict[int, Tensor], finite: Tensor) -> None:
        """Update every coordinate's mean and variance; a non-finite step counts as the mean."""
        places = self._number(gradients)
        known = diagonal_init([]) if self._diagonal is None else self._diagonal
        before = set(places)
        for place, gradient in gradients.items():
            if place not in before:
                places.append(place)
                known.mean.append(torch.zeros_like(gradient))
                known.variance.append(torch.zeros_like(gradient))
        now = [
            torch.where(finite, gradients[place], mean) if place in gradients else torch.zeros_like(mean)
            for place, mean in zip(places, known.mean, strict=True)
        ]
        self._diagonal = diagonal_update(known, now)

    @property
    def steps(self) -> int:
        """Number of steps in the moments."""
        return 0 if self._diagonal is None else self._diagonal.seen

    def add_noise(self, gradients: dict[int, Tensor], batch: float, target: float, seed: int) -> None:
        """Add the noise to gradients over ``batch`` samples that those over ``target`` samples have in addition."""
        assert self._diagonal is not None
        generator = torch.Generator(device=next(iter(gradients.values())).device)
        generator.manual_seed(seed)
        drawn = diagonal_noise(self._diagonal, batch, target, generator)
        noise = dict(zip(self._places or [], drawn, strict=True))
        torch._foreach_add_(list(gradients.values()), [noise[place] for place in gradients])

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {
            "sums": list(self._sums.items()),
            "summed": self._summed,
            "diagonal": None if self._diagonal is None else list(self._diagonal),
            "places": self._places and list(self._places),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; earlier versions saved lists of the tensors with a gradient, without their places."""
        sums, self._summed, self._places = state["sums"], state["summed"], state.get("places")
        self._sums = dict(enumerate(sums) if self._places is None else sums)
        self._diagonal = None if state["diagonal"] is None else Diagonal(*state["diagonal"])

    def _number(self, gradients: dict[int, Tensor]) -> list[int]:
        """Return the places of the tensors in the diagonal; for a state of an earlier version, find them."""
        if self._places is None:
            self._sums = dict(zip(gradients, self._sums.values(), strict=False))
            self._places = [] if self._diagonal is None else list(gradients)[: len(self._diagonal.mean)]
        return self._places
