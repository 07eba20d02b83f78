"""The observation and change of optimizer steps by `CriticalPhase`."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fedscale.callbacks.critical_phase.gradients import (
    SPARSE,
    AfterClipping,
    GradientsExpected,
    gradients_of,
    layer_norms,
    learning_rate,
)
from lightning_fedscale.callbacks.critical_phase.half_batch_noise import COLUMNS, HalfBatchNoise, estimate_of
from lightning_fedscale.callbacks.critical_phase.judge import PhaseJudge
from lightning_fedscale.callbacks.critical_phase.optimizers import GradientMemory, StepHold
from lightning_fedscale.devices.profiling.batches import loaded_samples, samples_in
from lightning_fedscale.phases import Decision, Observation
from lightning_fedscale.types import FloatArray
from lightning_fedscale.utils import collectives, randomness

_HEARD = 100
"""Number of steps, of all optimizers together, for which an optimizer's decision counts."""


class Seen(NamedTuple):
    """The last observation of an optimizer's gradients.

    Attributes:
        at: number of the step or round.
        norm: L2 norm of its gradient.
        decision: decision of the detector.
    """

    at: int
    norm: float
    decision: Decision


class StepWatch(Callback):
    """Observes the gradients of every optimizer step, and scales them or adds noise after clipping.

    Each optimizer's gradients are a separate sequence with a separate detector state, since the norms of two networks
    that train alternately would be noise if joined. The phase is critical if the last decision on any optimizer is
    critical. All updates are scaled by the same factor, which keeps the balance between networks.

    Args:
        judge: decides.
    """

    def __init__(self, judge: PhaseJudge) -> None:
        self._judge = judge
        self._options = judge.options
        self._holds: list[StepHold] = []
        self._memories: defaultdict[int, GradientMemory] = defaultdict(GradientMemory)  # by number of the optimizer
        self._seen: dict[int, Seen] = {}  # likewise
        self._module: pl.LightningModule | None = None
        self._pending: list[tuple[int, Tensor]] = []  # optimizer and layer norms, of steps not judged yet
        self._steps = 0  # judged or not
        self._gradients = GradientsExpected()
        self._samples = 0.0  # in the current batch
        self._half_batches = HalfBatchNoise(judge.options.noise_every)

    # ---- before training

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, noise: str) -> None:
        """Refuse an invalid combination.

        Raises:
            ValueError: with the reason and the remedy.
        """
        needs = self._options.detector.needs
        if needs == "client_square":
            raise ValueError(
                "detector='federated_gradient_norm': it needs clients: choose another detector, or train by"
                " FederatedStrategy."
            )
        self._check_noise(trainer, module)
        if self._options.action == "noise" and noise == "reweighting":
            raise ValueError(
                "noise='reweighting': it needs the updates of clients at level='round': choose noise='diagonal'."
            )
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
        if self._options.action == "noise" and any(table.sparse for table in tables):
            raise ValueError(SPARSE)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError("strategy='deepspeed': CriticalPhase cannot read its gradients: choose another strategy.")

    def _check_noise(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (reader := self._options.needs_sampling_noise) is None:
            return
        if self._options.noise_every is None:
            raise ValueError(
                f"noise_every=None: {reader} needs the noise of single samples: pass a number of batches, such as 200."
            )
        if not HalfBatchNoise.can_measure(trainer, module):
            raise ValueError(
                f"{reader} needs the noise of single samples, which is measured only in automatic optimization, on one"
                " device or by DDP: choose another one."
            )

    def helpers(self, trainer: pl.Trainer, noise: str) -> list[Callback]:
        """Return the callbacks that observe the steps."""
        return [self]

    def attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        """Attach to the optimizers, and return how their updates are scaled, in words."""
        self._module = module
        for memory in self._memories.values():
            memory.to(module.device)
        with_decay = self._options.scale_weight_decay
        self._holds = [StepHold(each, with_decay, self._on_unannounced_step) for each in trainer.optimizers]
        if self._options.action == "scale":
            for hold in self._holds:
                hold.scaling.check()
        if module.automatic_optimization and self._options.action != "observe":
            # Hooks of callbacks run before gradients are clipped.
            vars(module)["configure_gradient_clipping"] = AfterClipping(module.configure_gradient_clipping, self._act)
        return "; ".join(dict.fromkeys(hold.scaling.describe() for hold in self._holds))

    def detach(self) -> None:
        """Restore the module and the optimizers."""
        for hold in self._holds:
            hold.remove()
        self._holds = []
        if self._module is not None:
            if isinstance(vars(self._module).get("configure_gradient_clipping"), AfterClipping):
                del vars(self._module)["configure_gradient_clipping"]
            self._module = None

    # ---- in training

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compare the gradients of both halves of the batch, if this is due."""
        if self._options.action == "noise":
            self._samples = float(_samples(trainer, batch, batch_idx))
        self._half_batches.begin_batch(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Observe the complete gradients: accumulated, reduced over ranks, unscaled, and not clipped yet."""
        if (number := self._number(optimizer)) is None:
            return
        if self._holds[number].announce():
            self._observe(trainer, number)
        if not pl_module.automatic_optimization:
            self._act(optimizer)  # the user has already clipped them

    def _on_unannounced_step(self, optimizer: Optimizer) -> None:
        """Do the same as `on_before_optimizer_step`, for a step that bypasses Lightning."""
        assert self._module is not None
        if (number := self._number(optimizer)) is not None:
            self._observe(self._module.trainer, number)
            self._act(optimizer)

    def _number(self, optimizer: Optimizer) -> int | None:
        """Return the number of an optimizer; None if it is not one of the Trainer's."""
        return next((i for i, hold in enumerate(self._holds) if hold.optimizer is optimizer), None)

    def _observe(self, trainer: pl.Trainer, number: int) -> None:
        optimizer = self._holds[number].optimizer
        if not (gradients := gradients_of(optimizer)):
            return
        self._gradients.seen()
        norms = layer_norms(trainer, optimizer, list(gradients.values()))
        self._half_batches.add_gradient(norms)
        self._add(trainer, number, gradients, norms)

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Restore scaled settings, and warn if no gradients come."""
        for hold in self._holds:
            hold.scaling.restore()  # needed if the step was skipped
        self._gradients.missing(1, trainer, self._judge.critical)

    def metrics(self) -> dict[str, float]:
        """Return norm and phase of each optimizer, if there are several."""
        if len(self._holds) < 2:
            return {}
        norms = {f"phase/grad_norm/{number}": seen.norm for number, seen in self._seen.items()}
        flags = {f"phase/critical/{number}": float(seen.decision.critical) for number, seen in self._seen.items()}
        return {**norms, **flags}

    def saved_state(self) -> dict[str, Any]:
        """Return the state for the checkpoint; pending norms are saved as numbers."""
        return {
            "pending": [[number, norms.tolist()] for number, norms in self._pending],
            "steps": self._steps,
            **self._half_batches.saved_state(),
            "optimizers": [[number, memory.state_dict()] for number, memory in self._memories.items()],
            "seen": [[number, seen.at, seen.norm, list(seen.decision)] for number, seen in self._seen.items()],
        }

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restore the state; earlier versions observed a single optimizer."""
        pending = state["pending"] if "optimizers" in state else [[0, norms] for norms in state["pending"]]
        self._pending = [(number, torch.tensor(norms, dtype=torch.float64)) for number, norms in pending]
        self._steps = state["steps"]
        self._half_batches.load_saved_state(state)
        self._memories.clear()
        for number, memory in state.get("optimizers", [[0, state]]):
            self._memories[number].load_state_dict(memory)
        self._seen = {n: Seen(at, norm, Decision(*decision)) for n, at, norm, decision in state.get("seen", [])}

    # ---- observation

    def _add(self, trainer: pl.Trainer, number: int, gradients: dict[int, Tensor], norms: Tensor) -> None:
        if self._options.action == "noise":
            if any(gradient.is_sparse for gradient in gradients.values()):
                raise ValueError(SPARSE)
            self._memories[number].take_in(gradients, norms.isfinite().all())
        if (steps := self._options.detector.accumulate) > 1:
            if (sums := self._memories[number].add_up(gradients, steps)) is None:
                return
            norms = layer_norms(trainer, self._holds[number].optimizer, sums)
        self._pending.append((number, norms))
        self._steps += 1
        if len(self._pending) >= self._options.every_n_steps:
            self._read(trainer)

    def _read(self, trainer: pl.Trainer) -> None:
        """Judge the pending steps, with one read from the device."""
        pending, self._pending = self._pending, []
        device = pending[-1][1].device
        measured = self._half_batches.take(device)
        parts = [*(norms.to(device) for _, norms in pending), *([] if measured is None else [measured])]
        numbers = torch.cat(parts).cpu().numpy()
        *steps, rows = np.split(numbers, np.cumsum([len(norms) for _, norms in pending]))
        for row in rows.reshape(-1, COLUMNS):
            if (estimate := estimate_of(trainer.accumulate_grad_batches, *row.tolist())) is not None:
                self._judge.tracker.add_estimate("sampling", estimate)
        first = self._steps - len(pending)
        # Mixed precision sometimes skips a step, whose gradients are not finite.
        judged = [
            (first + i, number, norms)
            for i, ((number, _), norms) in enumerate(zip(pending, steps, strict=True))
            if np.isfinite(norms).all()
        ]
        decisions = [
            self._judge.tracker.detect(self._observation(number, norms), self._sequence(number))
            for _, number, norms in judged
        ]
        flags = _on_any_rank([decision.critical for decision in decisions], device)
        for (at, number, norms), decision, flag in zip(judged, decisions, flags, strict=True):
            self._seen[number] = Seen(at, float(np.linalg.norm(norms)), decision._replace(critical=flag))
            heard = [seen for seen in self._seen.values() if at - seen.at <= _HEARD]
            self._judge.judge(at, math.hypot(*(seen.norm for seen in heard)), [seen.decision for seen in heard])

    def _sequence(self, number: int, client: int = -1) -> int:
        """Return a unique number for each client's optimizer; with one optimizer, the client's number."""
        return client * len(self._holds) + number

    def _observation(self, number: int, norms: FloatArray) -> Observation:
        return Observation(
            norms.tolist(),
            fisher_trace=self._judge.tracker.sampling.fisher_trace,
            learning_rate=learning_rate(self._holds[number].optimizer),
        )

    # ---- action

    def _act(self, optimizer: Optimizer) -> None:
        if (number := self._number(optimizer)) is None:
            return
        if self._options.action == "scale":
            self._holds[number].scaling.apply(self._judge.scale)
        elif self._judge.adds_noise and self._memories[number].steps > 1:
            assert self._module is not None
            assert self._options.target_batch is not None
            trainer = self._module.trainer
            batch = self._samples * trainer.accumulate_grad_batches * trainer.world_size
            memory, target = self._memories[number], min(self._options.target_batch, batch)
            # The same noise on every rank, since they have the same gradients.
            seed = randomness.derive(self._options.seed, randomness.NOISE, memory.steps, number)
            memory.add_noise(gradients_of(optimizer), batch, target, seed)


def _samples(trainer: pl.Trainer, batch: Any, batch_idx: int) -> int:
    try:
        return samples_in(batch, remedy=": choose action='observe' or 'scale'.")
    except ValueError:
        # Graphs, for example, are batched as one large graph.
        if (loaded := loaded_samples(trainer.train_dataloader, batch_idx)) is None:
            raise
        return loaded


def _on_any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    if collectives.world_size() == 1:
        return flags
    return [flag < 0 for flag in collectives.min_over_ranks(-torch.tensor(flags, device=device).float()).tolist()]
