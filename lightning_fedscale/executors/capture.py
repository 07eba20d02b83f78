"""A step of many clients recorded once and replayed, without Python, autograd and vmap in between."""

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

from lightning_fedscale import randomness
from lightning_fedscale.executors.draws import ClientStreams, draw_per_client, is_random

Flat = Callable[..., list[Tensor | None]]


class Recording:
    """The tensor operations of a function, replayable on tensors of the same shapes.

    Replaying runs the same operators in the same order, so the results are the same bits; what they draw comes from
    the clients' own streams. Everything that the function does in Python is frozen: see `unseen`.

    Args:
        function: from tensors to tensors.
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
        """The function's results for other tensors.

        Args:
            tensors: of the example's shapes.
            streams: the clients' random streams.
            clients: which clients the rows stand for.
        """
        self._streams, self._clients = streams, clients
        with torch.no_grad():
            results: list[Tensor | None] = self._graph.forward(*tensors)
        return results

    def _draw(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return draw_per_client(self._streams, self._clients, func, *args, **kwargs)

    def _simplify(self, module: GraphModule) -> None:
        """Leave out what changes nothing, and draw each client's random numbers from its own stream."""
        graph = module.graph
        mutates = False
        for node in list(graph.nodes):
            mutates |= node.op == "call_function" and _is_mutable(node)
            if _is_identity(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        if not mutates:
            module.graph = graph = fx_graph_cse(graph)
        for node in list(graph.nodes):
            if node.op == "call_function" and is_random(node.target):
                node.args = (node.target, *node.args)
                node.target = self._draw
        graph.eliminate_dead_code()
        module.recompile()


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_identity(node: Node) -> bool:
    aten = torch.ops.aten
    if node.target is aten.detach.default:
        return True
    # vmap writes alpha=1 and beta=1 of a matrix product out.
    return node.target is aten.mul.Scalar and type(node.args[1]) is int and node.args[1] == 1


class Seen(Exception):
    """Something was read that a recording cannot follow."""


class _Unseen:
    """Stands where nothing may be read."""

    def __getattr__(self, name: str) -> Any:
        raise Seen(name)

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise Seen

    __eq__ = __ne__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = _raise


@contextmanager
def unseen(module: pl.LightningModule) -> Iterator[Any]:
    """While active the module cannot see its Trainer; gives an object that can be handed on but not used.

    A step that reads the epoch, say, or the number of its batch changes with them and must not be recorded.
    """
    nothing = _Unseen()
    trainer = module._trainer
    object.__setattr__(module, "_trainer", nothing)
    try:
        yield nothing
    finally:
        object.__setattr__(module, "_trainer", trainer)
