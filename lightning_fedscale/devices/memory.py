"""The memory model: how many bytes a training step takes at its fullest moment, for any batch size, and the reverse."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_fedscale.devices.profiling.costs import StepCost
from lightning_fedscale.devices.profiling.dry_run import MakeOptimizer, Rehearsal, Rehearsed
from lightning_fedscale.devices.profiling.memory_tracker import OverBudget
from lightning_fedscale.devices.profiling.search import largest_within
from lightning_fedscale.utils.memory import format_bytes, free_memory

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

UNLIMITED = 2**24
"""Largest batch that is looked for when nothing else bounds it."""

_SHARE_OF_FREE = 0.8


def estimate_memory(
    module: nn.Module,
    batch: Any,
    *,
    optimizer: MakeOptimizer | None = None,
    precision: str = "32-true",
    make_batch: Callable[[int], Any] | None = None,
    accumulate: int = 1,
    device: str = "auto",
    extras: Mapping[str, float] | None = None,
    trainer: Any = None,
    usual: int | None = None,
) -> MemoryModel:
    """Predict the memory of a module's training step, for any batch size, without using that memory.

    The unchanged ``training_step``, backward and the optimizer run twice on a copy whose tensors have no contents,
    while every storage is followed from its birth to its death. What operators take while they run is learned by
    running each of them once on a few samples, on a CPU, and what libraries keep of convolutions and recurrent layers
    by running these in a new process; of CUDA's it is not known. Nothing is logged, no random number is drawn, and the
    module stays as it is. A module whose computation depends on its data cannot run so; then real tensors on a real
    copy are followed instead, ``MemoryModel.exact`` is False, and ``MemoryModel.fallback`` says why.

    Args:
        module: a LightningModule, or anything with its ``training_step`` and ``configure_optimizers``. It may be on the
            meta device: then a model that does not fit into this machine's memory can be judged.
        batch: a real batch; its samples are repeated for other sizes. Where lengths vary, give the longest ones.
        optimizer: makes an optimizer from the parameters, ``torch.optim.AdamW``; None for the module's own.
        precision: as of a Trainer: "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true".
        make_batch: gives a batch of so many samples, where ``batch`` cannot be resized.
        accumulate: batches per optimizer step.
        device: "cpu" or "cuda", whose allocator and optimizers are imitated; "auto" for where the module is;
            "other" for another kind of machine, such as a phone, of whose operators' own memory nothing is known here.
        extras: what else training keeps, as bytes per exchanged number by name: `SIMULATED` or `ON_CLIENT`, or
            ``{"control variates": 8, "error feedback": 4}``.
        trainer: what the module finds as ``self.trainer``.
        usual: batch size with which it is known to train, in case that it takes neither one sample nor two.

    Raises:
        TypeError: if the module is none.
        ValueError: if the batch cannot be resized, or for an unknown precision or device.
        Exception: whatever ``training_step`` itself raises.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = estimate_memory(BoringModel(), torch.zeros(1, 32), optimizer=torch.optim.Adam)
        >>> model.peak(1), model.breakdown(1)["optimizer state"]
        (1708, 536)
        >>> model.max_batch(100_000)
        585
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={module!r}: pass a LightningModule.")
    if device not in ("auto", "cpu", "cuda", "other"):
        raise ValueError(f"device={device!r}: choose 'auto', 'cpu', 'cuda' or 'other'.")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r}: pass the number of batches per optimizer step, at least 1.")
    if device == "auto":
        device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    rehearsal = Rehearsal(
        module,
        batch,
        optimizer=optimizer,
        precision=precision,
        make_batch=make_batch,
        accumulate=accumulate,
        cuda=device == "cuda",
        learns=device == "cpu",
        trainer=trainer,
    )
    return MemoryModel(rehearsal, module, extras or {}, usual)


SIMULATED: Mapping[str, float] = {"global model": 8, "delta": 8, "accumulator": 8}
"""What a rank of `FederatedStrategy` keeps in float64 beside the module that trains."""

ON_CLIENT: Mapping[str, float] = {"anchor": 4}
"""What a client's own device keeps: the global weights, for its update is the difference to them."""


class MemoryModel:
    """Peak memory as a function of the batch size; made by `estimate_memory`.

    The peak is the largest of several moments (end of forward, within backward, optimizer step), each of which grows
    linearly with the batch: it is convex, not linear. So a line through two sizes is safe between them and too low
    beyond, and `max_batch` never trusts one upwards. Where torch goes another way from some batch on (convolutions of
    one by one from 16 samples, for instance), the peak leaps, up or down, and grows on both sides of the leap.

    Attributes:
        exact: whether nothing was assumed: False if it took real tensors to find out.
        fallback: why real tensors were needed; empty if they were not.
        trainable: number of trainable parameters.
        parameter_bytes: bytes of all parameters and buffers, which is what a message carries.
        smallest: the smallest batch that the module is known to take: 2 where BatchNorm refuses a single sample.
        sizes: the batch sizes that have been run so far, ascending.
    """

    def __init__(
        self, rehearsal: Rehearsal, module: nn.Module, extras: Mapping[str, float], usual: int | None = None
    ) -> None:
        self._rehearsal = rehearsal
        parameters = list(module.parameters())
        self._device = next((p.device for p in parameters if p.device.type != "meta"), torch.device("cpu"))
        exchanged = [*parameters, *module.buffers()]
        self.trainable = sum(p.numel() for p in parameters if p.requires_grad)
        self.parameter_bytes = sum(tensor.numel() * tensor.element_size() for tensor in exchanged)
        numbers = sum(tensor.numel() for tensor in exchanged)
        self._extras = {name: round(each * numbers) for name, each in extras.items()}
        self._known: dict[int, Rehearsed] = {}
        self.exact, self.fallback = True, ""
        self.smallest = self._begin(usual)

    def _begin(self, usual: int | None) -> int:
        """Run the smallest batch that the module takes, on fake tensors if that is possible."""
        imagined: Exception | None = None
        for fake in (True, False):
            for smallest in (1, 2, *([usual] if usual is not None and usual > 2 else [])):  # BatchNorm may refuse one
                try:
                    self._known[smallest] = self._rehearsal.run(smallest, fake=fake)
                except Exception as error:
                    imagined = error if fake else imagined  # of the largest: BatchNorm's refusal of one says nothing
                    own = error
                else:
                    if fake:
                        self._rehearsal.learn(self._known[smallest], smallest)
                        self._known[smallest] = self._rehearsal.run(smallest)
                    else:
                        self.exact, self.fallback = False, f"{type(imagined).__name__}: {imagined}".splitlines()[0]
                    return smallest
        raise own

    @property
    def assumed(self) -> str:
        """Why the usual is assumed of what libraries keep, where it could not be measured; empty if it was."""
        return self._rehearsal.assumed

    @property
    def sizes(self) -> list[int]:
        """The batch sizes that have been run so far, ascending."""
        return sorted(self._known)

    def peak(self, batch: int) -> int:
        """Bytes alive at the fullest moment of a step with so many samples."""
        run = self._run(batch)
        return run.peak.total + run.kept + sum(self._extras.values())

    def breakdown(self, batch: int) -> dict[str, int]:
        """The bytes of that moment by what they are for; they add up to `peak`.

        "parameters" (with buffers), "gradients", "optimizer state", "activations" (what forward leaves for backward),
        "temporaries", "batch", "libraries" (code and buffers that they keep) where there is any, and the extras by
        their names.
        """
        run = self._run(batch)
        return {**run.peak.parts, **({"libraries": run.kept} if run.kept else {}), **self._extras}

    def cost(self, batch: int) -> StepCost:
        """What a step with so many samples computes and moves, its optimizer step included."""
        return self._run(batch).cost

    def max_batch(self, budget: int, headroom: float = 0.1, limit: int | None = None) -> int:
        """The largest batch whose peak stays within a budget, as do those of all smaller ones.

        Args:
            budget: bytes.
            headroom: share of the budget to leave free, for what no model sees: the allocator's fragments, the
                libraries' own memory.
            limit: largest batch that makes sense, such as the number of samples.

        Raises:
            ValueError: if not even one sample fits; says what is missing and which part is largest. Also for a budget,
                headroom or limit that cannot be.

        Example:
            >>> from lightning.pytorch.demos.boring_classes import BoringModel
            >>> estimate_memory(BoringModel(), torch.zeros(1, 32)).max_batch(10_000, headroom=0.0)
            62
        """
        usable = usable_bytes(budget, headroom)
        limit = UNLIMITED if limit is None else _checked_samples("limit", limit)
        self.check_smallest(usable)
        excess = partial(self._excess, usable=usable)
        for border in self._rehearsal.borders:  # the last batch of an epoch may be as small
            if self.smallest < border < limit and excess(border) > 0:
                limit = border
        gentle = not self.exact or self._rehearsal.makes_batches
        return largest_within(excess, limit, start=self.smallest, gentle=gentle)

    def max_clients(self, budget: int, batch: int, headroom: float = 0.1) -> int:
        """How many clients fit side by side, each with its own weights, gradients, optimizer and batch.

        Args:
            budget: bytes.
            batch: samples in each client's batch.
            headroom: as of `max_batch`.

        Raises:
            ValueError: if not even one does.
        """
        usable = usable_bytes(budget, headroom)
        run = self._run(batch)
        shared = run.kept + sum(self._extras.values())
        own = run.peak.total
        if shared + own > usable:
            raise ValueError(
                f"budget={format_bytes(budget)} does not hold one client with a batch of {batch}: that takes"
                f" {format_bytes(shared + own)}, {format_bytes(shared + own - usable)} more than there is after"
                f" headroom={headroom:g}."
            )
        return (usable - shared) // own

    def check_smallest(self, usable: int) -> None:
        """Refuse a number of bytes that does not hold the smallest batch.

        Raises:
            ValueError: with what is missing and the largest part.
        """
        if (needed := self.peak(self.smallest)) > usable:
            part, size = max(self.breakdown(self.smallest).items(), key=lambda item: item[1])
            samples = "one sample" if self.smallest == 1 else f"{self.smallest} samples"
            raise ValueError(
                f"a step with {samples} takes {format_bytes(needed)}, {needed - usable:,} bytes more than the"
                f" {format_bytes(usable)} that may be used; the largest part is {part} with {format_bytes(size)}. Use a"
                " larger budget, a smaller model, a lower precision, activation checkpointing, or an optimizer with"
                " less state."
            )

    def table(self, batches: Sequence[int] | None = None) -> pd.DataFrame:
        """Bytes by batch size and part, one row per size; None for the sizes run so far."""
        import pandas as pd

        sizes = self.sizes if batches is None else list(batches)
        rows = [{"batch_size": size, "peak": self.peak(size), **self.breakdown(size)} for size in sizes]
        return pd.DataFrame(rows).fillna(0).astype("int64").set_index("batch_size")

    def plot(self, batches: Sequence[int] | None = None, budgets: Mapping[str, int] | None = None) -> Figure:
        """Stacked areas of memory against batch size, with budgets as lines.

        Args:
            batches: the sizes to show; None for those run so far.
            budgets: bytes by name.
        """
        from lightning_fedscale.devices.plots import plot_memory

        return plot_memory(self.table(batches), dict(budgets or {}))

    def real_step(self, batch: int) -> Callable[[], None]:
        """A function that runs two real steps on a copy, for measuring what they take."""
        return self._rehearsal.real_step(batch)

    def _run(self, batch: int, stop_at: int | None = None) -> Rehearsed:
        if batch not in self._known:
            _checked_samples("batch", batch)
            self._known[batch] = self._rehearsal.run(batch, fake=self.exact, stop_at=None if self.exact else stop_at)
        return self._known[batch]

    def _excess(self, batch: int, usable: int) -> float:
        """Bytes by which a batch does not fit; infinite if it was given up on the way."""
        shared = sum(self._extras.values())
        stop_at = usable - shared
        if not self.exact:
            # What is followed here is allocated here, whatever the budget is of.
            stop_at = min(stop_at, int(free_memory(self._device) * _SHARE_OF_FREE))
        try:
            run = self._run(batch, stop_at)
        except (OverBudget, torch.OutOfMemoryError):
            return math.inf
        return shared + run.peak.total + run.kept - usable


def _checked_samples(name: str, samples: int) -> int:
    if isinstance(samples, bool) or not isinstance(samples, numbers.Integral) or samples < 1:
        raise ValueError(f"{name}={samples!r}: pass a number of samples, at least 1.")
    return int(samples)


def usable_bytes(budget: int, headroom: float) -> int:
    """What of a budget may be used.

    Raises:
        ValueError: for a budget of nothing or a headroom outside [0, 1).
    """
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not budget > 0:
        raise ValueError(f"budget={budget!r}: pass a positive number of bytes.")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom!r}: pass the share of the budget to leave free, at least 0 and below 1.")
    return int(budget * (1 - headroom))
