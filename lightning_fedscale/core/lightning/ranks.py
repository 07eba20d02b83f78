"""The ranks of a federation, and the collectives between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fedscale.core.lightning.handover import ReusableStrategy
from lightning_fedscale.utils import randomness


class RankStrategy(ReusableStrategy):
    """DDP's ranks and collectives as clients need them.

    A single process is rank 0 of 1, whatever the environment variables of a job say. All ranks begin with the random
    state of rank 0. While a client trains, its module's collectives involve no other rank.
    """

    @property
    def _in_client(self) -> bool:
        """Whether a client trains; a subclass with clients overrides this."""
        return False

    @property
    def global_rank(self) -> int:
        """Number of this process among all."""
        return super().global_rank if self._processes > 1 else 0

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return super().local_rank if self._processes > 1 else 0

    @property
    def node_rank(self) -> int:
        """Number of this process's machine."""
        return super().node_rank if self._processes > 1 else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return super().world_size if self._processes > 1 else 1

    def setup_distributed(self) -> None:
        """Join the other ranks, if there are any, and take rank 0's random state."""
        if self._processes == 1:
            self.set_world_ranks()
            return
        # DDP would seed again with the last `seed_everything`. Here all ranks take the generators' state of rank 0,
        # which is that of a single process.
        drawn = randomness.capture(self.root_device)
        super().setup_distributed()
        randomness.restore(self.broadcast(drawn), self.root_device)

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over ranks; inside a client, return the client's own value."""
        if self._in_client:
            return tensor
        if reduce_op in ("mean", "avg") and isinstance(tensor, Tensor) and not tensor.dtype.is_floating_point:
            # Lightning rounds the mean of integers down, including the batch sizes by which it divides values logged
            # in an epoch. Here ranks have different numbers of samples, so the mean is rarely an integer.
            tensor = tensor.to(torch.get_default_dtype())
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over ranks; inside a client, return the client's own value."""
        return tensor if self._in_client else super().all_gather(tensor, group, sync_grads)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; inside a client, do not wait."""
        if not self._in_client:
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast over ranks; inside a client, return the client's own value."""
        return obj if self._in_client else super().broadcast(obj, src)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decide over ranks; inside a client, return the client's own decision."""
        return decision if self._in_client else super().reduce_boolean_decision(decision, all)
