"""How the server moves the global model along the aggregated pseudo-gradient."""

from lightning_fedscale.server.base import ServerOptimizer, follows_scale, own_decay
from lightning_fedscale.server.fed_avg import fed_avg
from lightning_fedscale.server.torch_optimizer import from_torch

__all__ = ["ServerOptimizer", "fed_avg", "follows_scale", "from_torch", "own_decay"]
