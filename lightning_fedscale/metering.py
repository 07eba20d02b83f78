"""What a module's steps cost in floating-point operations, counted and not guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_fedscale.devices.batches import Form
from lightning_fedscale.devices.operators import UNKNOWN, Operator, OperatorCounter
from lightning_fedscale.devices.rehearsal import copied, optimizers_of
from lightning_fedscale.devices.stubs import ManualOptimizer, silence
from lightning_fedscale.model_size import ParameterCounts, count_parameters
from lightning_fedscale.randomness import untouched
from lightning_fedscale.types import ClientCost

_TEXT = (torch.int32, torch.int64)


class BatchCost(NamedTuple):
    """What one batch costs in training.

    Attributes:
        forward: FLOPs of the step without its backward pass.
        backward: FLOPs of the backward pass.
        optimizer: operations of an optimizer step; of all of them in the batch where optimization is manual.
        tokens: tokens in it, or samples.
        samples: samples in it.
    """

    forward: float
    backward: float
    optimizer: float
    tokens: float
    samples: int

    @property
    def flops(self) -> float:
        """Forward and backward: what scaling laws mean by compute."""
        return self.forward + self.backward


class Meter:
    """Counts FLOPs of a module's own steps, once for each form of batch and each set of trainable parameters.

    A step runs on a copy of the module with tensors that have no contents, so it takes neither time nor memory; where
    its computation depends on contents, on a real copy and a batch of zeros.

    Args:
        trainer: the Trainer.
        module: the module.
        tokens_fn: tokens in a batch, told from its shapes: its tensors have no contents. None counts the entries of the
            first tensor if that holds integers in two dimensions (samples and positions), else samples.

    Attributes:
        operators: every operator that was met, by name.
        uncounted: share of a step's measured time in operators whose FLOPs are not known, the largest that was seen;
            NaN if it could not be measured.
        counts_text: whether batches are tokens of text, by the default rule.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, tokens_fn: Callable[[Any], float] | None = None
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._tokens_fn = tokens_fn
        self._known: dict[Any, BatchCost] = {}
        self.operators: dict[str, Operator] = {}
        self.uncounted = 0.0
        self.counts_text = False
        self.evaluations = Evaluations()
        self._parameters: list[nn.Parameter] = []
        self._sizes: dict[tuple[bool, ...], ParameterCounts] = {}
        self.refresh()

    # ---- the module as it is now

    def refresh(self) -> None:
        """Look again which parameters there are."""
        named = dict(self._module.named_parameters())
        pruned = any(name.endswith("_orig") for name in named)
        if pruned or list(map(id, self._parameters)) != list(map(id, named.values())):
            self._parameters, self._sizes = list(named.values()), {}

    @property
    def size(self) -> ParameterCounts:
        """The module's parameters, as they are trainable now."""
        if (flags := self._flags()) not in self._sizes:
            self._sizes[flags] = count_parameters(self._module)
        return self._sizes[flags]

    def _flags(self) -> tuple[bool, ...]:
        return tuple([parameter.requires_grad for parameter in self._parameters])

    # ---- costs

    def training(self, form: Form, example: Any = None) -> BatchCost:
        """The cost of a training batch.

        Args:
            form: of the batch.
            example: such a batch, for forms that do not say all about it.
        """
        return self._cost("training_step", form, example)

    def evaluation(self, form: Form, example: Any = None, step: str = "validation_step") -> float:
        """The FLOPs of a batch of ``validation_step`` or ``test_step``."""
        return self._cost(step, form, example).forward

    def client(self, forms: Mapping[Form, int], steps: int) -> ClientCost:
        """What a client's training cost.

        Args:
            forms: how many of its batches had which form.
            steps: its batches.
        """
        costs = [(self.training(form), number) for form, number in forms.items()]
        repeats = self.evaluations.take() / steps if self.evaluations.counting else 1.0
        if self._module.automatic_optimization:
            every = self._trainer.accumulate_grad_batches
            optimizer = -(-steps // every) * max((cost.optimizer for cost, _ in costs), default=0.0)
        else:
            optimizer = sum(cost.optimizer * number for cost, number in costs)
        return ClientCost(
            sum(cost.forward * number for cost, number in costs) * repeats,
            sum(cost.backward * number for cost, number in costs) * repeats,
            optimizer,
            sum(cost.tokens * number for cost, number in costs),
        )

    def _cost(self, step: str, form: Form, example: Any) -> BatchCost:
        form = form.anonymous()
        key = step, form, self._flags()
        if key not in self._known:
            self._known[key] = self._count(step, form.empty() if form.known else example)
        return self._known[key]

    def _count(self, step: str, batch: Any) -> BatchCost:
        training = step == "training_step"
        tokens, samples = self._tokens(batch) if training else 0.0, _samples(batch)
        with untouched():
            try:
                counter = self._run(step, batch, fake=True)
            except Exception:
                try:
                    counter = self._run(step, batch, fake=False)
                except Exception as error:
                    rank_zero_warn(
                        f"ComputeAccounting: the FLOPs of {step} are left out, since it cannot run on a copy of the"
                        f" module ({type(error).__name__}: {error})."
                    )
                    return BatchCost(0.0, 0.0, 0.0, tokens, samples)
            self._note(counter, step, batch)
        flops = counter.flops
        return BatchCost(flops["forward"], flops["backward"], flops["optimizer"], tokens, samples)

    def _note(self, counter: OperatorCounter, step: str, batch: Any) -> None:
        for name, operator in counter.operators.items():
            seen = self.operators.setdefault(name, Operator(operator.kind))
            seen.calls, seen.flops = seen.calls + operator.calls, seen.flops + operator.flops
        if any(operator.kind == UNKNOWN for operator in counter.operators.values()):
            # How much they matter only time can tell.
            try:
                share = self._run(step, batch, fake=False, timed=True).uncounted_share()
            except Exception:
                share = math.nan
            self.uncounted = share if math.isnan(share) else max(self.uncounted, share)

    def _run(self, step: str, batch: Any, *, fake: bool, timed: bool = False) -> OperatorCounter:
        mode, counter = FakeTensorMode(allow_non_fake_inputs=True) if fake else None, OperatorCounter(timed)
        training = step == "training_step"
        with mode or nullcontext(), _slow_path():
            twin: Any = copied(self._module, mode)
            twin.train(training)
            silence(twin, self._trainer)
            device = next((parameter.device for parameter in twin.parameters()), torch.device("cpu"))
            batch = _brought(batch, device, mode)
            optimizers = _plain(optimizers_of(twin)) if training else []
            _watch(twin, optimizers, counter)
            function = getattr(twin, step)
            takes_index = is_param_in_hook_signature(getattr(self._module, step), "batch_idx", min_args=2)
            with counter, torch.set_grad_enabled(training):
                with self._trainer.precision_plugin.forward_context():
                    output = function(*((batch, 0) if takes_index else (batch,)))
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if training and twin.automatic_optimization and isinstance(loss, Tensor):
                    with _phase(counter, "backward"):
                        loss.backward()  # type: ignore[no-untyped-call]
                    for _ in range(2):  # the first step makes the optimizer's state
                        counter.flops["optimizer"] = 0.0
                        for optimizer in optimizers:
                            optimizer.step(lambda: loss.detach())  # type: ignore[arg-type, return-value]
        return counter

    def _tokens(self, batch: Any) -> float:
        if self._tokens_fn is None:
            first = next((leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor)), None)
            if first is not None and first.dtype in _TEXT and first.ndim == 2:
                self.counts_text = True
                return float(first.numel())
            return float(_samples(batch))
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                tokens = self._tokens_fn(_brought(batch, torch.device("cpu"), mode))
        except Exception as error:
            raise ValueError(
                "tokens_fn failed on a batch whose tensors have shapes but no contents"
                f" ({type(error).__name__}: {error}): tell the number of tokens from shapes."
            ) from error
        if isinstance(tokens, bool) or not isinstance(tokens, Real) or not 0 < float(tokens) < float("inf"):
            what = "a tensor, whose contents are not known" if isinstance(tokens, Tensor) else repr(tokens)
            raise ValueError(f"tokens_fn returned {what}: return a number above 0, told from the batch's shapes.")
        return float(tokens)


class Evaluations(pl.Callback):
    """Counts backward passes for optimizers that ask for more than one in a step."""

    def __init__(self) -> None:
        self.counting = False
        self._number = 0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """One more."""
        self._number += 1

    def take(self) -> int:
        """How many there were since the last time."""
        number, self._number = self._number, 0
        return number


def _leaves(batch: Any) -> list[Any]:
    return tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)


def _samples(batch: Any) -> int:
    """As Lightning does: the length of the first tensor that has one."""
    return next((len(leaf) for leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _brought(batch: Any, device: torch.device, mode: FakeTensorMode | None) -> Any:
    def bring(tensor: Tensor) -> Tensor:
        return (tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)).to(device)

    return tree_map_only(Tensor, bring, batch)


def _plain(optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Optimizers whose arithmetic can be seen, not in one fused operator."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update({name: False for name in ("foreach", "fused") if name in group})
    return optimizers


def _watch(twin: Any, optimizers: list[torch.optim.Optimizer], counter: OperatorCounter) -> None:
    """Let the counter know what operators are for, in manual optimization too."""

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with _phase(counter, "backward"):
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    twin.manual_backward = backward
    for optimizer in optimizers:

        def step(*args: Any, own: Any = optimizer.step, **kwargs: Any) -> Any:
            with _phase(counter, "optimizer"):
                return own(*args, **kwargs)

        optimizer.step = step  # type: ignore[method-assign]
    listed = [ManualOptimizer(optimizer) for optimizer in optimizers]
    twin.optimizers = lambda *_, **__: listed[0] if len(listed) == 1 else listed


@contextmanager
def _phase(counter: OperatorCounter, phase: str) -> Iterator[None]:
    before, counter.phase = counter.phase, phase
    try:
        yield
    finally:
        counter.phase = before


@contextmanager
def _slow_path() -> Iterator[None]:
    """Without the fused transformer layer of evaluation, whose products cannot be seen."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
