"""Ditto: one personal model for every client."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_fedscale.local_rules.base import Correction
from lightning_fedscale.utils import checks


class Ditto:
    r"""Every client also trains a personal model :math:`v_k` that stays near the global one (arXiv 2012.04221).

    Use it as ``FederatedStrategy(personal=Ditto(strength))``. In each of its rounds a client trains the global model
    :math:`x` as usual, and then its personal model over the same batches:
    :math:`v \leftarrow v - \eta (\nabla f_k(v) + \lambda (v - x))`, starting from its last value, or from :math:`x` in
    the first round. This doubles compute and sends nothing. Logged values come from the training of the global model;
    `ClientMetrics(personal=True)` evaluates the personal models.

    Args:
        strength: :math:`\lambda`; with 0 each client trains alone. The paper tries 0.05 to 2.

    Raises:
        TypeError, ValueError: if it is not a number >= 0.

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
        """Return the correction of a personal model's gradients.

        Args:
            start: the personal model at the start of training.
            server: the global model, a vector of the same length.
        """
        # A correction pulls towards the start of training; the shift changes this to the global model.
        return Correction(self.strength * (start - server), self.strength)

    def __repr__(self) -> str:
        return f"Ditto({self.strength:g})"
