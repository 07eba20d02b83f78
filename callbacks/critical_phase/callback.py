"""`CriticalPhase`: detect critical phases of training, and scale updates outside of them."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedscale.callbacks.critical_phase.client_steps import ClientStepWatch
from lightning_fedscale.callbacks.critical_phase.history import LAYOUT, PhaseRecord
from lightning_fedscale.callbacks.critical_phase.rounds import RoundWatch
from lightning_fedscale.callbacks.critical_phase.steps import StepWatch
from lightning_fedscale.core.lightning.loggers import lay_out, show
from lightning_fedscale.core.lightning.trainer_state import logs_now
from lightning_fedscale.core.options.trainer_checks import check_package
from lightning_fedscale.phases import (
    Decision,
    Detector,
    Observation,
    Phase,
    ScaleRule,
    check_rule,
    detector_by_name,
    reads_noise,
    step,
)
from lightning_fedscale.phases.noise import MIN_ESTIMATES, NoiseScale
from lightning_fedscale.phases.tracker import PhaseTracker
from lightning_fedscale.strategy import FederatedStrategy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CriticalPhase(Callback):
    """Detects critical phases of training from its gradients, and scales up updates outside of them.

    Training is in a critical phase while its gradient norm changes quickly. Large batches are harmful in such a phase;
    elsewhere their updates may be scaled up (the step function of arXiv 2509.10537), or given the noise of small
    batches. Add this callback to any Lightning project, with or without `FederatedStrategy`:

    * ``level="round"`` observes the clients' aggregated update, before the server steps; the decision holds for the
      same round.
    * ``level="step"`` observes gradients as the optimizer gets them: accumulated, unscaled and not yet clipped. With
      `FederatedStrategy` these are each client's own. The decision is critical if it is for any client, and holds for
      the next round; clients train sequentially.

    Without `FederatedStrategy` both levels observe the Trainer's optimizer steps.

    With several optimizers (manual optimization: GANs, occasional steps, steps that bypass Lightning) the gradients of
    each are a separate sequence, since the alternating norms of two networks would be noise to a detector. The phase is
    critical if the last step of any optimizer is; an optimizer without a step for 100 steps of the others is ignored.
    All updates are scaled by the same factor, which keeps the balance between networks; noise is added per optimizer.
    Norm and phase of each are logged as ``phase/grad_norm/0``, ``phase/critical/0`` and so on. At ``level="round"`` the
    update is that of all of them together.

    Updates are scaled after clipping, which therefore cannot undo it. The gradients of SGD, or the update of a linear
    server, are multiplied. Adam and others, whose steps are not proportional to the gradients, step with a multiplied
    learning rate; the steps of adaptive servers are multiplied. The method is logged when training begins. Schedulers,
    monitors and checkpoints see the original learning rate, and weight decay is not scaled by default.

    The noise of gradients is measured as well: in federated training from the clients' updates, at no cost, and
    occasionally from both halves of a batch; see ``noise_every``.

    Args:
        detector: detector of critical phases: "page_hinkley", "relative_change", "accordion",
            "federated_gradient_norm", "fisher_trace", or one made by `lightning_fedscale.phases` with custom arguments.
        threshold: threshold of a detector given by name: for "page_hinkley", which calibrates itself on the noise of
            the run, the false alarms in 1,000 observations (1); for others the relative change from which a phase is
            critical. None is the detector's default. With ``relative_change``, the smoothed norm hardly reaches
            SelSync's 0.3 after the first 25 observations.
        scale: factor of updates outside of critical phases, or a rule of `lightning_fedscale.phases`: ``step``,
            ``linear_ramp``, ``adascale``, ``capped``.
        action: "scale" scales updates outside of critical phases; "noise" adds the noise that updates of a batch of
            ``target_batch`` samples have in addition to the present ones; "observe" changes nothing.
        level: observe the update of each "round", or the gradients of each "step".
        target_batch: for ``action="noise"``: number of samples whose noise is wanted. In manual optimization a step is
            assumed to use the current batch only, since earlier gradients in it cannot be detected: if the module
            accumulates them over k batches, pass the wanted number divided by k.
        noise: kind of noise: "reweighting" weighs clients at random, at the cost of one update's memory; "diagonal" is
            normal with the running variance of every parameter's gradient, at twice the model's memory. None takes
            "reweighting" for rounds of clients, else "diagonal".
        noise_in: add noise in "critical" phases, where gradients of small batches matter most, or in "all".
        scale_weight_decay: scale weight decay with the update. At ``level="round"`` this is the server's weight decay;
            that of the clients is part of their update.
        every_n_steps: at ``level="step"`` without clients, steps after which gradient norms are read from the device
            and judged together; until then the last decision holds.
        noise_every: number of local batches after which one is cut into halves, to measure the noise of sampling; each
            costs an additional forward and backward pass, and five are needed. None for never.
        seed: seed of the added noise.

    Attributes:
        record: norms, decisions and critical spans so far; see `plot`.

    Raises:
        TypeError, ValueError: for invalid arguments; in ``fit`` for an incompatible Trainer.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> phase = CriticalPhase("relative_change", threshold=100.0, scale=1.5)  # critical in the first 25 steps
        >>> trainer = pl.Trainer(max_steps=40, callbacks=[phase], accelerator="cpu", logger=False,
        ...                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> phase.record.summary("step")
        '25 of 40 observed steps were critical, the last one 24'
        >>> phase.critical, phase.scale
        (False, 1.5)
    """

    def __init__(
        self,
        detector: str | Detector = "page_hinkley",
        threshold: float | None = None,
        scale: float | ScaleRule = 2.0,
        action: Literal["observe", "scale", "noise"] = "scale",
        level: Literal["round", "step"] = "round",
        target_batch: float | None = None,
        noise: Literal["reweighting", "diagonal"] | None = None,
        noise_in: Literal["critical", "all"] = "critical",
        scale_weight_decay: bool = False,
        every_n_steps: int = 10,
        noise_every: int | None = 200,
        seed: int = 0,
    ) -> None:
        _choice("action", action, "observe", "scale", "noise")
        _choice("level", level, "round", "step")
        _choice("noise", noise, "reweighting", "diagonal", None)
        _choice("noise_in", noise_in, "critical", "all")
        _whole("every_n_steps", every_n_steps, 1)
        _whole("seed", seed, 0)
        if noise_every is not None:
            _whole("noise_every", noise_every, 1)
        if (action == "noise") != (target_batch is not None):
            raise ValueError(
                f"target_batch={target_batch!r}: pass the number of samples whose noise is wanted together with"
                " action='noise', and only then."
            )
        if target_batch is not None and not (isinstance(target_batch, (int, float)) and target_batch > 0):
            raise ValueError(f"target_batch={target_batch!r}: pass a number of samples above 0.")
        if not isinstance(detector, (str, Detector)):
            raise TypeError(f"detector={detector!r}: pass a name, or a Detector made by lightning_fedscale.phases.")
        if threshold is not None and isinstance(detector, Detector):
            raise ValueError(f"threshold={threshold!r} is of a detector given by name: give it to the Detector itself.")
        self.detector = detector_by_name(detector, threshold) if isinstance(detector, str) else detector
        self.action = action
        self.target_batch = target_batch
        self.noise_in = noise_in
        self.scale_weight_decay = scale_weight_decay
        self.every_n_steps = every_n_steps
        self.noise_every = noise_every
        self.seed = seed
        self.record = PhaseRecord()
        self._noise = noise
        self._level = level
        self._rule = scale if callable(scale) else step(scale)
        check_rule(self._rule)
        self._tracker = PhaseTracker(self.detector, self._rule)
        self._norm = math.nan
        self._watch: StepWatch | RoundWatch | None = None
        self._resumed: dict[str, Any] | None = None
        self._round: _OpenRound | None = None
        self._unit = "step"
        self._undo = ExitStack()
        self.listeners: list[Any] = []  # get the round events of this callback

    # ---- values for other parts

    @property
    def critical(self) -> bool:
        """Whether training is in a critical phase; it is before the first observation."""
        return self._tracker.phase.critical

    @property
    def phase(self) -> Phase:
        """The current phase: whether it is critical, for how long it was not, and the noise scale."""
        return self._tracker.phase

    @property
    def scale(self) -> float:
        """Current factor of updates; 1 unless ``action="scale"``."""
        return self._tracker.scale if self.action == "scale" else 1.0

    @property
    def noise_scale(self) -> NoiseScale:
        """The gradient noise scale with its interval; with clients, that of their updates."""
        return self._tracker.noise

    @property
    def sampling_noise(self) -> NoiseScale:
        """The noise scale of single samples' gradients, from both halves of batches."""
        return self._tracker.sampling

    @property
    def adds_noise(self) -> bool:
        """Whether noise is currently added."""
        return self.action == "noise" and (self.noise_in == "all" or self.critical)

    @property
    def needs_sampling_noise(self) -> str | None:
        """The part that needs the noise of single samples without clients, in words; None if none does."""
        if self.detector.needs == "fisher_trace":
            return "detector 'fisher_trace'"
        return "the scale rule" if self.action == "scale" and reads_noise(self._rule) else None

    def _noise_in_words(self) -> str:
        of_clients = self.noise_scale.estimates > 0 and self.noise_scale is self._tracker.members
        return noise_in_words(
            self.noise_scale, self._unit, "as many clients in each" if of_clients else "as large batches"
        )

    def plot(self) -> Figure:
        """Plot norm and statistic over time, with critical spans shaded."""
        return self.record.plot(self._unit, self.detector.statistic)

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set up the observation of gradients."""
        check_package(self, trainer)
        if stage != "fit":
            return
        self._undo.close()
        self._round = None
        before = None if self._watch is None else self._watch.saved_state()
        if trainer.global_step == 0:  # else this callback continues a run
            self._tracker, self.record = PhaseTracker(self.detector, self._rule), PhaseRecord()
            self._norm, before = math.nan, None
        federated = isinstance(trainer.strategy, FederatedStrategy)
        self._unit = "round" if federated else "step"
        watch: Any
        if not federated:
            watch = StepWatch(self, self._tracker)
        elif self._level == "step":
            watch = ClientStepWatch(self, self._tracker)
        else:
            watch = RoundWatch(self, self._tracker)
        kind = self._noise or ("reweighting" if isinstance(watch, RoundWatch) else "diagonal")
        watch.check(trainer, pl_module, kind)
        if before is not None:
            watch.load_saved_state(before)
        self._watch = watch
        helpers = watch.helpers(trainer, kind)
        if isinstance(watch, RoundWatch):
            self.listeners = helpers
            self._undo.callback(setattr, self, "listeners", [])
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for helper in helpers:
            callbacks.insert(callbacks.index(self) + 1, helper)
            self._undo.callback(callbacks.remove, helper)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore a checkpoint's state, and attach to the optimizers, which exist from here on."""
        assert self._watch is not None
        if self._resumed is not None:
            self._tracker.load_state_dict(self._resumed["keeper"])
            self.record.load_state_dict(self._resumed["record"])
            self._watch.load_saved_state(self._resumed["watch"])
            self._norm, self._resumed = self._resumed["norm"], None
        how = self._watch.attach(trainer, pl_module)
        if self.action == "scale":
            rank_zero_info(f"CriticalPhase: {how}.")
        lay_out(trainer, LAYOUT)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the phase, as often as the Trainer logs."""
        assert self._watch is not None
        self._watch.after_batch(trainer)
        self._settle()
        if not logs_now(trainer):
            return
        values = {**self._tracker.metrics(), **self._watch.metrics(), "phase/scale": self.scale}
        if math.isfinite(self._norm):
            values["phase/grad_norm"] = self._norm
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a summary and the figure of the whole run."""
        rank_zero_info(f"CriticalPhase: {self.record.summary(self._unit)}; {self._noise_in_words()}.")
        show(trainer, "phase/course", self.plot())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Call `teardown`, which the Trainer skips after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module, the optimizers and the Trainer's callbacks."""
        if self._watch is not None:
            self._watch.detach()
        self._undo.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: all results, but nothing that belongs to a Trainer."""
        return {**vars(self), "_watch": None, "_round": None, "_undo": ExitStack(), "listeners": []}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume; within a round, the state from its beginning."""
        if self._resumed is not None:
            return self._resumed
        self._settle()
        state = self._state() if self._round is None else self._round.before
        return {**state, "record": self.record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint, once training begins."""
        self._resumed = state_dict

    def _state(self) -> dict[str, Any]:
        watch = {} if self._watch is None else self._watch.saved_state()
        return {"keeper": self._tracker.state_dict(), "watch": watch, "norm": self._norm}

    # ---- for the observers of rounds and steps

    def begin_round(self, trainer: pl.Trainer) -> None:
        """Open a round that is about to be judged; it becomes final once the Trainer has counted it."""
        self._round = _OpenRound(trainer, trainer.global_step, self._state())

    def judge(self, at: int, norm: float, decisions: list[Decision]) -> None:
        """Record the detectors' decisions on a step or round.

        Args:
            at: its number.
            norm: L2 norm of its gradient.
            decisions: one decision, or those for several clients or optimizers.
        """
        self._norm = norm
        self._tracker.decide(decisions)
        decision = self._tracker.decision
        row = (at, norm, decision.statistic, decision.threshold, self.scale, decision.critical)
        if self._round is None:
            self.record.add(*row)
        else:
            self._round.row = row

    def observe(self, at: int, observation: Observation) -> None:
        """Judge a step or round by one observation."""
        norm = math.sqrt(math.fsum(n * n for n in observation.layer_norms))
        self.judge(at, norm, [self._tracker.detect(observation)])

    def _settle(self) -> None:
        """Make the judgement of a round final, if the Trainer has counted it."""
        if self._round is not None and self._round.trainer.global_step > self._round.number:
            if self._round.row is not None:
                self.record.add(*self._round.row)
            self._round = None


@dataclass
class _OpenRound:
    """A round that was judged and may still fail."""

    trainer: pl.Trainer
    number: int
    before: dict[str, Any]
    row: tuple[int, float, float, float, float, bool] | None = None


def noise_in_words(noise: NoiseScale, unit: str, more: str) -> str:
    """Return the noise scale in words, or the additional evidence that it would need.

    Args:
        noise: the noise scale.
        unit: "round" or "step".
        more: what each of them could have more of: "as many clients", "as large batches".

    Example:
        >>> from lightning_fedscale.phases.noise import NoiseEstimate, noise_scale
        >>> little = noise_scale([NoiseEstimate(0.5 + (-1) ** i, 2.0, 32.0, 2.0) for i in range(10)])
        >>> print(noise_in_words(little, "round", "as many clients").partition(": ")[2])
        about 5.7 (at least 1.4) times as many rounds, or about 10 (at least 1.6) times as many clients, would be enough
    """
    if noise.enough:
        return f"gradient noise scale {noise.scale:,.0f} samples ({noise.low:,.0f} to {noise.high:,.0f})"
    said = "not enough evidence on the gradient noise scale"
    if noise.estimates < MIN_ESTIMATES:
        return f"{said}: {noise.estimates} of at least {MIN_ESTIMATES} estimates: train for more {unit}s"
    known = f"{noise.low:,.0f} to {noise.high:,.0f}" if noise.high < math.inf else f"above {noise.low:,.0f}"
    times = noise.needed[0] / noise.estimates, noise.needed[1] / noise.estimates
    ways = [f"{_times(times)} times as many {unit}s"] if times[1] < math.inf else []
    if noise.shortfall[1] < math.inf:
        ways.append(f"{_times(noise.shortfall)} times {more}")
    remedy = f"{', or '.join(ways)}, would be enough" if ways else "there is no sign of a gradient in the noise"
    return f"{said} ({known} samples, with 95 % confidence): {remedy}"


def _times(factors: tuple[float, float]) -> str:
    """Return a factor by the mean, and the least one, in words."""
    mean, least = factors
    return f"about {mean:.2g} (at least {least:.2g})" if mean < math.inf else f"at least {least:.2g}"


def _choice(name: str, value: Any, *choices: Any) -> None:
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={value!r}: choose {', '.join(others)} or {last}.")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: pass a whole number, at least {least}.")
