"""One optimizer object for all clients, and the state that each of them finds in it."""

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
"""What torch's optimizers fill a parameter's state with before its first step. Only these very classes: one that is
derived from them may do anything. Not SGD, whose first step is another than the later ones."""
_MISSING = object()
_MUTABLE = (Tensor, list, dict)


class OptimizerKeeper:
    """Gives every client its own optimizer state while all share one optimizer object and its learning rates.

    Group options (learning rate, momentum, ...) belong to the server, whose schedulers move them between rounds: a
    client that changes them changes them for itself only. Options other than the scheduled ones that a client's
    optimizer changed by itself (step counters, distances) are kept with its state.

    Args:
        optimizer: just built, before its first step: what it holds now is what every new client starts from.
    """

    _SCHEDULED = ("params", "lr", "initial_lr", "momentum", "betas", "weight_decay")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._fresh = self._pack()
        self._options: list[dict[str, Any]] = []
        self.open_round()

    @property
    def fresh(self) -> dict[Any, Any]:
        """The state that every new client starts from; to be copied, not changed."""
        return self._fresh

    def open_round(self) -> None:
        """Remember the group options that every client of this round starts from."""
        self._options = [
            {key: _copied(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        self._reusable = False

    def load(self, kept: OptimizerState | None) -> None:
        """Set the optimizer up for the next client: its kept state, or that of a fresh optimizer."""
        untouched = self._restore_options()
        if kept is not None:
            self._unpack(kept["state"])
            for group, options in zip(self._optimizer.param_groups, kept["options"], strict=False):
                group.update({key: _copied(value) for key, value in options.items()})
        elif not (self._reusable and untouched and self._refresh()):
            self._unpack(self._fresh)
        # What the optimizer itself makes of a fresh state, the next client may find in the same memory.
        self._reusable = kept is None

    def unload(self) -> OptimizerState:
        """The state that the client's training left in the optimizer, now the caller's own."""
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
        """Back to the server's options and no client's state."""
        self._restore_options()
        self._unpack(self._fresh)
        self._reusable = False

    def at_round_start(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state dict, taken while a client trains, with what the round began with in its place."""
        groups = zip(saved["param_groups"], self._options, strict=True)
        return {
            "state": self._fresh,
            "param_groups": [{**options, "params": group["params"]} for group, options in groups],
        }

    def _restore_options(self) -> bool:
        """The server's options are in every group again; whether the last client had left them as they were."""
        untouched = True
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            for key in group.keys() - options.keys() - {"params"}:
                del group[key]
                untouched = False
            for key, value in options.items():
                if (found := group.get(key, _MISSING)) is value:
                    continue
                group[key] = _copied(value)
                # Learning rates and tensors (which may have been changed in place) have no say in what a state is.
                untouched = untouched and (key == "lr" or isinstance(value, _MUTABLE) or _same(found, value))
        return untouched

    def _refresh(self) -> bool:
        """Make the state that of a fresh optimizer, in the same memory; False if it is not known how."""
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
            # Step counters stay on the CPU, as torch has it, unless the optimizer reads them on the device.
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
    """Whether it is a real tensor of the parameter's shape, or a counter."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and (value.dim() == 0 or value.shape == parameter.shape)
    )


def _placed(value: Any, device: torch.device | None) -> Any:
    """A copy, so that the stored state survives if this round does not."""
    if isinstance(value, Tensor):
        if device is None or device == value.device:
            return value.detach().clone()
        return value.detach().to(device, non_blocking=device.type != "cpu")
    if isinstance(value, int | float):  # by far the most frequent ones need no pytree
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
