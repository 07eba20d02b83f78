"""The global models of earlier rounds from which clients still train, in asynchronous training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_fedscale.core.plan import RoundPlan
from lightning_fedscale.server.asynchrony import FedBuff
from lightning_fedscale.utils.flat_view import FlatView


class StaleModels:
    """Keeps each model as long as a client trains from it.

    Args:
        asynchrony: scales updates that arrive late; None if rounds wait for all clients.
    """

    def __init__(self, asynchrony: FedBuff | None) -> None:
        self._asynchrony = asynchrony
        self._models: dict[int, Tensor] = {}  # by the round that began with them

    def starts(self, plan: RoundPlan) -> dict[int, Tensor]:
        """Return the models of the round's clients that started from an earlier one, by client."""
        return {client: self._models[version] for client, version in _late(plan)}

    def scales(self, plan: RoundPlan) -> dict[int, float]:
        """Return the factors that scale the updates of these clients, by client."""
        if self._asynchrony is None:
            return {}
        return {client: self._asynchrony.scale(plan.round - version) for client, version in _late(plan)}

    def keep(self, plan: RoundPlan, server: Callable[[], Tensor]) -> None:
        """Keep the model that a complete round began with, and drop models that no client needs any more."""
        if plan.buffered is not None:
            self._models[plan.round] = server()
            oldest = plan.buffered.waiting
            self._models = {round: model for round, model in self._models.items() if round >= oldest}

    def complete(self, view: FlatView) -> None:
        """Add tensors that are exchanged from now on to the models, as the module holds them."""
        self._models = {round: view.completed(model) for round, model in self._models.items()}

    def state_dict(self) -> dict[int, Tensor]:
        """Return the models, by round."""
        return self._models

    def load_state_dict(self, state: dict[int, Tensor], device: torch.device) -> None:
        """Resume from saved models."""
        self._models = {round: model.to(device) for round, model in state.items()}


def _late(plan: RoundPlan) -> list[tuple[int, int]]:
    """Return the clients that started from an older model, each with that model's round."""
    if plan.buffered is None:
        return []
    pairs = zip(plan.buffered.clients.tolist(), plan.buffered.versions.tolist(), strict=True)
    return [(client, version) for client, version in pairs if version < plan.round]
