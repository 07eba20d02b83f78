"""The tensors of the user's module: which of them are exchanged, and how they change over rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedscale.core.executors import (
    FrozenGuard,
    LargestClient,
    SharedTensors,
    can_watch,
    shared_tensors_of,
)
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.utils import collectives
from lightning_fedscale.utils.checks import enumerated


class ModuleTensors:
    """Makes a round's `SharedTensors`, and tracks its parameters and buffers over rounds.

    Args:
        trainer: the Trainer, which has the module.
        options: the strategy's checked arguments.

    Attributes:
        trained: the parameters that the last round moved, by name; None before the first one.
    """

    def __init__(self, trainer: pl.Trainer, options: Options) -> None:
        self._trainer = trainer
        self._options = options
        self._caches: set[str] = set()  # buffers that each rank keeps for itself
        self._warned: set[str] = set()  # buffers about which the user was warned
        self.trained: list[str] | None = None
        self._written: list[str] | None = []  # frozen parameters that training writes to; None for all
        self._watched: list[str] = []  # others, which no client wrote to in so many batches while it was watched
        self._watched_batches = 0

    def shared(self) -> SharedTensors:
        """Return the module's tensors as they are now."""
        algorithm, module = self._options.algorithm, self._trainer.lightning_module
        return shared_tensors_of(module, algorithm.personal, algorithm.buffer_policies, self._caches, self._written)

    def guard(self, shared: SharedTensors, round: int) -> FrozenGuard:
        """Return the guard of a round's frozen parameters; all clients are watched if these are others than before."""
        names = list(dict.fromkeys(binding.path for binding in shared.untouched))
        can = bool(names) and can_watch(self._trainer.lightning_module)
        before = self._watched_batches if names == self._watched else 0
        others = (binding.memory for binding in shared.bindings)
        return FrozenGuard(shared.untouched, others, round, watched_before=before, watches=can)

    def end_watch(self, shared: SharedTensors, batches: int) -> None:
        """Note that no client wrote to other frozen parameters than those in the vector.

        Args:
            shared: the module's tensors.
            batches: the largest number of batches of a client in this round.
        """
        names = list(dict.fromkeys(binding.path for binding in shared.untouched))
        self._watched_batches = max(batches, self._watched_batches if names == self._watched else 0)
        self._watched = names

    def written_on_any_rank(self, names: list[str]) -> list[str]:
        """Return the frozen parameters that clients of any rank wrote to; call it on all ranks."""
        of_ranks = collectives.gather_over_ranks(names, self._trainer.strategy.root_device)
        return list(dict.fromkeys(name for names in of_ranks for name in names))

    def add_written(self, names: list[str] | None, round: int) -> None:
        """Exchange these frozen parameters from now on, or all if there are no names."""
        assert self._written is not None
        names = list(dict.fromkeys(b.path for b in self.shared().untouched)) if names is None else names
        self._written += names
        rank_zero_warn(
            f"frozen parameters: {enumerated(names)} changed while clients trained in round {round}, which starts"
            " again: from now on they are exchanged, and the global model takes the mean over clients. Pass"
            f" FederatedStrategy(buffers={{{names[0]!r}: 'mean'}}) to exchange them from the start."
        )

    def state_of_frozen(self) -> dict[str, Any]:
        """Return which frozen parameters are exchanged, for a checkpoint."""
        return {"written": self._written, "watched": self._watched, "batches": self._watched_batches}

    def load_frozen(self, state: dict[str, Any] | None, *, has_vectors: bool) -> None:
        """Resume from a checkpoint.

        Args:
            state: the result of `state_of_frozen`; None in checkpoints of earlier versions.
            has_vectors: whether the checkpoint contains models as vectors, which in earlier versions had all of them.
        """
        if state is None:
            self._written = None if has_vectors else []
        else:
            self._written, self._watched, self._watched_batches = state["written"], state["watched"], state["batches"]

    def check_trained(self, shared: SharedTensors) -> None:
        """Reject other trainable parameters than in the round before if a state is kept for those.

        Raises:
            ValueError: the message names the argument and a parameter.
        """
        before, self.trained = self.trained, shared.names
        if before is None or before == shared.names:
            return
        downlink, options = self._options.downlink_compressor, self._options
        keeper = options.algorithm.bound_to_parameters
        if keeper is None and downlink is not None and downlink.stateful:
            keeper = f"downlink_compressor={downlink.name}"
        if keeper is None and options.asynchrony is not None:
            keeper = "mode='async'"
        if keeper is not None:
            one = min(set(before) ^ set(shared.names))
            raise ValueError(
                f"{keeper}: its state belongs to the {len(before)} parameters that were trainable in the previous"
                f" round, but {one!r} is {'trainable' if one in shared.names else 'frozen'} now: do not freeze or"
                " unfreeze layers with this argument."
            )

    def has_irregular_buffers(self, shared: SharedTensors, largest: LargestClient) -> bool:
        """Return whether buffers of this rank appeared, disappeared, or changed shape while clients trained."""
        new_caches = {*shared.irregular.caches()} - self._caches
        return bool(new_caches) or bool({*largest.values} - {*shared.largest})

    def of_largest(
        self, shared: SharedTensors, largest: LargestClient, rank: int | None, *, irregular: bool
    ) -> Mapping[str, Tensor | None]:
        """Return the buffers that are taken from the client with the most samples; call it on all ranks.

        Args:
            shared: the module's tensors.
            largest: this rank's client with the most samples.
            rank: the rank of the client with the most samples of all; None if there is none.
            irregular: whether any rank has irregular buffers.
        """
        device = self._trainer.strategy.root_device
        if irregular:
            for names in collectives.gather_over_ranks(shared.irregular.caches(), device):
                self._caches.update(names)
        if rank is None or not (shared.largest or irregular):
            return {}
        values: Mapping[str, Tensor | None] = collectives.broadcast(largest.values, rank, device)
        self._check_shapes([name for name in values if name not in shared.largest])
        return values

    def warn_of_averages(self, names: list[str]) -> None:
        """Warn, once for each buffer, that it is averaged: only the user knows whether that is right."""
        if new := self._not_warned(names):
            rank_zero_warn(
                f"buffers: {enumerated(new)} changed while clients trained, and the global model takes the mean over"
                " clients. This is right for a quantity, but wrong for a queue, a table or a flag: choose a policy with"
                f" FederatedStrategy(buffers={{{new[0]!r}: ...}}): 'mean'; 'largest' for the values of the client with"
                " the most samples; 'server' for values that do not change; 'client' for values that stay with each"
                " client. Give buffers that belong together, such as a queue and its pointer, the same policy."
            )

    def _check_shapes(self, names: list[str]) -> None:
        if new := self._not_warned(names):
            said = f"buffers: {enumerated(new)} appeared, disappeared or changed shape while a client trained"
            if self._options.asynchrony is not None or self._options.algorithm.ditto is not None:
                raise ValueError(
                    f"{said}, which mode='async' and local_rules.Ditto do not support: pass"
                    f" FederatedStrategy(buffers={{{new[0]!r}: 'server'}}) or 'client', or keep one shape."
                )
            rank_zero_warn(
                f"{said}, so there is no mean: the global model takes the values of the client with the most samples."
                f" Pass FederatedStrategy(buffers={{{new[0]!r}: 'client'}}) to keep them with each client."
            )

    def _not_warned(self, names: list[str]) -> list[str]:
        new = [name for name in names if name not in self._warned]
        self._warned.update(new)
        return new
