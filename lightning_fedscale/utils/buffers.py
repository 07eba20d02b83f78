"""Policies for a module's buffers at the end of a round, by kind or by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_fedscale.utils import checks

Policy: TypeAlias = Literal["mean", "server", "largest", "client"]
"""Policies of a buffer: the clients' mean; the server's unchanged value; the value of the client with the most samples;
or one value per client."""

FITTED = "fitted"
"""Policy of buffers that are computed from the weights, and so computed again from the server's new weights."""

_TIMES = 50  # power iterations, each of which costs two products of a matrix and a vector


class Kind(NamedTuple):
    """The policy of a buffer.

    Attributes:
        policy: one of `Policy`, or `FITTED`.
        sure: False for a float buffer whose mean may be meaningless.
    """

    policy: str
    sure: bool = True


class BufferPolicies(NamedTuple):
    """The policies of all buffers.

    Attributes:
        by_name: patterns of names with their policies; the first match applies.
        sums_only: the server may not learn anything about single clients, so it cannot take the buffers of one.
        parameters_only: only parameters may leave the clients.
    """

    by_name: tuple[tuple[str, Policy], ...] = ()
    sums_only: bool = False
    parameters_only: bool = False

    def with_personal(self, patterns: Iterable[str]) -> BufferPolicies:
        """Return a copy in which buffers whose names match stay with each client."""
        return self._replace(by_name=(*((pattern, "client") for pattern in patterns), *self.by_name))

    def chosen(self, names: Iterable[str]) -> Policy | None:
        """Return the user's policy for a buffer with these names; None if there is none."""
        matching = (p for pattern, p in self.by_name if any(fnmatchcase(name, pattern) for name in names))
        return next(matching, None)

    def kind(self, names: Iterable[str], owner: nn.Module, name: str, buffer: Tensor, fitted: bool) -> Kind:
        """Return the policy of a buffer.

        Args:
            names: all its names in the module.
            owner: the submodule that owns it.
            name: its name in that submodule.
            buffer: its tensor.
            fitted: whether it belongs to a parametrization, or to a hook that computes a weight.
        """
        chosen = self.chosen(names)
        kind = Kind(chosen) if chosen is not None else _by_default(owner, name, buffer, fitted)
        hidden = (self.sums_only and kind.policy == "largest") or (
            self.parameters_only and kind.policy in ("largest", "mean")
        )
        return Kind("server") if hidden else kind


def _by_default(owner: nn.Module, name: str, buffer: Tensor, fitted: bool) -> Kind:
    if name == "num_batches_tracked":
        return Kind("mean")
    if not (buffer.is_floating_point() or buffer.is_complex()):
        return Kind("largest")
    if fitted:
        return Kind(FITTED)
    return Kind("mean", sure=isinstance(owner, _NormBase) or name.startswith("running_"))


def checked(value: object) -> tuple[tuple[str, Policy], ...]:
    """Return the user's argument ``buffers`` as pairs of pattern and policy.

    Raises:
        TypeError: if it is not a dict of strings.
        ValueError: if a policy is unknown.

    Example:
        >>> checked({"queue*": "largest"})
        (('queue*', 'largest'),)
        >>> checked({"queue*": "average"})
        Traceback (most recent call last):
        ...
        ValueError: buffers['queue*']='average': pass one of 'mean', 'server', 'largest', 'client'.
    """
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(
            f"buffers={value!r}: pass a dict from patterns of names to policies, such as {{'queue*': 'largest'}}."
        )
    for pattern, policy in value.items():
        checks.one_of(f"buffers[{pattern!r}]", policy, get_args(Policy))
    return tuple(value.items())


class Fit(NamedTuple):
    """A weight that is computed from other weights and from buffers, which each computation in training updates.

    Attributes:
        compute: computes the weight once.
        buffers: the buffers that belong to it.
    """

    compute: Callable[[], object]
    buffers: list[Tensor]


def fits_of(owner: nn.Module) -> Iterator[Fit]:
    """Yield the weights of this submodule that are computed from other weights and buffers."""
    if "parametrizations" in owner._modules:
        for name, parametrization in owner.get_submodule("parametrizations").named_children():
            if isinstance(parametrization, ParametrizationList) and (buffers := list(parametrization.buffers())):
                yield Fit(partial(getattr, owner, name), buffers)
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            vectors = [owner._buffers[f"{hook.name}_{vector}"] for vector in "uv"]
            yield Fit(partial(hook.compute_weight, owner, owner.training), [v for v in vectors if v is not None])


@torch.no_grad()
def refit(fits: Iterable[Fit]) -> None:
    """Update the vectors after a change of the weights."""
    for fit in fits:
        others = [(b, b.clone()) for b in fit.buffers if not b.is_floating_point() and not b.is_complex()]
        for _ in range(_TIMES):
            fit.compute()
        for buffer, value in others:
            buffer.copy_(value)


DEFAULTS = BufferPolicies()
