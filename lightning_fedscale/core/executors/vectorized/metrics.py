"""Metrics of torchmetrics in vectorized steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torchmetrics import Metric, MetricCollection


class MetricsPerClient:
    """Lets the metrics of a module be called in vectorized steps, once for each client.

    Args:
        module: the user's module.
        on_call: called when a metric is given values of many clients.
    """

    def __init__(self, module: nn.Module, on_call: Callable[[], None]) -> None:
        self._on_call = on_call
        members = {
            id(metric)
            for part in module.modules()
            if isinstance(part, MetricCollection)
            for metric in part.modules()
            if metric is not part
        }
        self._metrics: list[Metric | MetricCollection] = [
            part for part in module.modules() if isinstance(part, Metric | MetricCollection) and id(part) not in members
        ]

    @contextmanager
    def called_in_turn(self) -> Iterator[None]:
        """Call a metric that is given values of many clients once for each of them, inside the context."""
        patched: list[tuple[Any, str, Any]] = []
        for metric in self._metrics:
            for name in ("forward", "update"):
                original = getattr(metric, name)
                patched.append((metric, name, vars(metric).get(name, patched)))
                object.__setattr__(metric, name, _ForEachClient(original, self._on_call))
        try:
            yield
        finally:
            for metric, name, before in patched:
                if before is patched:
                    object.__delattr__(metric, name)
                else:
                    object.__setattr__(metric, name, before)


class _ForEachClient:
    """A metric's method that is called for each client in turn if given values of many clients."""

    def __init__(self, method: Callable[..., Any], on_call: Callable[[], None]) -> None:
        self._method = method
        self._on_call = on_call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
            return self._method(*args, **kwargs)
        self._on_call()
        forms: list[TreeSpec] = []

        def call_once(tensors: Sequence[Tensor]) -> list[Tensor]:
            given = iter(tensors)
            own = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            own_args, own_kwargs = tree_unflatten(own, spec)
            values, form = tree_flatten(self._method(*own_args, **own_kwargs))
            forms.append(form)
            # A function of tensors must return a tensor, but `update` returns None.
            return [torch.zeros(()) if value is None else torch.as_tensor(value) for value in values]

        results = _PerClientCall.apply(call_once, *tensors)  # type: ignore[no-untyped-call]
        return tree_unflatten(list(results), forms[0])


class _PerClientCall(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[[Sequence[Tensor]], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        rows = [
            function([t if dim is None else t.select(dim, row) for t, dim in zip(tensors, in_dims[1:], strict=True)])
            for row in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return stacked, (0,) * len(stacked)
