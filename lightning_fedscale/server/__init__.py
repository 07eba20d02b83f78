"""Server optimizers, which move the global model along the aggregated pseudo-gradient."""

from lightning_fedscale.server.adaptive import (
    fed_adagrad,
    fed_adam,
    fed_yogi,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_yogi,
)
from lightning_fedscale.server.base import ServerOptimizer, follows_scale, own_decay
from lightning_fedscale.server.chain import chain
from lightning_fedscale.server.fed_avg import fed_avg, fed_avgm, nesterov
from lightning_fedscale.server.fed_exp import fed_exp
from lightning_fedscale.server.momentum import trace
from lightning_fedscale.server.per_parameter import per_parameter
from lightning_fedscale.server.registry import FACTORIES, by_name
from lightning_fedscale.server.scale import scale
from lightning_fedscale.server.scheduled import scheduled
from lightning_fedscale.server.torch_optimizer import from_torch

__all__ = [
    "FACTORIES",
    "ServerOptimizer",
    "by_name",
    "chain",
    "fed_adagrad",
    "fed_adam",
    "fed_avg",
    "fed_avgm",
    "fed_exp",
    "fed_yogi",
    "follows_scale",
    "from_torch",
    "nesterov",
    "own_decay",
    "per_parameter",
    "scale",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_yogi",
    "scheduled",
    "trace",
]
