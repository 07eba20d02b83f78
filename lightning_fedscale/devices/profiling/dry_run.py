"""A module's own training step, run on a copy of it: for its memory and its cost, not for its result."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

from lightning_fedscale.devices.profiling.batches import resized, samples_in
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
from lightning_fedscale.utils.randomness import untouched

MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
WHOLE = {
    "32-true": torch.float32, "64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16,
}  # fmt: skip

_SAMPLES_TO_LEARN = 24
_FLOPS_TO_LEARN = 2e11
_BYTES_TO_LEARN = 2**31

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class Rehearsed(NamedTuple):
    """What a rehearsed step took.

    Attributes:
        peak: the moment at which most memory was alive, over two optimizer steps.
        cost: of one local batch with optimizer state in place.
        kept: bytes of code and buffers that libraries keep from then on.
    """

    peak: Peak
    cost: StepCost
    kept: int


class Rehearsal:
    """A module's training step on a copy that nobody sees: nothing is logged, no generator moves, nothing is kept.

    Runs as Lightning does: forward, then gradients of the last step are dropped, backward, optimizer step; twice, since
    the first step is the one that creates the optimizer's state.

    Args:
        module: has ``training_step`` and ``configure_optimizers``, as a LightningModule; may be on the meta device.
        batch: a real batch, made into other sizes by repeating its samples.
        optimizer: makes the optimizer from the parameters; None for the module's own.
        precision: as of a Trainer.
        make_batch: gives a real batch of so many samples where ``batch`` cannot be resized.
        accumulate: batches per optimizer step.
        cuda: whether memory is given out as on CUDA, in blocks of 512 bytes and to optimizers that update all
            parameters at once.
        learns: whether what this machine's operators take while they run counts.
        trainer: what the module finds as ``self.trainer``; it may read from it.

    Raises:
        ValueError: for an unknown precision, or a batch that cannot be resized.
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
        learns: bool = True,
        trainer: Any = None,
    ) -> None:
        if precision not in MIXED and precision not in WHOLE:
            raise ValueError(f"precision={precision!r}: choose one of {', '.join(map(repr, [*MIXED, *WHOLE]))}.")
        if not callable(getattr(module, "training_step", None)):
            raise TypeError(f"module={type(module).__name__} has no training_step: pass a LightningModule.")
        if make_batch is None:
            samples_in(batch)
        self._module = module
        self._batch = batch
        self._optimizer = optimizer
        self._precision = precision
        self._make_batch = make_batch
        self._accumulate = accumulate
        self._cuda = cuda
        self._trainer = trainer
        self._scratch = Scratch() if learns and not cuda else None
        self._learned_up_to = 0

    @property
    def makes_batches(self) -> bool:
        """Whether every rehearsal takes a real batch, and so the memory of one."""
        return self._make_batch is not None

    def run(self, samples: int, *, fake: bool = True, stop_at: int | None = None, learning: bool = False) -> Rehearsed:
        """Rehearse with a batch of so many samples.

        Args:
            samples: size of the batch.
            fake: on tensors without contents, which take no memory and no time; else on real ones.
            stop_at: with real tensors, give up once so many bytes are alive.
            learning: also run each operator for real, to learn what it takes.

        Raises:
            OverBudget: if that happened.
            Exception: whatever the module raises, which with fake tensors may be because its computation depends on
                their contents.
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
        return Rehearsed(tracker.peak(), StepCost(flops / self._accumulate, moved / self._accumulate), kept)

    def learn(self, known: Rehearsed, smallest: int) -> None:
        """Learn what operators take while they run, from as few samples as tell and as the time allows.

        Args:
            known: what a step with the smallest batch took.
            smallest: its samples.
        """
        if self._scratch is None:
            return
        affordable = min(
            smallest * _FLOPS_TO_LEARN / max(1.0, known.cost.flops), smallest * _BYTES_TO_LEARN / known.peak.total
        )
        more = int(min(max(affordable, smallest + 1), _SAMPLES_TO_LEARN if self._make_batch is None else 8))
        fewer = 16 if more > 16 else max(smallest, more // 2)  # torch has other ways to convolve fewer than 16
        for samples in (fewer, more):
            with suppress(Exception):  # not every module takes them: then the search will tell
                self.run(samples, learning=True)
                self._learned_up_to = samples
        self._scratch.ask()

    @property
    def borders(self) -> list[int]:
        """Batches, ascending, above which some operators go another way, so that the peak may even fall."""
        return [] if self._scratch is None else sorted(self._scratch.borders)

    @property
    def assumed(self) -> str:
        """Why the usual is assumed of what libraries keep; empty if it was measured, or if it is nothing."""
        return "" if self._scratch is None else self._scratch.assumed

    def real_step(self, samples: int) -> Callable[[], None]:
        """Two real steps of a fresh copy, to be called where their memory is to be measured."""

        def steps() -> None:
            with untouched(), self.stage(samples, fake=False) as play:
                play.step(1)
                play.step(self._accumulate)

        return steps

    @contextmanager
    def stage(self, samples: int, *, fake: bool) -> Iterator[_Play]:
        """A copy of the module with its optimizers and a batch, all fake or all real; gone afterwards."""
        batch = None if self._make_batch is None else self._make_batch(samples)
        with ExitStack() as stack:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True)) if fake else None
            view = TrainerView(self._trainer)
            module = copied(self._module, mode, view)
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
        """What happens to a batch on its way to the step, by the hooks of the data module or the module."""
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
        """What the module prepares when training starts."""
        for name in ("on_fit_start", "on_train_start", "on_train_epoch_start"):
            self._call(name)

    def step(self, batches: int) -> None:
        """One optimizer step over so many batches."""
        for number in range(batches):
            if not self._automatic:
                self._forward()
            elif number == batches - 1 and self._optimizers:
                self._optimizer_step(lambda: self._closure(batches, drop=batches == 1))
            else:
                self._closure(batches, drop=number == 0)
            self._steps += 1

    def optimizer_state(self) -> Iterator[Any]:
        """All that the optimizers keep."""
        yield from tree_iter([dict(state) for optimizer in self._optimizers for state in optimizer.state.values()])

    def drop(self) -> None:
        """Let go of everything."""
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
        # A step may take its batch apart, or change what is in it: each gets one of its own.
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
        """What ``training_step(dataloader_iter)`` takes as many of as it likes."""
        while True:
            yield copy_of_batch(self.batch, alias=True), self._steps, 0


def _is_own(owner: Any, hook: str) -> bool:
    """Whether somebody else than Lightning defines a hook."""
    definers = (kind for kind in type(owner).__mro__ if hook in vars(kind))
    definer = next(definers, None)
    return definer is not None and definer.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")


def _signature_of(step: Any) -> tuple[bool, bool]:
    """Whether a step takes an iterator of batches, and whether it takes the number of the batch, as Lightning tells."""
    found = inspect.getfullargspec(getattr(step, "__wrapped__", step))
    names = found.args[1:]
    return "dataloader_iter" in names, "batch_idx" in names or found.varargs is not None or len(names) >= 2


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def copied(module: nn.Module, mode: FakeTensorMode | None = None, view: TrainerView | None = None) -> Any:
    """A copy with fake tensors in place of all of its own; a real copy without a mode.

    Args:
        module: of which the Trainer, its strategy, callbacks and loggers and the data module are no part, wherever it
            keeps them.
        mode: makes fake tensors.
        view: what the copy has in place of its Trainer; None for one of the Trainer that the module has.
    """
    view = view or TrainerView(getattr(module, "_trainer", None))
    try:
        with _DetachedCopyMode() if mode is None else FakeCopyMode(mode):
            twin: Any = copy.deepcopy(module, view.outside())
    except Exception as error:
        raise TypeError(
            f"module={type(module).__name__} cannot be copied, which running its steps on the side needs"
            f" ({type(error).__name__}: {error}): leave what is in the way out of its __getstate__, or open it later."
        ) from error
    if mode is not None:
        _bring_to_cpu(twin)
    for name in ("forward", "training_step", "validation_step"):
        if getattr(twin, "_compiler_ctx", None) is not None:
            vars(twin).pop(name, None)  # of torch.compile, which Lightning puts into the instance
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def copy_of_batch(batch: Any, mode: FakeTensorMode | None = None, *, alias: bool = False) -> Any:
    """A batch of the same structure and in its own types.

    Args:
        batch: tensors in whatever they come in.
        mode: makes its tensors fake; None for real ones.
        alias: with its tensors' own memory, not with copies of them.
    """
    copies = _AliasCopyMode() if alias else _DetachedCopyMode() if mode is None else FakeCopyMode(mode)
    try:
        with copies:
            return copy.deepcopy(batch)
    except Exception:
        with copies:  # what cannot be copied, such as a generator, is left alone
            return tree_map_only(Tensor, copy.deepcopy, batch)


class _DetachedCopyMode(TorchFunctionMode):
    """Copies what is left of a graph, such as the last loss in a metric, which `copy.deepcopy` refuses to do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


class _AliasCopyMode(TorchFunctionMode):
    """Copies of tensors share their memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _bring_to_cpu(module: nn.Module) -> None:
    placed: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            tensors: dict[str, Any] = own
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    if id(tensor) not in placed:
                        placed[id(tensor)] = tensor, _on_cpu(tensor)
                    tensors[name] = placed[id(tensor)][1]


def _on_cpu(tensor: Tensor) -> Tensor:
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def configured_by(module: Any, make: MakeOptimizer | None = None) -> tuple[list[Optimizer], list[Any]]:
    """Fresh optimizers of a module's parameters, its own or made by ``make``, and its learning rate schedulers."""
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
    """What torch chooses by itself for parameters on CUDA."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
