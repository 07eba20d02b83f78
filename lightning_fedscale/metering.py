"""What a training step costs in floating-point operations, counted and not guessed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves, tree_map_only

from lightning_fedscale.devices.batches import Form, samples_in
from lightning_fedscale.devices.costs import bytes_moved_by, flops_of
from lightning_fedscale.devices.rehearsal import copied, optimizers_of
from lightning_fedscale.devices.stubs import ManualOptimizer, silence
from lightning_fedscale.randomness import untouched


class BatchCost(NamedTuple):
    """What one batch costs in training.

    Attributes:
        forward: FLOPs of the training step.
        backward: FLOPs of the backward pass; those of a module that optimizes manually are in ``forward``.
        optimizer: FLOPs of an optimizer step; 0 for optimizers that treat every element alone.
        samples: samples in the batch.
        tokens: tokens in it, or samples.
        uncounted: share of the bytes that move through operators whose FLOPs should count and are not known.
    """

    forward: float
    backward: float
    optimizer: float
    samples: int
    tokens: float
    uncounted: float

    @property
    def flops(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


class Meter:
    """Counts FLOPs of a module's own steps, once for each form of batch.

    A step runs on a copy of the module with tensors that have no contents, so it takes neither time nor memory; where
    its computation depends on contents, on a real copy and a batch of zeros. Matrix products, convolutions, attention
    and recurrent layers count, a multiply and an add as two; everything element by element does not, as is usual.

    Args:
        trainer: the Trainer.
        module: the module.
        tokens_fn: tokens in a batch, told from its shapes: it is called with a batch of zeros. None counts the entries
            of the first tensor if that holds whole numbers in two dimensions or more, else samples.

    Attributes:
        unknown: operators whose FLOPs should count and are not known, and how often they were met.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, tokens_fn: Callable[[Any], float] | None = None
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._tokens_fn = tokens_fn
        self._known: dict[Any, BatchCost] = {}
        self.unknown: Counter[str] = Counter()

    def training(self, form: Form) -> BatchCost:
        """The cost of a training batch."""
        return self._cost("training_step", form)

    def evaluation(self, form: Form, step: str = "validation_step") -> float:
        """The FLOPs of a batch of ``validation_step`` or ``test_step``."""
        return self._cost(step, form).forward

    def clients(self, forms: Mapping[Form, int]) -> tuple[float, float]:
        """FLOPs and tokens of so many training batches of these forms."""
        costs = [(self.training(form), number) for form, number in forms.items()]
        return sum(cost.flops * n for cost, n in costs), sum(cost.tokens * n for cost, n in costs)

    @property
    def uncounted(self) -> float:
        """Largest share, of any form of batch, of memory traffic in operators whose FLOPs are not known."""
        return max((cost.uncounted for cost in self._known.values()), default=0.0)

    @property
    def counts_text(self) -> bool:
        """Whether batches are tokens of text, by the default rule."""
        return any(cost.tokens != cost.samples for cost in self._known.values())

    def _cost(self, step: str, form: Form) -> BatchCost:
        key = step, form
        if key not in self._known:
            self._known[key] = self._count(step, form)
        return self._known[key]

    def _count(self, step: str, form: Form) -> BatchCost:
        with untouched():
            try:
                counts, unknown = self._run(step, form, fake=True)
            except Exception:
                counts, unknown = self._run(step, form, fake=False)
        self.unknown.update(unknown)
        batch = form.empty()
        return BatchCost(
            counts["forward"], counts["backward"], counts["optimizer"], samples_in(batch), self._tokens(batch),
            counts["uncounted bytes"] / max(1.0, counts["bytes"]),
        )  # fmt: skip

    def _run(self, step: str, form: Form, *, fake: bool) -> tuple[Counter[str], Counter[str]]:
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        with mode or nullcontext():
            twin: Any = copied(self._module, mode)
            training = step == "training_step"
            twin.train(training)
            silence(twin, self._trainer)
            device = next((p.device for p in twin.parameters()), torch.device("cpu"))
            batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), form.empty())
            optimizers = optimizers_of(twin) if training else []
            listed = [ManualOptimizer(optimizer) for optimizer in optimizers]
            twin.optimizers = lambda *_, **__: listed[0] if len(listed) == 1 else listed
            function = getattr(twin, step)
            names_index = is_param_in_hook_signature(getattr(self._module, step), "batch_idx", min_args=2)
            counter = _Counter()
            with torch.set_grad_enabled(training), counter, self._trainer.precision_plugin.forward_context():
                output = function(*((batch, 0) if names_index else (batch,)))
            loss = output["loss"] if isinstance(output, dict) else output
            if training and getattr(twin, "automatic_optimization", True) and isinstance(loss, Tensor):
                counter.phase = "backward"
                with counter:
                    loss.backward()  # type: ignore[no-untyped-call]
                counter.phase = "optimizer"
                with counter:
                    for optimizer in optimizers:
                        optimizer.step()
        return counter.counts, counter.unknown

    def _tokens(self, batch: Any) -> float:
        if self._tokens_fn is not None:
            tokens = self._tokens_fn(batch)
            if not isinstance(tokens, (int, float)) or not 0 < tokens < float("inf"):
                raise ValueError(
                    f"tokens_fn returned {tokens!r} for a batch of zeros: it must tell a number above 0 from shapes."
                )
            return float(tokens)
        first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
        if first is not None and not first.is_floating_point() and first.ndim > 1:
            return float(first.numel())
        return float(samples_in(batch))


_SHOULD_COUNT = re.compile(r"mm|conv|attention|rnn|lstm|gru|linalg|fft|cholesky|solve|svd|cdist|bilinear|ctc|quantized")
_OWN = ("aten", "prim", "prims", "profiler")


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operators cost, by phase."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "forward"
        self.counts: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.unknown[str(func)] += 1
            return result
        flops = flops_of(func, args, kwargs, result)
        self.counts[self.phase] += flops
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = bytes_moved_by(func, inputs, [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)])
        self.counts["bytes"] += moved
        if not flops and not func.is_view and (func.namespace not in _OWN or _SHOULD_COUNT.search(func.name())):
            self.unknown[func.name()] += 1
            self.counts["uncounted bytes"] += moved
        return result
