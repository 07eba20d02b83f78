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
    if layer_sync:
        raise ValueError(
            "Trainer(sync_batchnorm=True): clients train independently, so they must not share batch statistics. Remove"
            " it; FederatedStrategy averages the buffers of BatchNorm after every round."
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"accelerator: FederatedStrategy runs on CPU and CUDA, not on {device.type!r}: use"
            " Trainer(accelerator='cpu')."
        )
    _check_module(trainer.lightning_module, processes)
    _check_clipping(trainer)
    _check_validation(trainer, rounds_per_epoch)
    _check_callbacks(trainer)


def _check_module(module: pl.LightningModule, processes: int) -> None:
    if any(nn.parameter.is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise ValueError(
            "the model has lazy layers whose parameters have no shape yet: run a forward pass on one batch in"
            " LightningModule.configure_model, so that all clients start from the same weights."
        )
    if next(module.parameters(), None) is None:
        raise ValueError(
            "the model has 0 parameters, so clients have nothing to train: assign its layers as attributes of the"
            " LightningModule."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "training_step(self, dataloader_iter) is not supported, since the strategy gives each client its batches:"
            " use training_step(self, batch, batch_idx)."
        )
    synced = [name for name, m in module.named_modules() if isinstance(m, Metric) and m.dist_sync_on_step]
    if synced and processes > 1:
        raise ValueError(
            f"metric {synced[0]!r} has dist_sync_on_step=True, but clients train independently and may take"
            " different numbers of steps: set it to False; it is still reduced over ranks at the epoch's end."
        )


def _check_clipping(trainer: pl.Trainer) -> None:
    module = trainer.lightning_module
    if not trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", module):
        return
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): the gradient of {name!r} is sparse, and torch"
                " cannot clip sparse gradients: pass sparse=False to this layer, or override"
                " configure_gradient_clipping."
            )


def _check_validation(trainer: pl.Trainer, rounds_per_epoch: int) -> None:
    # A Trainer that validates by time has no such attribute.
    every = getattr(trainer, "val_check_interval", None)
    within_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches
    if within_epoch and isinstance(every, int) and every > rounds_per_epoch:
        raise ValueError(
            f"Trainer(val_check_interval={every}) counts rounds within an epoch, and an epoch has {rounds_per_epoch}:"
            f" use FederatedStrategy(rounds_per_epoch={every}), or Trainer(check_val_every_n_epoch={every}) without it."
        )


def _check_callbacks(trainer: pl.Trainer) -> None:
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    if (foreign := next((c for c in callbacks if _is_of_other_package(c)), None)) is not None:
        raise TypeError(
            f"callbacks: {type(foreign).__name__} is not a Callback of {pl.__name__}, the package of this Trainer:"
            f" import it, or its base class, from {pl.__name__}."
        )
    if trainer.accumulate_grad_batches != 1 and any(is_really(c, GradientAccumulationScheduler) for c in callbacks):
        raise ValueError(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and the callback"
            " GradientAccumulationScheduler, which sets it in every epoch: remove one of them."
        )
    if any(is_really(callback, ThroughputMonitor) for callback in callbacks):
        raise ValueError(
            "callbacks: ThroughputMonitor counts one batch per step, but a step is a round here. Remove it;"
            " round/samples, round/local_steps and round/seconds are logged every round."
        )


def check_trainable(module: nn.Module) -> None:
    """Check that some parameter is trainable when a round begins, since callbacks freeze and unfreeze between rounds.

    Raises:
        ValueError: with the remedy.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"the model has {len(list(module.parameters()))} parameter tensors and none of them is trainable: set"
            " requires_grad=True for those that clients should train, before the round begins."
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
            "configure_optimizers returned no optimizer, so clients cannot train: return at least one, such as"
            " torch.optim.SGD(self.parameters(), lr=0.1)."
        )
    own = {id(parameter) for parameter in module.parameters()}
    held = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    if (foreign := next((p for p in held if id(p) not in own), None)) is not None:
        raise ValueError(
            f"configure_optimizers: an optimizer has a parameter of shape {tuple(foreign.shape)} that is not part"
            " of the model, so all clients would share it: assign its layer as an attribute of the LightningModule, or"
            " remove it from the optimizer."
        )


def check_loaders_and_schedulers(trainer: pl.Trainer) -> None:
    """Check loaders and schedulers just before the first round.

    Raises:
        ValueError: with the reason and the remedy.
    """
    for config in trainer.lr_scheduler_configs if trainer.lightning_module.automatic_optimization else ():
        if config.interval == "step" and config.frequency > trainer.num_training_batches:
            raise ValueError(
                f"configure_optimizers: a scheduler with interval='step' and frequency={config.frequency}"
                f" never steps, since it counts rounds within an epoch, and an epoch has"
                f" {trainer.num_training_batches}: use interval='epoch', or"
                f" FederatedStrategy(rounds_per_epoch={config.frequency})."
            )
    loader = combined_loader(trainer)
    if loader is not None and loader.iterables is not loader.flattened[0]:
        raise ValueError(
            f"train_dataloader: got a {type(loader.iterables).__name__} of {len(loader.flattened)} loaders,"
            " but FederatedStrategy divides one dataset among clients: return a single DataLoader, for example over"
            " torch.utils.data.ConcatDataset."
        )


def is_user_error(error: BaseException) -> bool:
    """Return whether this package or Lightning raised the error as a message; other errors need their traceback."""
    if isinstance(error, MisconfigurationException):
        return True
    return isinstance(error, (TypeError, ValueError)) and is_raised_in(error, "lightning_fedscale")
