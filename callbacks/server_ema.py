"""An exponential moving average of the global model."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lightning_fedscale.core.lightning.trainer_state import forget_updates, place_average
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.utils import checks


class ServerEMA(WeightAveraging):
    r"""Averages the global model over rounds: :math:`\zeta \leftarrow \rho\,\zeta + (1 - \rho)\, x`.

    It begins with the model after the first round. Use it where the global model oscillates from round to round, as
    with few clients per round or with `fed_exp`. Validation uses the average, checkpoints hold both models, and after
    training the module holds the average, as with Lightning's own `EMAWeightAveraging`.

    A round of more clients moves further and is less noisy, so the average should forget more: with
    ``reference_clients``, a round of :math:`m` clients has the decay :math:`\rho^{m / m_0}`, the EMA scaling rule of
    arXiv 2307.13813 with clients instead of samples. Then ``decay`` need not change with ``clients_per_round``, and
    rounds of unequal size (Poisson sampling, drop-out) count in proportion. Scale the server's learning rate as well.

    Args:
        decay: :math:`\rho`, 0 to below 1; the average remembers about ``1 / (1 - decay)`` rounds.
        reference_clients: :math:`m_0`, the number of clients per round that ``decay`` is meant for; None applies
            ``decay`` to any number.
        device: device of the average; None is the model's.
        use_buffers: whether buffers are averaged too; integer ones are copied.

    Raises:
        TypeError: if an argument is not a number; when training starts, if the strategy is not a FederatedStrategy.
        ValueError: if an argument is out of range.

    Example:
        >>> ServerEMA(decay=0.99, reference_clients=10).decay_of(20)  # 0.99 ** 2
        0.9801
    """

    def __init__(
        self,
        decay: float = 0.99,
        reference_clients: int | None = None,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
    ) -> None:
        self._decay = checks.in_interval("decay", decay, 0.0, 1.0, closed_end=False)
        self._reference = None if reference_clients is None else checks.integer("reference_clients", reference_clients)
        self._decay_now = self._decay
        self._given_device = device
        super().__init__(device=device, use_buffers=use_buffers, avg_fn=self._average)

    def decay_of(self, clients: int) -> float:
        """Return the fraction of the average that a round of so many clients keeps."""
        return self._decay if self._reference is None else float(self._decay ** (clients / self._reference))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Create the average."""
        if stage == "fit" and not isinstance(trainer.strategy, FederatedStrategy):
            raise TypeError(
                f"ServerEMA averages over rounds, but strategy={type(trainer.strategy).__name__} has none: pass"
                " Trainer(strategy=FederatedStrategy(...)), or use Lightning's EMAWeightAveraging."
            )
        if trainer.global_step == 0:  # WeightAveraging continues the count of an earlier Trainer
            forget_updates(self)
        place_average(self, trainer.strategy.root_device if self._given_device is None else self._given_device)
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average with the global model of the round."""
        assert isinstance(trainer.strategy, FederatedStrategy)
        if (record := trainer.strategy.last_round) is not None:
            self._decay_now = self.decay_of(len(record.clients) - len(record.rejected))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _average(self, average: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        if not (average.is_floating_point() or average.is_complex()):
            return current
        return self._decay_now * average + (1 - self._decay_now) * current
