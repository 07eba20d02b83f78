"""How `CriticalPhase` sees and changes the steps of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_fedscale import collectives, randomness
from lightning_fedscale.devices.batches import samples_in
from lightning_fedscale.half_batches import half_gradients
from lightning_fedscale.noise import Diagonal, diagonal_init, diagonal_noise, diagonal_update, look_at_halves
from lightning_fedscale.phase_keeper import PhaseKeeper
from lightning_fedscale.phases import Observation
from lightning_fedscale.types import FloatArray, IntArray, Params, RoundRecord
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
        if needs == "fisher_trace" and self._owner.noise_every is None:
            raise ValueError("noise_every=None: detector 'fisher_trace' reads what is measured there; pass a number.")
        if self._owner.action == "noise" and noise == "reweighting":
            raise ValueError("noise='reweighting' weighs clients at level='round'; here choose 'diagonal'.")
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError("strategy='deepspeed' keeps its gradients to itself: use CriticalPhase with another one.")

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
        if self._diagonal is not None:
            mean, variance, seen = self._diagonal
            self._diagonal = Diagonal(
                [t.to(module.device) for t in mean], [t.to(module.device) for t in variance], seen
            )
        self._scaling = UpdateScaling(trainer.optimizers[0], self._owner.scale_weight_decay)
        if module.automatic_optimization and self._owner.action != "observe":
            # Callbacks are told before gradients are clipped.
            vars(module)["configure_gradient_clipping"] = _AfterClipping(module.configure_gradient_clipping, self._act)
        return self._scaling.describe()

    def detach(self) -> None:
        """Module and optimizer are as they were."""
        if self._scaling is not None:
            self._scaling.remove()
            self._scaling = None
        if self._module is not None:
            if isinstance(vars(self._module).get("configure_gradient_clipping"), _AfterClipping):
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
        if isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)) and pl_module.automatic_optimization:
            self._open_look = _look_at(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """The gradients are complete: accumulated, reduced over ranks, unscaled, and not clipped yet."""
        gradients = list(_gradients(optimizer))
        if not gradients:
            return
        self._unseen = 0
        norms = _norms(trainer, gradients)
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
            raise RuntimeError(_NOT_SEEN.format(self._unseen))

    def state_dict(self) -> dict[str, Any]:
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
            norms, self._summed, self._sums = _norms(trainer, self._sums), 0, []
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
        flags = -collectives.min_over_ranks(-torch.tensor([float(d.critical) for d in decisions], device=device))
        for (at, norms), decision, flag in zip(judged, decisions, flags.tolist(), strict=True):
            self._owner.judge(at, float(np.linalg.norm(norms)), [decision._replace(critical=flag > 0)])

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
            self._add_noise(list(_gradients(optimizer)), self._module.trainer)

    def _add_noise(self, gradients: list[Tensor], trainer: pl.Trainer) -> None:
        assert self._diagonal is not None
        assert self._owner.target_batch is not None
        generator = torch.Generator(device=gradients[0].device)
        # The same noise on every rank, since they have the same gradients.
        generator.manual_seed(randomness.derive(self._owner.seed, randomness.NOISE, trainer.global_step))
        batch = self._samples * trainer.accumulate_grad_batches * trainer.world_size
        noise = diagonal_noise(self._diagonal, batch, min(self._owner.target_batch, batch), generator)
        torch._foreach_add_(gradients, noise)


class ClientStepWatch(StepWatch):
    """Looks at the gradients of every client's local steps; decides once a round, the same on every rank."""

    def __init__(self, owner: CriticalPhase, keeper: PhaseKeeper) -> None:
        super().__init__(owner, keeper)
        self._client = -1
        self._norms: dict[int, list[Tensor]] = {}

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, noise: str) -> None:
        """See `StepWatch.check`."""
        if self._owner.detector.needs != "layer_norms" or self._owner.detector.accumulate > 1:
            raise ValueError(
                "level='step': with FederatedStrategy, only detectors of the gradient norm of single steps look at"
                " local steps; choose level='round'."
            )
        if self._owner.action == "noise":
            raise ValueError(
                "action='noise': with FederatedStrategy it is the aggregated update that is given noise; choose"
                " level='round'."
            )
        super().check(trainer, module, noise)

    def on_train_batch_start(self, *_: Any) -> None:
        """With clients, this is the start of a round; nothing is to be measured there."""

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, round: int, clients: IntArray) -> None:
        """Forget a round that failed."""
        self._norms = {}

    def on_client_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, client: int) -> None:
        """The gradients that follow are this client's."""
        self._client = client
        self._norms[client] = []

    def on_before_server_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RoundRecord, delta: Params
    ) -> None:
        """All clients have trained: share what was seen, and decide."""
        self._owner.begin_round(trainer)
        self._keeper.look_at_clients(record)
        rows = {client: row for row, client in enumerate(record.clients.tolist())}
        table = torch.zeros(len(rows), 2 * int(record.local_steps.max()), dtype=torch.float64)
        for client, norms in self._norms.items():
            if norms:
                totals = torch.stack(norms).cpu()
                table[rows[client], : 2 * len(totals)] = totals.flatten()
        # Gradients may be on a device whose communication knows no other tensors.
        device = trainer.strategy.root_device
        table = collectives.sum_over_ranks(table.to(device)).cpu().reshape(len(rows), -1, 2)
        decisions, squares = [], []
        for client, steps in zip(rows, table.numpy(), strict=True):
            # Total of the layers' norms, and squared norm; a step without gradients leaves zeros.
            seen = steps[(steps[:, 0] > 0) & np.isfinite(steps[:, 0])]
            if len(seen):
                squares.append(float(seen[:, 1].mean()))
                decisions.append([self._keeper.detect(Observation([total]), client) for total in seen[:, 0]][-1])
        if not decisions:
            raise RuntimeError(_NOT_SEEN.format(int(record.local_steps.sum())))
        self._owner.judge(record.round, math.sqrt(math.fsum(squares) / len(squares)), decisions)

    def after_batch(self, trainer: pl.Trainer) -> None:
        """A round is over."""
        assert self._scaling is not None
        self._scaling.restore()

    def _seen(self, trainer: pl.Trainer, gradients: list[Tensor], norms: Tensor) -> None:
        self._norms[self._client].append(torch.stack([norms.sum(), norms.square().sum()]))


class _AfterClipping:
    """Stands in for a module's ``configure_gradient_clipping``, and does one thing more."""

    def __init__(self, hook: Callable[..., Any], then: Callable[[Optimizer], None]) -> None:
        self.__wrapped__ = hook
        self._then = then

    def __call__(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self.__wrapped__(optimizer, *args, **kwargs)
        self._then(optimizer)

    def __reduce__(self) -> tuple[Any, ...]:
        # A module that is copied or pickled during `fit` has its own hook again.
        return _as_it_was, (self.__wrapped__,)


def _as_it_was(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


_NOT_SEEN = (
    "CriticalPhase: no gradients were seen in {} batches. In manual optimization, step optimizers that come from"
    " self.optimizers() as they are, without use_pl_optimizer=False; and training_step must return a loss that depends"
    " on parameters of the optimizer."
)


def _gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise ValueError(
                    "CriticalPhase: a gradient is sparse, and its norm over steps is not that of a dense one: pass"
                    " sparse=False to nn.Embedding."
                )
            yield parameter.grad


def _norms(trainer: pl.Trainer, gradients: list[Tensor]) -> Tensor:
    """The L2 norm of each, on their device, in float64."""
    norms = torch.stack([_whole(norm) for norm in torch._foreach_norm(gradients)]).double()
    if isinstance(trainer.strategy, FSDPStrategy):  # every rank holds a part of each
        norms = collectives.sum_over_ranks(norms.square()).sqrt()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(trainer.optimizers[0], "_step_supports_amp_scaling", False):
        norms = norms / scaler._scale  # fused optimizers unscale by themselves, later
    return norms


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


_LOOK = 4


def _look_at(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Trace of the covariance of a sample's gradient, 1, and samples; zeros if it cannot be measured."""
    look = torch.zeros(_LOOK - 1, dtype=torch.float64, device=module.device)
    try:
        if (halves := half_gradients(trainer, module, batch, batch_idx)) is not None:
            m, n = halves.samples
            look[0], look[1], look[2] = halves.difference_square() / (1 / m + 1 / n), 1.0, m + n
    except Exception as error:
        rank_zero_warn(
            "CriticalPhase: the noise of single samples is not measured, since a batch cannot be cut into halves and"
            f" run on a copy of the module ({type(error).__name__}: {error}). Pass noise_every=None."
        )
    return look
