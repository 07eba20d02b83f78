"""Checks for everything that `FederatedStrategy` does not support; errors give the reason and the remedy."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ThroughputMonitor
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_fedscale.core.lightning.data_loaders import combined_loader
from lightning_fedscale.core.lightning.module_state import is_no_optimizer
from lightning_fedscale.utils.foreign import is_raised_in, is_really

_OURS = {"lightning.pytorch": "lightning_fedscale", "pytorch_lightning": "lightning_fedscale.pytorch_lightning"}
"""Our package for each of Lightning's two packages, which cannot be mixed."""


def of_package(name: str, room: str = "") -> str:
    """Return a message for one of our objects in a Trainer of Lightning's other package.

    Example:
        >>> print(of_package("MaxBatchProbe", ".callbacks"))
        MaxBatchProbe is for lightning.pytorch; for pytorch_lightning import it from
        lightning_fedscale.pytorch_lightning.callbacks
    """
    other = next(package for package in _OURS if package != pl.__name__)
    return f"{name} is for {pl.__name__}; for {other} import it from {_OURS[other]}{room}"


def check_package(callback: pl.Callback, trainer: pl.Trainer) -> None:
    """Check that one of our callbacks is for the Trainer's package.

    Raises:
        TypeError: with the remedy.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(f"callbacks: {of_package(type(callback).__name__, '.callbacks')}.")


def check_fit(
    trainer: pl.Trainer, *, device: torch.device, processes: int, layer_sync: bool, rounds_per_epoch: int
) -> None:
    """Check Trainer and module before anything is built.

    Args:
        trainer: the Trainer, about to fit.
        device: this process's device.
        processes: number of ranks.
        layer_sync: whether synchronised BatchNorm is requested.
        rounds_per_epoch: the strategy's argument.

    Raises:
        TypeError: for a callback of Lightning's other package.
        ValueError: with the reason and the remedy.
    """
    module = trainer.lightning_module
    if layer_sync:
        raise ValueError(
            "Trainer(sync_batchnorm=True): clients are independent, their batch statistics must not be shared while"
            " they train. Remove it; FederatedStrategy averages BatchNorm buffers after every round."
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"accelerator: FederatedStrategy runs on CPU and CUDA, not on {device.type!r}: use"
            " Trainer(accelerator='cpu')."
        )
    if any(nn.parameter.is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise ValueError(
            "the model has lazy layers whose parameters have no shape yet: run a forward pass on one batch in"
            " LightningModule.configure_model, so that all clients start from the same weights."
        )
    if next(module.parameters(), None) is None:
        raise ValueError(
            "the model has 0 parameter tensors to train, so clients learn nothing: give it layers as attributes."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "training_step(self, dataloader_iter) is not supported: clients are fed batch by batch. Use"
            " training_step(self, batch, batch_idx)."
        )
    if trainer.gradient_clip_val and not is_overridden("configure_gradient_clipping", module):
        kinds = (nn.Embedding, nn.EmbeddingBag)
        if (
            name := next((n for n, m in module.named_modules() if isinstance(m, kinds) and m.sparse), None)
        ) is not None:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): the gradient of {name!r} is sparse, and torch"
                " clips none that is: pass sparse=False to it, or clip in your own configure_gradient_clipping."
            )
    # A Trainer that validates by time has no such attribute.
    every, epoch = getattr(trainer, "val_check_interval", None), rounds_per_epoch
    if (
        isinstance(every, int)
        and every > epoch
        and trainer.check_val_every_n_epoch is not None
        and trainer.limit_val_batches
    ):
        raise ValueError(
            f"Trainer(val_check_interval={every}) counts rounds within an epoch, and an epoch has {epoch}: use"
            f" FederatedStrategy(rounds_per_epoch={every}), or Trainer(check_val_every_n_epoch={every}) without it."
        )
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    if (foreign := next((c for c in callbacks if _is_of_other_package(c)), None)) is not None:
        raise TypeError(
            f"callbacks: {type(foreign).__name__} is no Callback of {pl.__name__}, which this Trainer is of: import it"
            " (or what it is made from) from there."
        )
    if trainer.accumulate_grad_batches != 1 and any(is_really(c, GradientAccumulationScheduler) for c in callbacks):
        raise ValueError(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and the callback"
            " GradientAccumulationScheduler, which sets it for every epoch: remove one of them."
        )
    if any(is_really(callback, ThroughputMonitor) for callback in callbacks):
        raise ValueError(
            "callbacks: ThroughputMonitor counts one batch per step, but a step is a round here. Remove it;"
            " round/samples, round/local_steps and round/seconds are logged every round."
        )
    synced = [name for name, m in module.named_modules() if isinstance(m, Metric) and m.dist_sync_on_step]
    if synced and processes > 1:
        raise ValueError(
            f"metric {synced[0]!r} has dist_sync_on_step=True, but clients train independently and may take"
            " different numbers of steps: set it to False; it is still reduced over ranks at the epoch's end."
        )


def check_trainable(module: nn.Module) -> None:
    """Check that some parameter is trainable when a round begins, since callbacks freeze and unfreeze between rounds.

    Raises:
        ValueError: with the remedy.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"the model has {len(list(module.parameters()))} parameter tensors and none is trainable, so clients have"
            " nothing to learn: set requires_grad=True for those that should train, before the round begins."
        )


def _is_of_other_package(callback: object) -> bool:
    """Return whether it is a Callback of Lightning's other package; objects that only act as one, as mocks do, pass."""
    packages = {name.partition(".")[0] for name in _OURS}
    return not isinstance(callback, pl.Callback) and any(
        kind.__name__ == "Callback" and kind.__module__.partition(".")[0] in packages for kind in type(callback).__mro__
    )


def check_optimizers(module: pl.LightningModule, optimizers: list[Optimizer]) -> None:
    """Check the result of ``configure_optimizers``.

    Raises:
        ValueError: with the reason and the remedy.
    """
    if not optimizers or any(map(is_no_optimizer, optimizers)):
        raise ValueError(
            "configure_optimizers returned no optimizer, so clients could not train: return at least one, such as"
            " torch.optim.SGD(self.parameters(), lr=0.1)."
        )
    own = {id(parameter) for parameter in module.parameters()}
    held = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    if (foreign := next((p for p in held if id(p) not in own), None)) is not None:
        raise ValueError(
            f"configure_optimizers: an optimizer holds a parameter of shape {tuple(foreign.shape)} that is not one"
            " of the model's, so it would pass from client to client: assign its layer as an attribute of the"
            " LightningModule, or keep it out of the optimizer."
        )


def check_loaders_and_schedulers(trainer: pl.Trainer) -> None:
    """Check loaders and schedulers just before the first round.

    Raises:
        ValueError: with the reason and the remedy.
    """
    for config in trainer.lr_scheduler_configs if trainer.lightning_module.automatic_optimization else ():
        if config.interval == "step" and config.frequency > trainer.num_training_batches:
            raise ValueError(
                f"configure_optimizers: a scheduler with interval='step' and frequency={config.frequency} would"
                f" never step, since Lightning counts from the epoch's start and an epoch has"
                f" {trainer.num_training_batches} round(s): use interval='epoch', or"
                f" FederatedStrategy(rounds_per_epoch={config.frequency})."
            )
    loader = combined_loader(trainer)
    if loader is not None and loader.iterables is not loader.flattened[0]:
        raise ValueError(
            f"train_dataloader: got a {type(loader.iterables).__name__} of {len(loader.flattened)} loaders,"
            " FederatedStrategy divides one dataset among clients: return a single DataLoader, for example over"
            " torch.utils.data.ConcatDataset."
        )


def is_user_error(error: BaseException) -> bool:
    """Return whether this package or Lightning raised the error as a message; other errors need their traceback."""
    if isinstance(error, MisconfigurationException):
        return True
    return isinstance(error, (TypeError, ValueError)) and is_raised_in(error, "lightning_fedscale")
