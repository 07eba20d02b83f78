"""One optimizer object for all clients, with each client's own state."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.utils._pytree import tree_leaves, tree_map

OptimizerState: TypeAlias = dict[str, Any]
"""``{"state": {parameter index: its state, other key: value}, "options": [changed options of each group]}``"""


_ADAM = dict.fromkeys(("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 0.0)
_FRESH: dict[type[Optimizer], dict[str, float]] = {
    Adam: _ADAM,
    AdamW: _ADAM,
    RAdam: _ADAM,
    NAdam: {**_ADAM, "mu_product": 1.0},
    Adamax: dict.fromkeys(("step", "exp_avg", "exp_inf"), 0.0),
    Adadelta: dict.fromkeys(("step", "square_avg", "acc_delta"), 0.0),
    RMSprop: dict.fromkeys(("step", "square_avg", "grad_avg", "momentum_buffer"), 0.0),
}
"""Values with which torch's optimizers fill a parameter's state before its first step. Subclasses are not covered,
since they may do anything; nor is SGD, whose first step differs from later ones."""
_MISSING = object()
_MUTABLE = (Tensor, list, dict)


class OptimizerKeeper:
    """Gives every client its own optimizer state; all clients share one optimizer object and its learning rates.

    Group options (learning rate, momentum, ...) belong to the server, whose schedulers change them between rounds; a
    client that changes them does so only for itself. Other options that a client's optimizer changes (step counters,
    distances) are kept with its state.

    Args:
        optimizer: newly built, before its first step; every new client starts from its present state.
    """

    _SCHEDULED = ("params", "lr", "initial_lr", "momentum", "betas", "weight_decay")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._fresh = self._pack()
        self._options: list[dict[str, Any]] = []
        self.open_round()

    @property
    def fresh(self) -> dict[Any, Any]:
        """The state that every new client starts from; copy it, do not change it."""
        return self._fresh

    def open_round(self) -> None:
        """Remember the group options that every client of this round starts from."""
        self._options = [
            {key: _copied(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        self._reusable = False

    def load(self, kept: OptimizerState | None) -> None:
        """Give the optimizer the next client's kept state, or that of a fresh optimizer."""
        untouched = self._restore_options()
        if kept is not None:
            self._unpack(kept["state"])
            for group, options in zip(self._optimizer.param_groups, kept["options"], strict=False):
                group.update({key: _copied(value) for key, value in options.items()})
        elif not (self._reusable and untouched and self._refresh()):
            self._unpack(self._fresh)
        # A state that began fresh can be reset in the same memory for the next client.
        self._reusable = kept is None

    def unload(self) -> OptimizerState:
        """Return the state that the client's training left in the optimizer; the caller owns it."""
        self._reusable = False
        changed = [
            {
                key: value
                for key, value in group.items()
                if key not in self._SCHEDULED and value is not options.get(key) and not _same(value, options.get(key))
            }
            for group, options in zip(self._optimizer.param_groups, self._options, strict=True)
        ]
        return {"state": self._pack(), "options": changed}

    def close_round(self) -> None:
        """Restore the server's options and the fresh state."""
        self._restore_options()
        self._unpack(self._fresh)
        self._reusable = False

    def at_round_start(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return ``saved``, a state dict taken while a client trains, with the values from the start of the round."""
        groups = zip(saved["param_groups"], self._options, strict=True)
        return {
            "state": self._fresh,
            "param_groups": [{**options, "params": group["params"]} for group, options in groups],
        }

    def _restore_options(self) -> bool:
        """Restore the server's options in every group; return whether the last client had left them unchanged."""
        untouched = True
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            for key in group.keys() - options.keys() - {"params"}:
                del group[key]
                untouched = False
            for key, value in options.items():
                if (found := group.get(key, _MISSING)) is value:
                    continue
                group[key] = _copied(value)
                # Learning rates, and tensors, which may have been changed in place, do not affect a fresh state.
                untouched = untouched and (key == "lr" or isinstance(value, _MUTABLE) or _same(found, value))
        return untouched

    def _refresh(self) -> bool:
        """Reset the state to that of a fresh optimizer in the same memory; return False if this is not possible."""
        fills = _FRESH.get(type(self._optimizer))
        if fills is None or any(group.get("differentiable") for group in self._optimizer.param_groups):
            return False
        tensors: dict[tuple[float, torch.device], list[Tensor]] = {}
        for parameter, state in self._optimizer.state.items():
            if not isinstance(parameter, Tensor):
                return False
            for key, value in state.items():
                if key not in fills or not _is_plain(value, parameter):
                    return False
                tensors.setdefault((fills[key], value.device), []).append(value)
        for (fill, _), alike in tensors.items():
            torch._foreach_zero_(alike)
            if fill:
                torch._foreach_add_(alike, fill)
        return True

    def _pack(self) -> dict[Any, Any]:
        parameters = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        state = self._optimizer.state
        of_parameters = {i: dict(state[p]) for i, p in enumerate(parameters) if p in state}
        return {**of_parameters, **{key: value for key, value in state.items() if not isinstance(key, Tensor)}}

    def _unpack(self, packed: dict[Any, Any]) -> None:
        self._optimizer.state.clear()
        if not packed:
            return
        self._optimizer.state.update(
            {key: _placed(value, None) for key, value in packed.items() if type(key) is not int}
        )
        i = -1
        for group in self._optimizer.param_groups:
            # Step counters stay on the CPU, as in torch, unless the optimizer reads them on the device.
            steps_on_device = bool(group.get("capturable") or group.get("fused"))
            for parameter in group["params"]:
                i += 1
                if i in packed:
                    device = parameter.device
                    self._optimizer.state[parameter] = {
                        key: _placed(value, device if key != "step" or steps_on_device else None)
                        for key, value in packed[i].items()
                    }


def _is_plain(value: Any, parameter: Tensor) -> bool:
    """Return whether the value is a dense real tensor of the parameter's shape, or a counter."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and (value.dim() == 0 or value.shape == parameter.shape)
    )


def _placed(value: Any, device: torch.device | None) -> Any:
    """Return a copy, so that the stored state survives a round that fails."""
    if isinstance(value, Tensor):
        if device is None or device == value.device:
            return value.detach().clone()
        return value.detach().to(device, non_blocking=device.type != "cpu")
    if isinstance(value, int | float):  # by far the most frequent types need no pytree
        return value
    return tree_map(lambda leaf: _placed(leaf, device) if isinstance(leaf, Tensor) else leaf, value)


def _copied(value: Any) -> Any:
    return _placed(value, None) if isinstance(value, _MUTABLE) else value


def _same(left: Any, right: Any) -> bool:
    left_leaves, right_leaves = tree_leaves(left), tree_leaves(right)
    return (
        type(left) is type(right)
        and len(left_leaves) == len(right_leaves)
        and all(map(_equal, left_leaves, right_leaves))
    )


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)
