"""Comparison of vectorized steps with the same sequential steps, which define the correct result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_fedscale.core.executors.shared_tensors import SharedTensors
from lightning_fedscale.core.executors.step_model import StepCounts
from lightning_fedscale.core.executors.vectorized.batched_step import Logged, StepResult, logging_to, loss_of
from lightning_fedscale.core.executors.vectorized.stacking import NotVectorizable
from lightning_fedscale.core.lightning.snapshots import SavedBytes
from lightning_fedscale.utils.flat_view import as_real


class Tolerance(NamedTuple):
    """The largest difference between two values that can be due to rounding.

    Attributes:
        relative: as a fraction of the tensor's largest element.
        noise: as a fraction of the largest element of all gradients; it remains where large terms cancel.
    """

    relative: float
    noise: float


# Sums in another order differ by a few times the precision; if large terms cancel, as after a BatchNorm with a batch of
# two, by ten thousand times the precision. Wrong values mostly differ by their own size.
_TOLERANCES: Final = {
    torch.float64: Tolerance(1e-8, 1e-11),
    torch.float32: Tolerance(3e-3, 2e-5),
    torch.float16: Tolerance(2e-2, 4e-3),
    torch.bfloat16: Tolerance(1e-1, 3e-2),
}
_MOST_SIGNATURES: Final = 64  # batch signatures that are compared on their first appearance
_ROUNDED_PRODUCTS: Final = Tolerance(1e-2, 1e-3)  # float32 whose matrix products a GPU may round to TF32


class Proofs:
    """Decides which client's vectorized steps are compared with the same sequential steps, and when.

    Before the first wave, all steps of some clients are compared. In training, all steps of one client are compared in
    rounds 1, 2, 4, 8 and so on, and one step after a change of the module's Python state, of the captured steps, or of
    the batch signature. The client differs each time.

    Args:
        while_training: False for only the comparison before the first wave.
    """

    def __init__(self, *, while_training: bool) -> None:
        self._while_training = while_training
        self._fresh = True
        self._signatures: set[Any] = set()
        self._everything = False
        self._chosen: int | None = None
        self._steps: float = 0.0
        self._saved: SavedBytes | None = None
        self._counts: StepCounts | None = None
        self._useless: Callable[[], str | None] | None = None

    @contextmanager
    def of_everything(
        self, counts: StepCounts | None = None, useless: Callable[[], str | None] | None = None
    ) -> Iterator[SavedBytes]:
        """Compare every step of every client inside the context; yield the memory that a step saves for backward.

        Args:
            counts: counts the operators of the steps; None for no count.
            useless: returns, once a sequential step is counted, why vectorizing gains nothing, None if it may gain;
                None if vectorized steps are wanted in any case.
        """
        saved = self._saved = SavedBytes()
        self._everything, self._counts, self._useless = True, counts, useless
        try:
            yield saved
        finally:
            self._everything, self._saved, self._counts = False, None, None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure, inside the context, the operators of a sequential step and the memory that it saves for backward."""
        saved, self._saved = self._saved, None
        counted = nullcontext() if self._counts is None else self._counts.of_client()
        with nullcontext() if saved is None else saved, counted:
            yield

    def counting(self, clients: int) -> AbstractContextManager[None]:
        """Count the operators of a vectorized step inside the context, before the first wave.

        Raises:
            NotVectorizable: if the sequential steps show that vectorizing is useless.
        """
        if self._counts is None:
            return nullcontext()
        if self._useless is not None and (reason := self._useless()) is not None:
            raise NotVectorizable(reason)
        return self._counts.of_clients(clients)

    def counting_optimizer(self, clients: int) -> AbstractContextManager[None]:
        """Count the operators of a vectorized step of the optimizer inside the context, before the first wave."""
        return nullcontext() if self._counts is None else self._counts.of_optimizer(clients)

    @property
    def due(self) -> bool:
        """Whether a comparison is due in this wave, whatever its batch signatures."""
        return self._everything or (self._while_training and self._steps > 0)

    def open_round(self, round: int) -> None:
        """Start a round; the first round of this process is always compared."""
        if self._fresh or (round + 1).bit_count() == 1:
            self._steps = math.inf
        self._fresh = False

    def demand(self) -> None:
        """Request a comparison of the next step, after a change."""
        self._steps = max(self._steps, 1.0)

    def choose(self, row: int) -> None:
        """Set the client that is compared in the next wave if a comparison is due."""
        self._chosen = row

    def close_wave(self) -> None:
        """Mark the comparisons that were due as done."""
        self._steps = 0.0

    def watched(self, rows: Sequence[int], signature: Any, batch_idx: int) -> list[int]:
        """Return the clients that are compared in this step, by their place in ``rows``."""
        if self._everything:
            self._signatures.add(signature)
            return list(range(len(rows)))
        if not self._while_training:
            return []
        if self._chosen in rows and batch_idx < self._steps:
            self._signatures.add(signature)
            return [rows.index(self._chosen)]
        if signature not in self._signatures and len(self._signatures) < _MOST_SIGNATURES:
            self._signatures.add(signature)
            return [0]
        return []


def step_alone(
    trainer: pl.Trainer,
    shared: SharedTensors,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    batch: Any,
    batch_idx: int,
    share: float,
    measured: AbstractContextManager[Any],
) -> StepResult:
    """Run a local batch of one client in the module itself, as `FastStep` does; then restore the module's tensors.

    Args:
        trainer: the Trainer.
        shared: the module's tensors.
        parameters: the client's parameters.
        buffers: the client's buffers.
        batch: the client's batch on the device.
        batch_idx: number of the batch within the client's round.
        share: factor of the loss in the gradient.
        measured: the context of its forward and backward pass.

    Raises:
        NotVectorizable: if the step does something that vectorized clients cannot do.
    """
    module = trainer.lightning_module
    own = [*shared.trainable, *shared.buffers]
    before = [tensor.detach().clone() for tensor in own]
    frozen = shared.state_of_frozen()
    notes: list[Logged] = []
    try:
        _write(own, [*parameters, *buffers])
        for parameter in shared.trainable:
            parameter.grad = None
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with measured:
            with trainer.precision_plugin.train_step_context(), logging_to(module, notes.append), torch.enable_grad():
                output = module.training_step(*((batch, batch_idx) if takes_index else (batch,)))
            if (loss := loss_of(output)) is not None:
                (loss if share == 1.0 else loss * share).backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in shared.trainable]
        if any(gradient is not None and gradient.layout != torch.strided for gradient in gradients):
            raise NotVectorizable("a gradient is sparse")
        if any(now.shape != then.shape for now, then in zip(shared.buffers, buffers, strict=True)):
            raise NotVectorizable("training_step changes the shape of a buffer")
        shared.rebind()
        new = [buffer.detach().clone() for buffer in shared.buffers]
    finally:
        for parameter in shared.trainable:
            parameter.grad = None
        shared.put_back()
        _write(own, before)
    if shared.state_of_frozen() != frozen:
        raise NotVectorizable("training_step writes to frozen parameters, which all clients share")
    return StepResult(None if loss is None else loss.detach().reshape(()), gradients, new, notes)


def difference(mine: StepResult, row: int, alone: StepResult, names: Sequence[str], tolerance: Tolerance) -> str | None:
    """Describe how a client's vectorized step differs from its sequential step, beyond rounding; None if it does not.

    Args:
        mine: the vectorized step of several clients.
        row: the client's row.
        alone: the client's sequential step.
        names: of the parameters, then of the buffers.
        tolerance: for all compared values.
    """
    if (mine.losses is None) != (alone.losses is None):
        return "whether training_step returns a loss"
    if mine.losses is not None and (how := _apart(mine.losses[row], alone.losses, tolerance, 1.0)) is not None:
        return f"the loss {how}"
    largest = max((_largest(gradient) for gradient in alone.gradients if gradient is not None), default=0.0)
    for name, own, other in zip(names, mine.gradients, alone.gradients, strict=False):
        if (own is None) != (other is None):
            return f"whether {name} has a gradient"
        if own is not None and (how := _apart(own[row], other, tolerance, largest)) is not None:
            return f"the gradient of {name} {how}"
    for name, own, other in zip(names[len(mine.gradients) :], mine.buffers, alone.buffers, strict=True):
        if (how := _apart(own[row], other, tolerance, 0.0)) is not None:
            return f"buffer {name} {how}"
    return _difference_of_logs(mine.logged, row, alone.logged, tolerance)


def tolerance_of(trainer: pl.Trainer, shared: SharedTensors) -> Tolerance:
    """Return the tolerance for rounding errors of this module's gradients in the Trainer's precision."""
    precision = str(trainer.precision)
    if "mixed" in precision:
        return _TOLERANCES[torch.bfloat16 if "bf16" in precision else torch.float16]
    dtypes = {as_real(tensor).dtype for tensor in shared.trainable}
    coarsest = max((_TOLERANCES.get(dtype, _ROUNDED_PRODUCTS) for dtype in dtypes), default=_TOLERANCES[torch.float32])
    on_gpu = any(tensor.device.type == "cuda" for tensor in shared.trainable)
    if on_gpu and torch.float32 in dtypes and torch.get_float32_matmul_precision() != "highest":
        return max(coarsest, _ROUNDED_PRODUCTS)
    return coarsest


def is_close(mine: Tensor, theirs: Tensor, tolerance: Tolerance) -> bool:
    """Return whether two tensors are equal up to rounding."""
    return _apart(mine, theirs, tolerance, 1.0) is None


def _difference_of_logs(mine: Sequence[Logged], row: int, alone: Sequence[Logged], tolerance: Tolerance) -> str | None:
    if [note.name for note in mine] != [note.name for note in alone]:
        return f"the logged names ({_listed(mine)} instead of {_listed(alone)})"
    for own, other in zip(mine, alone, strict=True):
        if isinstance(own.values, Metric) or isinstance(other.values, Metric):
            if own.values is not other.values:
                return f"the metric logged as {own.name}"
            continue
        value, expected = (torch.as_tensor(each) for each in (own.values, other.values))
        value = value[row] if isinstance(own.values, Tensor) else value
        if (how := _apart(value, expected, tolerance, 1.0)) is not None:
            return f"the logged {own.name} {how}"
        if own.options.keys() != other.options.keys():
            return f"the arguments with which {own.name} is logged"
    return None


def _listed(notes: Sequence[Logged]) -> str:
    return ", ".join(note.name for note in notes) or "nothing"


def _apart(mine: Tensor, theirs: Tensor | None, tolerance: Tolerance, scale: float) -> str | None:
    """Describe how two tensors differ beyond rounding; None if they do not."""
    assert theirs is not None
    if mine.shape != theirs.shape:
        return f"(shape {tuple(mine.shape)} instead of {tuple(theirs.shape)})"
    if not theirs.numel():
        return None
    mine, theirs = (as_real(each.detach()) for each in (mine, theirs))
    if not theirs.is_floating_point():
        return None if torch.equal(mine.to(theirs.dtype), theirs) else f"({_first(mine)} instead of {_first(theirs)})"
    mine, theirs = mine.double(), theirs.double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    off = torch.where(same, 0.0, (mine - theirs).abs()).nan_to_num_(torch.inf).max().item()
    allowed = tolerance.relative * _largest(theirs) + tolerance.noise * scale
    return None if off <= allowed else f"(off by {off:.2g}, largest {_largest(theirs):.2g})"


def _first(tensor: Tensor) -> str:
    return str(tensor.flatten()[0].item())


def _largest(tensor: Tensor) -> float:
    finite = as_real(tensor.detach()).nan_to_num(0.0, 0.0, 0.0)
    return float(finite.abs().max()) if finite.numel() else 0.0


@torch.no_grad()
def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
