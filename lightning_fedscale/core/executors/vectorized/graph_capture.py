"""Capture of a vectorized step, and its replay without Python, autograd and vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_fedscale.core.executors.vectorized.rng import ClientStreams, draw_per_client, is_random
from lightning_fedscale.core.lightning.module_state import attach, attached_trainer
from lightning_fedscale.utils import randomness

Flat = Callable[..., list[Tensor | None]]


class CapturedStep:
    """The tensor operations of a function, which can be replayed on tensors of the same shapes.

    A replay runs the same operators in the same order, so results are bit-identical; random numbers are drawn from the
    clients' own streams. Everything that the function does in Python is frozen: see `hide_trainer`.

    Args:
        function: maps tensors to tensors.
        tensors: an example; the function may write to it.
        device: where random numbers are drawn.
    """

    def __init__(self, function: Flat, tensors: Sequence[Tensor], device: torch.device) -> None:
        outside = randomness.capture(device)
        try:
            graph = make_fx(function)(*tensors)
        finally:
            randomness.restore(outside, device)
        self._streams: ClientStreams
        self._clients: Sequence[int] = ()
        self._simplify(graph)
        self._graph = graph

    def replay(self, tensors: Sequence[Tensor], streams: ClientStreams, clients: Sequence[int]) -> list[Tensor | None]:
        """Return the function's results for other tensors.

        Args:
            tensors: with the example's shapes.
            streams: the clients' random streams.
            clients: the clients of the rows.
        """
        self._streams, self._clients = streams, clients
        with torch.no_grad():
            results: list[Tensor | None] = self._graph.forward(*tensors)
        return results

    def improve(self, is_same: Callable[[], bool]) -> None:
        """Compute (AB)' as B'A' where results are bit-identical, so that gradients have the parameters' memory layout.

        Args:
            is_same: returns whether a replay still gives the expected result.
        """
        graph = self._graph.graph
        for node in [node for node in graph.nodes if _is_turned_product(node)]:
            product: Any = node.args[0]
            before = node.target, node.args
            with graph.inserting_before(node):
                turned = tuple(graph.call_function(_ATEN.transpose.int, (p, 1, 2)) for p in reversed(product.args))
            node.target, node.args = _ATEN.bmm.default, turned
            self._graph.recompile()
            if not is_same():
                node.target, node.args = before
        graph.eliminate_dead_code()
        self._graph.recompile()

    def _draw(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return draw_per_client(self._streams, self._clients, func, *args, **kwargs)

    def _simplify(self, module: GraphModule) -> None:
        """Remove operations without effect, and draw each client's random numbers from its own stream."""
        graph = module.graph
        for node in list(graph.nodes):
            if _is_identity(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        if not any(map(_is_mutable, graph.nodes)):
            module.graph = graph = fx_graph_cse(graph)
        for node in list(graph.nodes):
            if is_random(node.target, node.args, node.kwargs):
                node.args = (node.target, *node.args)
                node.target = self._draw
        graph.eliminate_dead_code()
        module.recompile()


_ATEN = torch.ops.aten


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_identity(node: Node) -> bool:
    if node.target is _ATEN.detach.default:
        return True
    if node.target in (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.expand.default):
        return bool(node.meta["val"].shape == node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    # vmap makes alpha=1 and beta=1 of a matrix product explicit multiplications.
    return node.target is _ATEN.mul.Scalar and type(node.args[1]) is int and node.args[1] == 1


def _is_turned_product(node: Node) -> bool:
    if node.target is not _ATEN.transpose.int or set(node.args[1:]) != {1, 2}:
        return False
    return node.args[0].target is _ATEN.bmm.default  # type: ignore[union-attr]


class TrainerAccessed(Exception):
    """Raised when a step reads something that a captured step cannot follow."""


class _Inaccessible:
    """A placeholder that must not be read."""

    def __getattr__(self, name: str) -> Any:
        raise TrainerAccessed(name)

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise TrainerAccessed

    __eq__ = __ne__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = _raise


@contextmanager
def hide_trainer(module: pl.LightningModule) -> Iterator[Any]:
    """Hide the Trainer from the module inside the context; yield an object that can be passed on but not used.

    A step that reads, for example, the epoch or the number of its batch depends on it and must not be captured.
    """
    nothing = _Inaccessible()
    trainer = attached_trainer(module)
    attach(module, nothing)
    try:
        yield nothing
    finally:
        attach(module, trainer)
