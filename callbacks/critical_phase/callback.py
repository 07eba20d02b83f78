"""`CriticalPhase`: which phase training is in, and what large batches may do in it."""

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
from lightning_fedscale.phases.noise import FEWEST, NoiseScale
from lightning_fedscale.phases.tracker import PhaseKeeper
from lightning_fedscale.strategy import FederatedStrategy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CriticalPhase(Callback):
    """Tells critical phases of training from its gradients, and scales up updates outside of them.

    Training is in a critical phase while its gradient norm changes quickly. Large batches harm there; elsewhere their
    updates may be made longer (the step function of arXiv 2509.10537), or noise may give them back what small batches
    have. Add it to any Lightning project, or to one that trains by `FederatedStrategy`:

    * ``level="round"`` looks at the clients' aggregated update, before the server steps; the decision holds for the
      same round.
    * ``level="step"`` looks at gradients as the optimizer gets them, accumulated, unscaled and not yet clipped. With
      `FederatedStrategy` these are each client's own; then the decision, critical if it is so for any client, holds for
      the next round, and clients train one after the other.

    Without `FederatedStrategy` both are the same: the Trainer's optimizer steps.

    With several optimizers (manual optimization: GANs, steps now and then or past Lightning) the gradients of each are
    a sequence of their own, since the norms of two networks in turns would be noise to a detector. The phase is
    critical if it is so for any optimizer, by its last step; one that has not stepped for 100 steps of the others is
    not heard. All updates are scaled alike, so that the balance between networks stays; noise is each optimizer's own.
    Norm and phase of each are logged as ``phase/grad_norm/0``, ``phase/critical/0`` and so on. At ``level="round"`` the
    update is that of all of them together.

    Scaling comes after clipping, which therefore cannot undo it. SGD's gradients are multiplied, or a linear server's
    update; Adam and others, whose steps do not follow the gradients' size, take their step with a multiplied learning
    rate, and adaptive servers have theirs multiplied. Which it is is said when training begins. Schedulers, monitors
    and checkpoints see the learning rate as it was, and weight decay is not scaled unless asked.

    How noisy gradients are is measured as well: in federated training from the clients' updates, which cost nothing,
    and from both halves of a batch now and then; see ``noise_every``.

    Args:
        detector: how critical phases are told: "page_hinkley", "relative_change", "accordion",
            "federated_gradient_norm", "fisher_trace", or one made by `lightning_fedscale.phases` with arguments of its
            own.
        threshold: of a detector given by name: for "page_hinkley", which calibrates itself on the run's own noise, the
            false alarms in 1,000 observations (1); for others the relative change from which on a phase is critical.
            None is the detector's own default. SelSync's 0.3 for ``relative_change`` is hardly reached by its smoothed
            norm after the first 25 observations.
        scale: what to multiply updates by outside of critical phases, or a rule of `lightning_fedscale.phases`:
            ``step``, ``linear_ramp``, ``adascale``, ``capped``.
        action: what to do: "scale" updates outside of critical phases; "noise" adds what the updates of a batch of
            ``target_batch`` samples have in noise beyond the present ones; "observe" changes nothing.
        level: where to look: at the update of each "round", or the gradients of each "step".
        target_batch: for ``action="noise"``: samples whose noise is wanted. In manual optimization the
            present batch is taken to be all that a step has, since nothing shows whether earlier gradients are still
            in it: where the module adds them up over k batches, pass a k-th of what is wanted.
        noise: how it is made: "reweighting" weighs clients at random, at no cost but an update's memory; "diagonal"
            is normal with the running variance of every parameter's gradient, at twice the model's memory. None takes
            the first where there are clients.
        noise_in: add it in "critical" phases, where gradients of small batches matter most, or in "all".
        scale_weight_decay: scale weight decay with the update. At ``level="round"`` it is the server's that is meant;
            that of the clients is a part of their update.
        every_n_steps: at ``level="step"`` without clients, steps after which gradient norms are read from the device
            and judged together; until then the last decision holds.
        noise_every: local batches after which another is cut into halves, for the part of the noise that comes from
            sampling; each costs a further forward and backward pass, and five are needed. None for never.
        seed: of the noise that is added.

    Attributes:
        record: norms, decisions and critical spans so far; see `plot`.

    Raises:
        TypeError, ValueError: for arguments that cannot be; in ``fit`` for a Trainer that it cannot work with.

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
        self._keeper = PhaseKeeper(self.detector, self._rule)
        self._norm = math.nan
        self._watch: StepWatch | RoundWatch | None = None
        self._resumed: dict[str, Any] | None = None
        self._round: _OpenRound | None = None
        self._unit = "step"
        self._undo = ExitStack()
        self.listeners: list[Any] = []  # that hear of rounds as this one does

    # ---- what others may follow

    @property
    def critical(self) -> bool:
        """Whether training is in a critical phase; so it is before anything was observed."""
        return self._keeper.phase.critical

    @property
    def phase(self) -> Phase:
        """Where training is: critical or not, for how long not, at which noise scale."""
        return self._keeper.phase

    @property
    def scale(self) -> float:
        """What updates are multiplied by; 1 unless ``action="scale"``."""
        return self._keeper.scale if self.action == "scale" else 1.0

    @property
    def noise_scale(self) -> NoiseScale:
        """The gradient noise scale with its interval: of clients' updates where there are clients."""
        return self._keeper.noise

    @property
    def sampling_noise(self) -> NoiseScale:
        """The noise scale of single samples' gradients, from both halves of batches."""
        return self._keeper.sampling

    @property
    def adds_noise(self) -> bool:
        """Whether noise is to be added now."""
        return self.action == "noise" and (self.noise_in == "all" or self.critical)

    @property
    def needs_sampling_noise(self) -> str | None:
        """What reads the noise of single samples where there are no clients, in words; None if nothing does."""
        if self.detector.needs == "fisher_trace":
            return "detector 'fisher_trace'"
        return "the scale rule" if self.action == "scale" and reads_noise(self._rule) else None

    def _noise_in_words(self) -> str:
        of_clients = self.noise_scale.looks > 0 and self.noise_scale is self._keeper.members
        return noise_in_words(
            self.noise_scale, self._unit, "as many clients in each" if of_clients else "as large batches"
        )

    def plot(self) -> Figure:
        """Norm and statistic in their course, critical spans shaded."""
        return self.record.plot(self._unit, self.detector.statistic)

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put in place what looks at gradients."""
        check_package(self, trainer)
        if stage != "fit":
            return
        self._undo.close()
        self._round = None
        before = None if self._watch is None else self._watch.saved_state()
        if trainer.global_step == 0:  # else a run goes on that this callback has already seen
            self._keeper, self.record = PhaseKeeper(self.detector, self._rule), PhaseRecord()
            self._norm, before = math.nan, None
        federated = isinstance(trainer.strategy, FederatedStrategy)
        self._unit = "round" if federated else "step"
        watch: Any
        if not federated:
            watch = StepWatch(self, self._keeper)
        elif self._level == "step":
            watch = ClientStepWatch(self, self._keeper)
        else:
            watch = RoundWatch(self, self._keeper)
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
        """The optimizers are there."""
        assert self._watch is not None
        if self._resumed is not None:
            self._keeper.load_state_dict(self._resumed["keeper"])
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
        """Log what is known, as often as the Trainer logs."""
        assert self._watch is not None
        self._watch.after_batch(trainer)
        self._settle()
        if not trainer._logger_connector.should_update_logs:
            return
        values = {**self._keeper.metrics(), **self._watch.metrics(), "phase/scale": self.scale}
        if math.isfinite(self._norm):
            values["phase/grad_norm"] = self._norm
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the whole course."""
        rank_zero_info(f"CriticalPhase: {self.record.summary(self._unit)}; {self._noise_in_words()}.")
        show(trainer, "phase/course", self.plot())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As `teardown`, which the Trainer leaves out then."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Module, optimizers and callbacks are as they were."""
        if self._watch is not None:
            self._watch.detach()
        self._undo.close()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: all that was found out, and nothing that belongs to a Trainer."""
        return {**vars(self), "_watch": None, "_round": None, "_undo": ExitStack(), "listeners": []}

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on exactly; within a round, what it began with."""
        if self._resumed is not None:
            return self._resumed
        self._settle()
        state = self._state() if self._round is None else self._round.before
        return {**state, "record": self.record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, once training begins."""
        self._resumed = state_dict

    def _state(self) -> dict[str, Any]:
        watch = {} if self._watch is None else self._watch.saved_state()
        return {"keeper": self._keeper.state_dict(), "watch": watch, "norm": self._norm}

    # ---- for what watches

    def begin_round(self, trainer: pl.Trainer) -> None:
        """A round is about to be judged, which counts only once the Trainer has counted it."""
        self._round = _OpenRound(trainer, trainer.global_step, self._state())

    def judge(self, at: int, norm: float, decisions: list[Decision]) -> None:
        """Take note of what detectors say of a step or round.

        Args:
            at: its number.
            norm: L2 norm of its gradient.
            decisions: one, or those for several clients.
        """
        self._norm = norm
        self._keeper.decide(decisions)
        decision = self._keeper.decision
        row = (at, norm, decision.statistic, decision.threshold, self.scale, decision.critical)
        if self._round is None:
            self.record.add(*row)
        else:
            self._round.row = row

    def observe(self, at: int, observation: Observation) -> None:
        """Judge a step or round by one observation."""
        norm = math.sqrt(math.fsum(n * n for n in observation.layer_norms))
        self.judge(at, norm, [self._keeper.detect(observation)])

    def _settle(self) -> None:
        """If the Trainer has counted the round that was judged, that is final."""
        if self._round is not None and self._round.trainer.global_step > self._round.number:
            if self._round.row is not None:
                self.record.add(*self._round.row)
            self._round = None


@dataclass
class _OpenRound:
    """A round that was judged and may yet fail."""

    trainer: pl.Trainer
    number: int
    before: dict[str, Any]
    row: tuple[int, float, float, float, float, bool] | None = None


def noise_in_words(noise: NoiseScale, unit: str, more: str) -> str:
    """What is known of the noise scale, and what would be enough where nothing is.

    Args:
        noise: all of it.
        unit: "round" or "step".
        more: what there could be more of in each of them: "as many clients", "as large batches".

    Example:
        >>> from lightning_fedscale.phases.noise import Look, noise_scale
        >>> little = noise_scale([Look(0.5 + (-1) ** i, 2.0, 32.0, 2.0) for i in range(10)])
        >>> print(noise_in_words(little, "round", "as many clients").partition(": ")[2])
        about 5.7 (at least 1.4) times as many rounds, or about 10 (at least 1.6) times as many clients, would be enough
    """
    if noise.enough:
        return f"gradient noise scale {noise.scale:,.0f} samples ({noise.low:,.0f} to {noise.high:,.0f})"
    said = "not enough evidence on the gradient noise scale"
    if noise.looks < FEWEST:
        return f"{said}: {FEWEST} looks at it are the least, and there were {noise.looks}: train for more {unit}s"
    known = f"{noise.low:,.0f} to {noise.high:,.0f}" if noise.high < math.inf else f"above {noise.low:,.0f}"
    times = noise.needed[0] / noise.looks, noise.needed[1] / noise.looks
    ways = [f"{_times(times)} times as many {unit}s"] if times[1] < math.inf else []
    if noise.shortfall[1] < math.inf:
        ways.append(f"{_times(noise.shortfall)} times {more}")
    remedy = f"{', or '.join(ways)}, would be enough" if ways else "there is no sign of a gradient in the noise"
    return f"{said} ({known} samples, with 95 % confidence): {remedy}"


def _times(factors: tuple[float, float]) -> str:
    """By the mean, and at least."""
    mean, least = factors
    return f"about {mean:.2g} (at least {least:.2g})" if mean < math.inf else f"at least {least:.2g}"


def _choice(name: str, value: Any, *choices: Any) -> None:
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={value!r}: choose {', '.join(others)} or {last}.")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: pass a whole number, at least {least}.")
