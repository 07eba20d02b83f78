"""Which of a module's tensors server and clients exchange."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedscale.tree import FlatView
from lightning_fedscale.types import Params


class Exchange(NamedTuple):
    """The exchanged tensors of a module at the start of a round.

    Attributes:
        view: all of them as one vector.
        names: names of the trainable parameters, in the vector's order.
        message_bytes: size of what a client sends: trainable parameters and buffers, in their own precision. Frozen
            parameters are carried along (some modules write to them) but do not travel.
    """

    view: FlatView
    names: list[str]
    message_bytes: int

    def named(self, vector: Tensor) -> Params:
        """The trainable part of ``vector`` by parameter name, without a copy."""
        views = self.view.views(vector)[: len(self.names)]
        return dict(zip(self.names, views, strict=True))


def exchange_of(module: nn.Module) -> Exchange:
    """Parameters and buffers of ``module``, without those of torchmetrics, whose state Lightning looks after.

    Read anew every round: callbacks freeze and unfreeze parameters, pruning replaces them.
    """
    metrics = {
        id(tensor)
        for part in module.modules()
        if isinstance(part, Metric)
        for tensor in (*part.parameters(), *part.buffers())
    }
    parameters = {name: p for name, p in module.named_parameters() if id(p) not in metrics}
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    buffers = [b for b in module.buffers() if id(b) not in metrics]
    return Exchange(
        FlatView(list(trainable.values()), [*buffers, *frozen]),
        list(trainable),
        sum(t.numel() * t.element_size() for t in (*trainable.values(), *buffers)),
    )
