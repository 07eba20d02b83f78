"""The curves of `ComputeAccounting` in TensorBoard: loss against compute."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedscale.core.lightning.loggers import Layout, lay_out, writers
from lightning_fedscale.scaling import Position

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_UNITS = {1.0: "FLOPs", 1e3: "kFLOPs", 1e6: "MFLOPs", 1e9: "GFLOPs", 1e12: "TFLOPs", 1e15: "PFLOPs", 1e18: "EFLOPs"}
_FINEST = 100
"""The first point of the compute axis is at this step or later; steps are integers."""


class ComputeCurves:
    """The run's loss against compute, and in a sibling run ``predicted_optimal`` the predicted loss of the best size.

    Attributes:
        unit: FLOPs per step of the axis; 0 before the first point.
    """

    def __init__(self) -> None:
        self.unit = 0.0
        self._sibling: SummaryWriter | None = None
        self._begun = self._warned = False

    @property
    def tag(self) -> str:
        """The tag of both curves."""
        return f"compute/loss_by_{_UNITS[self.unit]}"

    def _begin(self, trainer: pl.Trainer, flops: float) -> None:
        """Choose the unit and lay out TensorBoard's charts."""
        if not self.unit:
            self.unit = max((unit for unit in _UNITS if flops / unit >= _FINEST), default=1.0)
        layout: Layout = {
            "ComputeAccounting": {
                "loss against compute": ["Multiline", [f"{self.tag}$"]],
                "parameters in the optimal band": [
                    "Margin", ["compute/params_by_law", "compute/optimal_params_low", "compute/optimal_params_high"],
                ],
                "size ratio": ["Multiline", ["compute/size_ratio$"]],
            }
        }  # fmt: skip
        lay_out(trainer, layout)

    def add(self, trainer: pl.Trainer, flops: float, loss: float | None, position: Position | None) -> None:
        """Add a point to each curve.

        Args:
            trainer: the Trainer.
            flops: FLOPs spent so far.
            loss: loss of the step or round, None if it has none.
            position: position under the law.
        """
        if not self._begun:
            self._begin(trainer, flops)
            self._begun = True
        at = int(flops / self.unit)
        if loss is not None and not math.isfinite(loss):
            if not self._warned:
                rank_zero_warn(
                    f"ComputeAccounting: the loss is {loss}, and is left out of the curve of loss against compute."
                )
            self._warned = True
        elif loss is not None:
            for writer in writers(trainer, "add_scalar"):
                writer.add_scalar(self.tag, loss, at)
        if position is not None and math.isfinite(position.optimal_loss):
            for writer in writers(trainer, "add_scalar"):
                if self._sibling is None:
                    from torch.utils.tensorboard import SummaryWriter  # only when needed, since it takes long

                    self._sibling = SummaryWriter(f"{writer.log_dir}/predicted_optimal")
                self._sibling.add_scalar(self.tag, position.optimal_loss, at)
                break

    def close(self) -> None:
        """Close the writer of the sibling run."""
        if self._sibling is not None:
            self._sibling.close()
        self._sibling = None
