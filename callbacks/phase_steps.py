"""How `CriticalPhase` sees and changes the steps of an optimizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale import collectives, randomness
from lightning_fedscale.callbacks.phase_gradients import NOT_SEEN, AfterClipping, gradients_of, layer_norms
from lightning_fedscale.devices.batches import samples_in
from lightning_fedscale.half_batches import half_gradients, no_halves
from lightning_fedscale.noise import Diagonal, diagonal_init, diagonal_noise, diagonal_update, look_at_halves
from lightning_fedscale.phase_keeper import PhaseKeeper
from lightning_fedscale.phases import Observation
from lightning_fedscale.types import FloatArray
from lightning_fedscale.update_scaling import UpdateScaling

if TYPE_CHECKING:
    from lightning_fedscale.callbacks.critical_phase import CriticalPhase

_PATIENCE = 25
"""Batches without a gradient after which it is clear that none will come."""


class StepWatch(Callback):
    """Looks at the gradients of every optimizer step, and scales them or makes them noisy once they are clipped.

    Args:
        owner: decides.
        keeper: knows the phase.
    """

    def __init__(self, owner: CriticalPhase, keeper: PhaseKeeper) -> None:
        self._owner = owner
        self._keeper = keeper
        self._scaling: UpdateScaling | None = None
        self._module: pl.LightningModule | None = None
        self._pending: list[Tensor] = []  # norms of the layers, of steps that are not judged yet
        self._steps = 0  # judged or not
        self._unseen = 0  # batches since the last gradient
        self._since_look = 0
        self._samples = 0.0  # in the present batch
        self._open_look: Tensor | None = None  # of the present batch, its gradient is yet to come
        self._looks: list[Tensor] = []  # that were not read yet
        self._sums: list[Tensor] = []
        self._summed = 0
        self._diagonal: Diagonal | None = None

    # ---- before training

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, noise: str) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: with the reason and the remedy.
        """
        needs = self._owner.detector.needs
        if needs == "client_square":
            raise ValueError("detector: the federated gradient norm is one of clients: train by FederatedStrategy.")
        self._check_noise(trainer, module)
        if self._owner.action == "noise" and noise == "reweighting":
            raise ValueError("noise='reweighting' weighs clients at level='round'; here choose 'diagonal'.")
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError("strategy='deepspeed' keeps its gradients to itself: use CriticalPhase with another one.")

    def _check_noise(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (reader := self._owner.needs_sampling_noise) is None:
            return
        if self._owner.noise_every is None:
            raise ValueError(f"noise_every=None: {reader} reads what is measured there; pass a number.")
        if not self._can_look(trainer, module):
            raise ValueError(
                f"{reader} reads the noise of single samples, which is measured on a copy of the module, in automatic"
                " optimization on one device or by DDP: choose another one."
            )

    @staticmethod
    def _can_look(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        return isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)) and module.automatic_optimization

    def helpers(self, trainer: pl.Trainer, noise: str) -> list[Callback]:
        """The callbacks that do the work."""
        return [self]

    def attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        """Take hold of the optimizer, and say how its updates are scaled.

        Raises:
            ValueError: with several optimizers.
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"CriticalPhase: the module has {len(trainer.optimizers)} optimizers, and one sequence of gradients is"
                " what it watches; with FederatedStrategy, level='round' looks at the update of all."
            )
        self._module = module
        self._sums = [tensor.to(module.device) for tensor in self._sums]
        self._diagonal = None if self._diagonal is None else self._diagonal.to(module.device)
        self._scaling = UpdateScaling(trainer.optimizers[0], self._owner.scale_weight_decay)
        if self._owner.action == "scale":
            self._scaling.check()
        if module.automatic_optimization and self._owner.action != "observe":
            # Callbacks are told before gradients are clipped.
            vars(module)["configure_gradient_clipping"] = AfterClipping(module.configure_gradient_clipping, self._act)
        return self._scaling.describe()

    def detach(self) -> None:
        """Module and optimizer are as they were."""
        if self._scaling is not None:
            self._scaling.remove()
            self._scaling = None
        if self._module is not None:
            if isinstance(vars(self._module).get("configure_gradient_clipping"), AfterClipping):
                del vars(self._module)["configure_gradient_clipping"]
            self._module = None

    # ---- in training

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Now and then, see how far the gradients of both halves of a batch are apart."""
        every = self._owner.noise_every
        self._since_look += 1
        if self._owner.action == "noise":
            self._samples = float(samples_in(batch))
        if every is None or self._since_look < every or batch_idx % trainer.accumulate_grad_batches:
            return
        self._since_look = 0
        if self._can_look(trainer, pl_module):
            self._open_look = _look_at(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """The gradients are complete: accumulated, reduced over ranks, unscaled, and not clipped yet."""
        gradients = list(gradients_of(optimizer))
        if not gradients:
            return
        self._unseen = 0
        norms = layer_norms(trainer, gradients)
        if self._open_look is not None:
            self._looks.append(torch.cat([self._open_look, norms.square().sum()[None]]))
            self._open_look = None
        self._seen(trainer, gradients, norms)
        if not pl_module.automatic_optimization:
            self._act(optimizer)  # the user has clipped them

    def after_batch(self, trainer: pl.Trainer) -> None:
        """A batch is over.

        Raises:
            RuntimeError: if no gradients come to be seen.
        """
        assert self._scaling is not None
        self._scaling.restore()  # if the step was skipped
        self._unseen += 1
        if self._unseen >= _PATIENCE * trainer.accumulate_grad_batches:
            raise RuntimeError(NOT_SEEN.format(self._unseen))

    def saved_state(self) -> dict[str, Any]:
        """Norms that wait are numbers in it."""
        return {
            "pending": [norms.tolist() for norms in self._pending],
            "steps": self._steps,
            "since_look": self._since_look,
            "looks": [look.tolist() for look in self._looks],
            "sums": list(self._sums),
            "summed": self._summed,
            "diagonal": None if self._diagonal is None else list(self._diagonal),
        }

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._pending = [torch.tensor(norms, dtype=torch.float64) for norms in state["pending"]]
        self._steps, self._since_look, self._summed = state["steps"], state["since_look"], state["summed"]
        self._looks = [torch.tensor(look, dtype=torch.float64) for look in state["looks"]]
        self._sums = state["sums"]
        self._diagonal = None if state["diagonal"] is None else Diagonal(*state["diagonal"])

    # ---- what is seen

    def _seen(self, trainer: pl.Trainer, gradients: list[Tensor], norms: Tensor) -> None:
        if self._owner.action == "noise":
            self._take_in(gradients, norms)
        if self._owner.detector.accumulate > 1:
            if not self._summed:
                self._sums = [torch.zeros_like(g) for g in gradients]
            torch._foreach_add_(self._sums, gradients)
            self._summed += 1
            if self._summed < self._owner.detector.accumulate:
                return
            norms, self._summed, self._sums = layer_norms(trainer, self._sums), 0, []
        self._pending.append(norms)
        self._steps += 1
        if len(self._pending) >= self._owner.every_n_steps:
            self._read(trainer)

    def _read(self, trainer: pl.Trainer) -> None:
        """Judge the steps that wait, with one read from the device."""
        pending, self._pending = self._pending, []
        looks, self._looks = self._looks, []
        device = pending[-1].device
        if looks:
            shared = collectives.sum_over_ranks(torch.stack([look.to(device) for look in looks]).flatten())
        numbers = torch.cat([*(norms.to(device) for norms in pending), *([shared] if looks else [])]).cpu().numpy()
        *steps, seen = np.split(numbers, np.cumsum([len(norms) for norms in pending]))
        for row in seen.reshape(-1, _LOOK):
            self._take_look(trainer, *row.tolist())
        first = self._steps - len(pending)
        # Mixed precision skips a step now and then, whose gradients are not finite.
        judged = [(first + i, norms) for i, norms in enumerate(steps) if np.isfinite(norms).all()]
        decisions = [self._keeper.detect(self._observation(trainer, norms)) for _, norms in judged]
        flags = _on_any_rank([decision.critical for decision in decisions], device)
        for (at, norms), decision, flag in zip(judged, decisions, flags, strict=True):
            self._owner.judge(at, float(np.linalg.norm(norms)), [decision._replace(critical=flag)])

    def _take_look(self, trainer: pl.Trainer, trace: float, ranks: float, samples: float, square: float) -> None:
        """From sums over ranks: the trace of the covariance of a single sample's gradient, and what goes with it."""
        if not ranks or not math.isfinite(trace * square):
            return
        trace, square = trace / ranks, square / collectives.world_size()
        batch = samples * trainer.accumulate_grad_batches
        one, halves = np.ones(1), np.full((1, 2), batch / 2)
        # Only the halves' difference is theirs; the mean gradient is that of the whole update.
        self._keeper.look("sampling", look_at_halves(one * trace * 4 / batch, halves, one * square, one, square))

    def _observation(self, trainer: pl.Trainer, norms: FloatArray) -> Observation:
        return Observation(
            norms.tolist(),
            fisher_trace=self._keeper.sampling.fisher_trace,
            learning_rate=float(trainer.optimizers[0].param_groups[0].get("lr", math.nan)),
        )

    def _take_in(self, gradients: list[Tensor], norms: Tensor) -> None:
        if self._diagonal is None:
            self._diagonal = diagonal_init(gradients)
        finite = norms.isfinite().all()
        known = zip(gradients, self._diagonal.mean, strict=True)
        self._diagonal = diagonal_update(self._diagonal, [torch.where(finite, g, mean) for g, mean in known])

    # ---- what is done

    def _act(self, optimizer: Optimizer) -> None:
        assert self._scaling is not None
        if self._owner.action == "scale":
            self._scaling.apply(self._owner.scale)
        elif self._owner.adds_noise and self._diagonal is not None and self._diagonal.seen > 1:
            assert self._module is not None
            self._add_noise(list(gradients_of(optimizer)), self._module.trainer)

    def _add_noise(self, gradients: list[Tensor], trainer: pl.Trainer) -> None:
        assert self._diagonal is not None
        assert self._owner.target_batch is not None
        generator = torch.Generator(device=gradients[0].device)
        # The same noise on every rank, since they have the same gradients.
        generator.manual_seed(randomness.derive(self._owner.seed, randomness.NOISE, trainer.global_step))
        batch = self._samples * trainer.accumulate_grad_batches * trainer.world_size
        noise = diagonal_noise(self._diagonal, batch, min(self._owner.target_batch, batch), generator)
        torch._foreach_add_(gradients, noise)


def _on_any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    if collectives.world_size() == 1:
        return flags
    return [flag < 0 for flag in collectives.min_over_ranks(-torch.tensor(flags, device=device).float()).tolist()]


_LOOK = 4


def _look_at(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Trace of the covariance of a sample's gradient, 1, and samples; zeros if it cannot be measured."""
    look = torch.zeros(_LOOK - 1, dtype=torch.float64, device=module.device)
    try:
        if (halves := half_gradients(trainer, module, batch, batch_idx)) is not None:
            m, n = halves.samples
            look[0], look[1], look[2] = halves.difference_square() / (1 / m + 1 / n), 1.0, m + n
    except Exception as error:
        rank_zero_warn(no_halves(error))
    return look
