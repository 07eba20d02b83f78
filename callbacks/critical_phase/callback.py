"""`CriticalPhase`: detect critical phases of training, and scale updates outside of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedscale.callbacks.critical_phase.client_steps import ClientStepWatch
from lightning_fedscale.callbacks.critical_phase.history import LAYOUT, PhaseRecord
from lightning_fedscale.callbacks.critical_phase.judge import PhaseJudge
from lightning_fedscale.callbacks.critical_phase.noise_words import noise_in_words
from lightning_fedscale.callbacks.critical_phase.options import checked_options, option
from lightning_fedscale.callbacks.critical_phase.rounds import RoundWatch
from lightning_fedscale.callbacks.critical_phase.steps import StepWatch
from lightning_fedscale.core.lightning.loggers import lay_out, show
from lightning_fedscale.core.lightning.trainer_state import logs_now
from lightning_fedscale.core.options.trainer_checks import check_package
from lightning_fedscale.phases import Detector, Phase, ScaleRule
from lightning_fedscale.phases.noise import NoiseScale
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
        detector: the detector, also if its name was given.
        action, target_batch, noise_in, scale_weight_decay, every_n_steps, noise_every, seed: the arguments.
        needs_sampling_noise: the part that needs the noise of single samples without clients; None if none does.
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
        self._options = checked_options(
            detector, threshold, scale, action, level, target_batch, noise, noise_in, scale_weight_decay,
            every_n_steps, noise_every, seed,
        )  # fmt: skip
        self._judge = PhaseJudge(self._options)
        self._watch: StepWatch | RoundWatch | None = None
        self._resumed: dict[str, Any] | None = None
        self._unit = "step"
        self._undo = ExitStack()
        self.listeners: list[Any] = []  # get the round events of this callback

    # ---- values for other parts

    detector: Detector = option("detector")
    action: str = option("action")
    target_batch: float | None = option("target_batch")
    noise_in: str = option("noise_in")
    scale_weight_decay: bool = option("scale_weight_decay")
    every_n_steps: int = option("every_n_steps")
    noise_every: int | None = option("noise_every")
    seed: int = option("seed")
    needs_sampling_noise: str | None = option("needs_sampling_noise")

    @property
    def record(self) -> PhaseRecord:
        """Norms, decisions and critical spans so far."""
        return self._judge.record

    @property
    def critical(self) -> bool:
        """Whether training is in a critical phase; it is before the first observation."""
        return self._judge.critical

    @property
    def phase(self) -> Phase:
        """The current phase: whether it is critical, for how long it was not, and the noise scale."""
        return self._judge.tracker.phase

    @property
    def scale(self) -> float:
        """Current factor of updates; 1 unless ``action="scale"``."""
        return self._judge.scale

    @property
    def adds_noise(self) -> bool:
        """Whether noise is currently added."""
        return self._judge.adds_noise

    @property
    def noise_scale(self) -> NoiseScale:
        """The gradient noise scale with its interval; with clients, that of their updates."""
        return self._judge.tracker.noise

    @property
    def sampling_noise(self) -> NoiseScale:
        """The noise scale of single samples' gradients, from both halves of batches."""
        return self._judge.tracker.sampling

    def plot(self) -> Figure:
        """Plot norm and statistic over time, with critical spans shaded."""
        return self.record.plot(self._unit, self._options.detector.statistic)

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set up the observation of gradients."""
        check_package(self, trainer)
        if stage != "fit":
            return
        self._undo.close()
        before = None if self._watch is None else self._watch.saved_state()
        if trainer.global_step == 0:  # else this callback continues a run
            self._judge, before = PhaseJudge(self._options), None
        self._judge.drop_round()
        federated = isinstance(trainer.strategy, FederatedStrategy)
        self._unit = "round" if federated else "step"
        watch: Any
        if not federated:
            watch = StepWatch(self._judge)
        elif self._options.level == "step":
            watch = ClientStepWatch(self._judge)
        else:
            watch = RoundWatch(self._judge)
        kind = self._options.noise or ("reweighting" if isinstance(watch, RoundWatch) else "diagonal")
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
            self._judge.load_state_dict(self._resumed)
            self._watch.load_saved_state(self._resumed["watch"])
            self._resumed = None
        how = self._watch.attach(trainer, pl_module)
        if self._options.action == "scale":
            rank_zero_info(f"CriticalPhase: {how}.")
        lay_out(trainer, LAYOUT)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the phase, as often as the Trainer logs."""
        assert self._watch is not None
        self._watch.after_batch(trainer)
        self._judge.finish_round()
        if logs_now(trainer):
            values = {**self._judge.metrics(), **self._watch.metrics()}
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a summary and the figure of the whole run."""
        noise = self.noise_scale
        of_clients = noise.estimates > 0 and noise is self._judge.tracker.members
        words = noise_in_words(noise, self._unit, "as many clients in each" if of_clients else "as large batches")
        rank_zero_info(f"CriticalPhase: {self.record.summary(self._unit)}; {words}.")
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
        return {**vars(self), "_watch": None, "_undo": ExitStack(), "listeners": []}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume; within a round, the state from its beginning."""
        if self._resumed is not None:
            return self._resumed
        return self._judge.state_dict({} if self._watch is None else self._watch.saved_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint, once training begins."""
        self._resumed = state_dict
