"""A model of its own for every client."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_fedscale.local_rules.base import Correction
from lightning_fedscale.utils import checks


class Ditto:
    r"""Every client also trains a personal model :math:`v_k` that stays near the global one (arXiv 2012.04221).

    For ``FederatedStrategy(personal=Ditto(strength))``. In a round that a client takes part in, it trains the global
    model :math:`x` as ever, and then once more, over the same batches, its own:
    :math:`v \leftarrow v - \eta (\nabla f_k(v) + \lambda (v - x))`, from where the last time left it; at first from
    :math:`x`. That doubles the computing and sends nothing. What is logged is of the global model's training;
    `ClientMetrics(personal=True)` evaluates the personal ones.

    Args:
        strength: :math:`\lambda`; 0 trains each client for itself. The paper tries 0.05 to 2.

    Raises:
        TypeError, ValueError: if it is no number of at least 0.

    Example:
        >>> import torch
        >>> own, shared = torch.tensor([3.0]), torch.tensor([1.0])
        >>> Ditto(0.5).correction(own, shared)  # 0.5 (v - 1) = 0.5 (3 - 1) + 0.5 (v - 3)
        Correction(shift=tensor([1.]), proximal=0.5)
    """

    def __init__(self, strength: float = 0.1) -> None:
        remedy = "pass a number of at least 0, such as 0.1."
        self.strength = checks.number("strength", strength, remedy, lambda number: 0 <= number < math.inf)

    def correction(self, start: Tensor, server: Tensor) -> Correction:
        """What is added to the gradients of a personal model.

        Args:
            start: the personal model that training begins with.
            server: the global model, a vector as long.
        """
        # A correction pulls towards where training began; the shift moves that to the global model.
        return Correction(self.strength * (start - server), self.strength)

    def __repr__(self) -> str:
        return f"Ditto({self.strength:g})"
