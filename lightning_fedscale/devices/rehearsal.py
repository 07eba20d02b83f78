"""A module's own training step, run on a copy of it: for its memory and its cost, not for its result."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

from lightning_fedscale.devices.batches import resized, samples_in
from lightning_fedscale.devices.costs import StepCost
from lightning_fedscale.devices.stubs import ManualOptimizer, silence
from lightning_fedscale.devices.tracker import BATCH, GRADIENTS, OPTIMIZER, PARAMETERS, MemoryTracker, Peak
from lightning_fedscale.randomness import untouched

MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
WHOLE = {
    "32-true": torch.float32, "64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16,
}  # fmt: skip

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class Rehearsed(NamedTuple):
    """What a rehearsed step took.

    Attributes:
        peak: the moment at which most memory was alive, over two optimizer steps.
        cost: of one local batch with optimizer state in place.
    """

    peak: Peak
    cost: StepCost


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

    @property
    def makes_batches(self) -> bool:
        """Whether every rehearsal takes a real batch, and so the memory of one."""
        return self._make_batch is not None

    def run(self, samples: int, *, fake: bool = True, stop_at: int | None = None) -> Rehearsed:
        """Rehearse with a batch of so many samples.

        Args:
            samples: size of the batch.
            fake: on tensors without contents, which take no memory and no time; else on real ones.
            stop_at: with real tensors, give up once so many bytes are alive.

        Raises:
            OverBudget: if that happened.
            Exception: whatever the module raises, which with fake tensors may be because its computation depends on
                their contents.
        """
        tracker = MemoryTracker(512 if self._cuda else 1, stop_at)
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
        return Rehearsed(tracker.peak(), StepCost(flops / self._accumulate, moved / self._accumulate))

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
            module = copied(self._module, mode)
            module.train()
            if self._precision in WHOLE and self._precision != "32-true":
                module.to(WHOLE[self._precision])
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            batch = resized(_imitated(self._batch, mode), samples) if batch is None else _imitated(batch, mode)
            silence(module, self._trainer)
            batch = self._moved(module, batch, device)
            optimizers = optimizers_of(module, self._optimizer)
            if self._cuda:
                _update_at_once(optimizers)
            play = _Play(module, optimizers, batch, self._autocast(device))
            module.optimizers = play.optimizers_for_module
            try:
                yield play
            finally:
                play.drop()

    def _moved(self, module: Any, batch: Any, device: torch.device) -> Any:
        for hook in ("on_before_batch_transfer", None, "on_after_batch_transfer"):
            if hook is None:
                batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
            elif (own := getattr(module, hook, None)) is not None:
                batch = own(batch, 0)
        if self._precision in WHOLE:
            dtype = WHOLE[self._precision]
            return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
        return batch

    def _autocast(self, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
        dtype = MIXED.get(self._precision)
        return nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype)


class _Play:
    """The copy, ready to run steps."""

    def __init__(
        self,
        module: Any,
        optimizers: list[Optimizer],
        batch: Any,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.module = module
        self.batch = batch
        self._optimizers = optimizers
        self._autocast = autocast
        self._automatic = getattr(module, "automatic_optimization", True)
        names = inspect.signature(module.training_step).parameters
        self._takes_index = "batch_idx" in names or len(names) > 1

    def step(self, batches: int) -> None:
        """One optimizer step over so many batches."""
        for number in range(batches):
            if not self._automatic:
                self._forward()
            elif number == batches - 1 and self._optimizers:
                self._optimizers[0].step(lambda: self._closure(batches, drop=batches == 1))
            else:
                self._closure(batches, drop=number == 0)

    def optimizer_state(self) -> Iterator[Any]:
        """All that the optimizers keep."""
        yield from tree_iter([dict(state) for optimizer in self._optimizers for state in optimizer.state.values()])

    def optimizers_for_module(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own ``self.optimizers()`` returns."""
        ready = [ManualOptimizer(optimizer) for optimizer in self._optimizers]
        return ready[0] if len(ready) == 1 else ready

    def drop(self) -> None:
        """Let go of everything."""
        del self.module, self.batch, self._optimizers

    def _closure(self, batches: int, *, drop: bool) -> Any:
        loss = self._forward()
        if drop:
            for optimizer in self._optimizers:
                optimizer.zero_grad()
        if loss is not None:
            (loss / batches).backward()
        return loss

    def _forward(self) -> Any:
        with self._autocast():
            output = self.module.training_step(self.batch, *((0,) if self._takes_index else ()))
        return output["loss"] if isinstance(output, dict) else output


def copied(module: nn.Module, mode: FakeTensorMode | None = None) -> Any:
    """A copy with fake tensors in place of all of its own; a real copy without a mode."""
    try:
        with _DetachedCopyMode() if mode is None else FakeCopyMode(mode):
            twin: Any = copy.deepcopy(module)
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


class _DetachedCopyMode(TorchFunctionMode):
    """Copies what is left of a graph, such as the last loss in a metric, which `copy.deepcopy` refuses to do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
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


def _imitated(batch: Any, mode: FakeTensorMode | None) -> Any:
    if mode is None:
        return batch
    return tree_map_only(Tensor, lambda tensor: mode.from_tensor(tensor, static_shapes=True), batch)


def optimizers_of(module: Any, make: MakeOptimizer | None = None) -> list[Optimizer]:
    """Fresh optimizers of a module's parameters, its own or made by ``make``."""
    if make is not None:
        return [make([parameter for parameter in module.parameters() if parameter.requires_grad])]
    configured = module.configure_optimizers()
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], list):
        configured = configured[0]  # the others are schedulers
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    optimizers = [each["optimizer"] if isinstance(each, dict) else each for each in listed if each is not None]
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]


def _update_at_once(optimizers: list[Optimizer]) -> None:
    """What torch chooses by itself for parameters on CUDA."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
