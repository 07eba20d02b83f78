"""Dry runs of a module's training step on a copy, to measure memory and cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter, tree_map_only

from lightning_fedscale.devices.profiling.batches import resized, samples_in
from lightning_fedscale.devices.profiling.copies import copied, copy_of_batch
from lightning_fedscale.devices.profiling.costs import StepCost
from lightning_fedscale.devices.profiling.memory_tracker import (
    BATCH,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    MemoryTracker,
    Peak,
)
from lightning_fedscale.devices.profiling.scratch import Scratch
from lightning_fedscale.devices.profiling.stubs import ManualOptimizer, ManualScheduler, TrainerView, silence
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.moved import renamed
from lightning_fedscale.utils.randomness import untouched

__getattr__ = renamed(__name__, {"Rehearsal": "DryRun", "Rehearsed": "DryRunResult"})

MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
WHOLE = {
    "32-true": torch.float32, "64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16,
}  # fmt: skip

_SAMPLES_TO_LEARN = 24
_FLOPS_TO_LEARN = 2e11
_BYTES_TO_LEARN = 2**31

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class DryRunResult(NamedTuple):
    """The result of a dry run.

    Attributes:
        peak: the moment of the largest memory, over two optimizer steps.
        cost: cost of one local batch with existing optimizer state.
        kept: bytes of code and buffers that libraries keep afterwards.
    """

    peak: Peak
    cost: StepCost
    kept: int


class DryRun:
    """Dry run of a module's training step on a copy: it logs nothing, moves no generator and keeps nothing.

    The order is Lightning's: forward, drop the gradients of the last step, backward, optimizer step. It runs twice,
    since the first step creates the optimizer's state.

    Args:
        module: a module with ``training_step`` and ``configure_optimizers``, like a LightningModule; may be on the meta
            device.
        batch: a real batch, resized by repeating its samples.
        optimizer: makes the optimizer from the parameters; None for the module's own.
        precision: as in a Trainer.
        make_batch: returns a real batch of this many samples if ``batch`` cannot be resized.
        accumulate: batches per optimizer step.
        cuda: whether to simulate CUDA, with memory blocks of 512 bytes and optimizers that update all parameters at
            once.
        on_cpu: whether to run on the CPU, wherever the module is.
        learns: whether the temporary memory of this machine's operators counts.
        trainer: the module's ``self.trainer``; the module may read from it.

    Raises:
        ValueError: if the precision is unknown, or the batch cannot be resized.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        *,
        optimizer: MakeOptimizer | None = None,
        precision: str = "32-true",
        make_batch: Callable[[int], Any] | None = None,
        accumulate: int = 1,
        cuda: bool = False,
        on_cpu: bool = False,
        learns: bool = True,
        trainer: Any = None,
    ) -> None:
        checks.one_of("precision", precision, [*MIXED, *WHOLE])
        if not callable(getattr(module, "training_step", None)):
            raise TypeError(f"module={type(module).__name__}: it has no training_step: pass a LightningModule.")
        if make_batch is None:
            samples_in(batch)
        self._module = module
        self._batch = batch
        self._optimizer = optimizer
        self._precision = precision
        self._make_batch = make_batch
        self._accumulate = accumulate
        self._cuda = cuda
        self._on_cpu = on_cpu
        self._trainer = trainer
        self._scratch = Scratch() if learns and not cuda else None
        self._learned_up_to = 0

    @property
    def makes_batches(self) -> bool:
        """Whether every dry run makes a real batch, and so takes the memory of one."""
        return self._make_batch is not None

    @property
    def learns(self) -> bool:
        """Whether the temporary memory of operators counts, which `learn` measures."""
        return self._scratch is not None

    def run(
        self, samples: int, *, fake: bool = True, stop_at: int | None = None, learning: bool = False
    ) -> DryRunResult:
        """Do a dry run with a batch of this many samples.

        Args:
            samples: size of the batch.
            fake: use fake tensors, which take no memory and no time, rather than real ones.
            stop_at: with real tensors, stop once more bytes than this are alive.
            learning: also run each operator on real tensors, to measure its temporary memory.

        Raises:
            OverBudget: if it was stopped.
            Exception: any exception of the module; with fake tensors the reason may be that the module is
                data-dependent.
        """
        if self._scratch is not None:
            self._scratch.begin(learning=learning or samples <= self._learned_up_to, samples=samples)
        tracker = MemoryTracker(512 if self._cuda else 1, stop_at, self._scratch, fake=fake)
        with untouched(), self.stage(samples, fake=fake) as play, tracker:
            tracker.mark(PARAMETERS, [*play.module.parameters(), *play.module.buffers()])
            tracker.mark(BATCH, tree_iter(play.batch))
            for parameter in play.module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: tracker.mark(GRADIENTS, [p.grad]))
            play.step(1)
            tracker.mark(OPTIMIZER, play.optimizer_state())
            tracker.take_cost()
            play.step(self._accumulate)
            tracker.mark(OPTIMIZER, play.optimizer_state())
            flops, moved = tracker.take_cost()
        if self._scratch is not None and learning:
            self._scratch.learned()
        kept = 0 if self._scratch is None else self._scratch.kept()
        return DryRunResult(tracker.peak(), StepCost(flops / self._accumulate, moved / self._accumulate), kept)

    def learn(self, known: DryRunResult, smallest: int) -> None:
        """Measure the temporary memory of operators on a few samples, as many as the time allows.

        Args:
            known: the dry run with the smallest batch.
            smallest: its number of samples.
        """
        assert self._scratch is not None
        affordable = min(
            smallest * _FLOPS_TO_LEARN / max(1.0, known.cost.flops), smallest * _BYTES_TO_LEARN / known.peak.total
        )
        more = int(min(max(affordable, smallest + 1), _SAMPLES_TO_LEARN if self._make_batch is None else 8))
        fewer = 16 if more > 16 else max(smallest, more // 2)  # torch has other convolutions for fewer than 16
        for samples in (fewer, more):
            with suppress(Exception):  # such a batch may be invalid for the module: the search reports this later
                self.run(samples, learning=True)
                self._learned_up_to = samples
        self._scratch.ask()

    @property
    def borders(self) -> list[int]:
        """Batches, ascending, above which some operators use another algorithm, so that the peak may even fall."""
        return [] if self._scratch is None else sorted(self._scratch.borders)

    @property
    def assumed(self) -> str:
        """Why a typical value is assumed for the libraries' memory; empty if it was measured, or if it is zero."""
        return "" if self._scratch is None else self._scratch.assumed

    def real_step(self, samples: int) -> Callable[[], None]:
        """Return a function that runs two real steps of a new copy, to measure their memory."""

        def steps() -> None:
            with untouched(), self.stage(samples, fake=False) as play:
                play.step(1)
                play.step(self._accumulate)

        return steps

    @contextmanager
    def stage(self, samples: int, *, fake: bool) -> Iterator[_Play]:
        """Make a copy of the module with its optimizers and a batch, all fake or all real, for this context only."""
        batch = None if self._make_batch is None else self._make_batch(samples)
        with ExitStack() as stack:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True)) if fake else None
            view = TrainerView(self._trainer)
            module = copied(self._module, view, mode, to_cpu=self._on_cpu)
            if self._precision in WHOLE and self._precision != "32-true":
                module.to(WHOLE[self._precision])
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            batch = resized(copy_of_batch(self._batch, mode), samples) if batch is None else copy_of_batch(batch, mode)
            silence(module, view)
            optimizers, schedulers = configured_by(module, self._optimizer)
            if self._cuda:
                _update_at_once(optimizers)
            play = _Play(module, optimizers, schedulers, batch, self._prepared(module, device), self._autocast(device))
            view.replace(optimizers=optimizers, model=module, lightning_module=module)
            if self._trainer is not None:
                play.begin()
            try:
                yield play
            finally:
                play.drop()

    def _prepared(self, module: Any, device: torch.device) -> Callable[[Any], Any]:
        """Return the function that prepares a batch for the step, by the hooks of the data module or the module."""
        data = getattr(self._trainer, "datamodule", None)
        dtype = WHOLE.get(self._precision)

        def move(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)

        def hook(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            own: Callable[..., Any] | None = getattr(module, name, None)
            return getattr(data, name) if _is_own(data, name) else own or default

        before, transfer, after = (
            hook("on_before_batch_transfer", lambda batch, dataloader_idx: batch),
            hook("transfer_batch_to_device", move),
            hook("on_after_batch_transfer", lambda batch, dataloader_idx: batch),
        )

        def prepare(batch: Any) -> Any:
            if dtype is not None and self._precision != "32-true":
                batch = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
            return after(transfer(before(batch, 0), device, 0), 0)

        return prepare

    def _autocast(self, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
        dtype = MIXED.get(self._precision)
        return nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype)


class _Play:
    """The copy, ready to run steps."""

    def __init__(
        self,
        module: Any,
        optimizers: list[Optimizer],
        schedulers: list[Any],
        batch: Any,
        prepare: Callable[[Any], Any],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.module = module
        self.batch = batch
        self._optimizers = optimizers
        self._ready = [ManualOptimizer(optimizer) for optimizer in optimizers]
        self._prepare = prepare
        self._autocast = autocast
        self._automatic = getattr(module, "automatic_optimization", True)
        self._steps = 0
        self._takes_iterator, self._takes_index = _signature_of(module.training_step)
        module.optimizers = lambda *args, **kwargs: _one_or_all(self._ready)
        waiting = [ManualScheduler(scheduler) for scheduler in schedulers]
        module.lr_schedulers = lambda: _one_or_all(waiting) if waiting else None

    def begin(self) -> None:
        """Call the module's hooks for the start of training."""
        for name in ("on_fit_start", "on_train_start", "on_train_epoch_start"):
            self._call(name)

    def step(self, batches: int) -> None:
        """Take one optimizer step over this many batches."""
        for number in range(batches):
            if not self._automatic:
                self._forward()
            elif number == batches - 1 and self._optimizers:
                self._optimizer_step(lambda: self._closure(batches, drop=batches == 1))
            else:
                self._closure(batches, drop=number == 0)
            self._steps += 1

    def optimizer_state(self) -> Iterator[Any]:
        """Yield the state of the optimizers."""
        yield from tree_iter([dict(state) for optimizer in self._optimizers for state in optimizer.state.values()])

    def drop(self) -> None:
        """Release everything."""
        del self.module, self.batch, self._optimizers, self._ready, self._prepare

    def _call(self, hook: str, *args: Any) -> None:
        if _is_own(self.module, hook):
            getattr(self.module, hook)(*args)

    def _optimizer_step(self, closure: Callable[[], Any]) -> None:
        if _is_own(self.module, "optimizer_step"):
            self.module.optimizer_step(0, self._steps, self._ready[0], closure)
        else:
            self._optimizers[0].step(closure)

    @torch.enable_grad()
    def _closure(self, batches: int, *, drop: bool) -> Any:
        loss = self._forward()
        if drop:
            for optimizer in self._optimizers:
                optimizer.zero_grad()
        if loss is not None:
            self.module.manual_backward(loss / batches)
        return loss

    def _forward(self) -> Any:
        # A step may take its batch apart or change its contents, so each step gets its own batch.
        if self._takes_iterator:
            args: tuple[Any, ...] = (self._batches(),)
        else:
            batch = self._prepare(copy_of_batch(self.batch, alias=True))
            self._call("on_train_batch_start", batch, self._steps)
            args = batch, *((self._steps,) if self._takes_index else ())
        with self._autocast():
            output = self.module.training_step(*args)
        return output.get("loss") if isinstance(output, Mapping) else output

    def _batches(self) -> Iterator[tuple[Any, int, int]]:
        """Yield batches for ``training_step(dataloader_iter)``, which may take any number."""
        while True:
            yield copy_of_batch(self.batch, alias=True), self._steps, 0


def _is_own(owner: Any, hook: str) -> bool:
    """Return whether a hook is defined outside of Lightning."""
    definers = (kind for kind in type(owner).__mro__ if hook in vars(kind))
    definer = next(definers, None)
    return definer is not None and definer.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")


def _signature_of(step: Any) -> tuple[bool, bool]:
    """Return whether a step takes an iterator of batches, and whether the batch index, by Lightning's rules."""
    found = inspect.getfullargspec(getattr(step, "__wrapped__", step))
    names = found.args[1:]
    return "dataloader_iter" in names, "batch_idx" in names or found.varargs is not None or len(names) >= 2


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def configured_by(module: Any, make: MakeOptimizer | None = None) -> tuple[list[Optimizer], list[Any]]:
    """Return new optimizers of a module's parameters, its own or made by ``make``, and its learning rate schedulers."""
    if make is not None:
        return [make([parameter for parameter in module.parameters() if parameter.requires_grad])], []
    configured = module.configure_optimizers()
    given: Any = []
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], list):
        configured, given = configured
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    schedulers = list(given) if isinstance(given, (list, tuple)) else [given]
    schedulers += [each["lr_scheduler"] for each in listed if isinstance(each, dict) and each.get("lr_scheduler")]
    optimizers = [each["optimizer"] if isinstance(each, dict) else each for each in listed if each is not None]
    return (
        [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers],
        [each["scheduler"] if isinstance(each, dict) else each for each in schedulers],
    )


def _update_at_once(optimizers: list[Optimizer]) -> None:
    """Set ``foreach`` updates, which torch chooses by itself for parameters on CUDA."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
