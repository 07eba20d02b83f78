"""The memory model: peak bytes of a training step for any batch size, and the largest batch for a budget."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_fedscale.devices.classes import usable_bytes
from lightning_fedscale.devices.profiling.costs import StepCost
from lightning_fedscale.devices.profiling.dry_run import DryRun, DryRunResult, MakeOptimizer
from lightning_fedscale.devices.profiling.memory_tracker import OverBudget
from lightning_fedscale.devices.profiling.search import UNLIMITED, largest_within
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.memory import format_bytes, free_memory

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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

    The unchanged ``training_step``, backward and the optimizer run twice on a copy with fake tensors, while the
    lifetime of every storage is tracked. The temporary memory of operators is measured by running each of them once on
    a few samples, on a CPU, and the memory that libraries keep for convolutions and recurrent layers by running these
    in a new process; on CUDA both are unknown. Nothing is logged, no random number is drawn, and the module does not
    change. Data-dependent modules are run with real tensors on a real copy instead; ``MemoryModel.exact`` is then
    False, and ``MemoryModel.fallback`` has the reason.

    Args:
        module: a LightningModule, or any module with ``training_step`` and ``configure_optimizers``. It may be on the
            meta device, so that models that do not fit into this machine's memory can be estimated.
        batch: a real batch; its samples are repeated for other sizes. If lengths vary, pass the longest ones.
        optimizer: makes an optimizer from the parameters, ``torch.optim.AdamW``; None for the module's own.
        precision: as in a Trainer: "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true".
        make_batch: returns a batch of this many samples, if ``batch`` cannot be resized.
        accumulate: batches per optimizer step.
        device: "cpu" or "cuda", whose allocator and optimizers are simulated; "auto" for the module's device;
            "other" for another kind of machine, such as a phone, whose operators' temporary memory is unknown.
        extras: additional memory of training, as bytes per exchanged number by name: `SIMULATED` or `ON_CLIENT`, or
            ``{"control variates": 8, "error feedback": 4}``.
        trainer: the module's ``self.trainer``.
        usual: a valid batch size of the module, in case one and two samples are invalid.

    Raises:
        TypeError: if ``module`` is not a module.
        ValueError: if the batch cannot be resized, or the precision or device is unknown.
        Exception: any exception of ``training_step`` itself.

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
    checks.one_of("device", device, ("auto", "cpu", "cuda", "other"))
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r}: pass a number of batches per optimizer step, at least 1.")
    if device == "auto":
        device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    dry_run = DryRun(
        module,
        batch,
        optimizer=optimizer,
        precision=precision,
        make_batch=make_batch,
        accumulate=accumulate,
        cuda=device == "cuda",
        on_cpu=device in ("cpu", "other"),
        learns=device == "cpu",
        trainer=trainer,
    )
    return MemoryModel(dry_run, module, extras or {}, usual)


SIMULATED: Mapping[str, float] = {"global model": 8, "delta": 8, "accumulator": 8}
"""Float64 memory of a rank of `FederatedStrategy` besides the training module."""

ON_CLIENT: Mapping[str, float] = {"anchor": 4}
"""Additional memory of a client's own device: the global weights, from which its update is computed."""


class MemoryModel:
    """Peak memory as a function of the batch size; made by `estimate_memory`.

    The peak is the largest of several moments (end of forward, within backward, optimizer step), each of which grows
    linearly with the batch, so it is convex, not linear. A line through two sizes is therefore safe between them and
    too low beyond, and `max_batch` never extrapolates upwards. If torch switches to another algorithm at some batch
    (for 1x1 convolutions at 16 samples, for instance), the peak jumps up or down, and grows on both sides of the jump.

    Attributes:
        exact: whether fake tensors sufficed; False if real tensors were needed.
        fallback: why real tensors were needed; empty if they were not.
        trainable: number of trainable parameters.
        parameter_bytes: bytes of all parameters and buffers, as in a message.
        smallest: the smallest batch that is known to be valid for the module: 2 if BatchNorm rejects a single sample.
        sizes: the batch sizes that have been run so far, ascending.
    """

    def __init__(
        self, dry_run: DryRun, module: nn.Module, extras: Mapping[str, float], usual: int | None = None
    ) -> None:
        self._dry_run = dry_run
        parameters = list(module.parameters())
        self._device = next((p.device for p in parameters if p.device.type != "meta"), torch.device("cpu"))
        exchanged = [*parameters, *module.buffers()]
        self.trainable = sum(p.numel() for p in parameters if p.requires_grad)
        self.parameter_bytes = sum(tensor.numel() * tensor.element_size() for tensor in exchanged)
        numbers = sum(tensor.numel() for tensor in exchanged)
        self._extras = {name: round(each * numbers) for name, each in extras.items()}
        self._known: dict[int, DryRunResult] = {}
        self.exact, self.fallback = True, ""
        self.smallest = self._begin(usual)

    def _begin(self, usual: int | None) -> int:
        """Run the smallest batch that is valid for the module, on fake tensors if possible."""
        imagined: Exception | None = None
        for fake in (True, False):
            for smallest in (1, 2, *([usual] if usual is not None and usual > 2 else [])):  # BatchNorm may refuse one
                try:
                    self._known[smallest] = self._dry_run.run(smallest, fake=fake)
                except Exception as error:
                    imagined = error if fake else imagined  # keep the largest batch's: BatchNorm may reject one sample
                    own = error
                else:
                    if not fake:
                        self.exact, self.fallback = False, f"{type(imagined).__name__}: {imagined}".splitlines()[0]
                    elif self._dry_run.learns:
                        self._dry_run.learn(self._known[smallest], smallest)
                        self._known[smallest] = self._dry_run.run(smallest)
                    return smallest
        raise own

    @property
    def assumed(self) -> str:
        """Why a typical value is assumed for the libraries' memory; empty if it was measured."""
        return self._dry_run.assumed

    @property
    def sizes(self) -> list[int]:
        """The batch sizes that have been run so far, ascending."""
        return sorted(self._known)

    def peak(self, batch: int) -> int:
        """Return the peak bytes of a step with this many samples."""
        run = self._run(batch)
        return run.peak.total + run.kept + self.kept_besides

    @property
    def kept_besides(self) -> int:
        """Bytes that the strategy keeps besides module and optimizer: part of `peak`, but not of `real_step`."""
        return sum(self._extras.values())

    def breakdown(self, batch: int) -> dict[str, int]:
        """Return the bytes at the peak by kind; they sum to `peak`.

        The kinds are "parameters" (with buffers), "gradients", "optimizer state", "activations" (kept by forward for
        backward), "temporaries", "batch", "libraries" (their code and buffers, if any), and the extras by their names.
        """
        run = self._run(batch)
        return {**run.peak.parts, **({"libraries": run.kept} if run.kept else {}), **self._extras}

    def cost(self, batch: int) -> StepCost:
        """Return the cost of a step with this many samples, including the optimizer step."""
        return self._run(batch).cost

    def max_batch(self, budget: int, headroom: float = 0.1, limit: int | None = None) -> int:
        """Return the largest batch for which it and all smaller batches stay within a budget.

        Args:
            budget: bytes.
            headroom: share of the budget to leave free for memory outside the model: the allocator's fragments, the
                libraries' own memory.
            limit: largest useful batch, such as the number of samples.

        Raises:
            ValueError: if not even one sample fits, with the missing bytes and the largest part; if the budget,
                headroom or limit is invalid.

        Example:
            >>> from lightning.pytorch.demos.boring_classes import BoringModel
            >>> estimate_memory(BoringModel(), torch.zeros(1, 32)).max_batch(10_000, headroom=0.0)
            62
        """
        usable = usable_bytes(budget, headroom)
        limit = UNLIMITED if limit is None else _checked_samples("limit", limit)
        self.check_smallest(budget, headroom)
        excess = partial(self._excess, usable=usable)
        for border in self._dry_run.borders:  # the last batch of an epoch may be as small
            if self.smallest < border < limit and excess(border) > 0:
                limit = border
        gentle = not self.exact or self._dry_run.makes_batches
        return largest_within(excess, limit, start=self.smallest, gentle=gentle)

    def max_clients(self, budget: int, batch: int, headroom: float = 0.1) -> int:
        """Return how many clients fit vectorized, each with its own weights, gradients, optimizer and batch.

        Args:
            budget: bytes.
            batch: samples in each client's batch.
            headroom: as in `max_batch`.

        Raises:
            ValueError: if not even one client fits.
        """
        usable = usable_bytes(budget, headroom)
        run = self._run(batch)
        shared = run.kept + self.kept_besides
        own = run.peak.total
        if shared + own > usable:
            raise ValueError(
                f"budget={format_bytes(budget)}: one client with batch={batch} takes {format_bytes(shared + own)},"
                f" {format_bytes(shared + own - usable)} more than the budget has with headroom={headroom:g}: pass a"
                " larger budget, or a smaller batch."
            )
        return (usable - shared) // own

    def check_smallest(self, budget: int, headroom: float = 0.0) -> None:
        """Reject a budget that is too small for the smallest batch.

        Args:
            budget: bytes.
            headroom: as in `max_batch`.

        Raises:
            ValueError: with the missing bytes and the largest part.
        """
        usable = usable_bytes(budget, headroom)
        if (needed := self.peak(self.smallest)) > usable:
            part, size = max(self.breakdown(self.smallest).items(), key=lambda item: item[1])
            samples = "one sample" if self.smallest == 1 else f"{self.smallest} samples"
            raise ValueError(
                f"budget={format_bytes(budget)}: a step with {samples} takes {format_bytes(needed)},"
                f" {needed - usable:,} bytes more than the {format_bytes(usable)} that headroom={headroom:g} leaves;"
                f" the largest part is {part} with {format_bytes(size)}. Use a larger budget, a smaller model, a lower"
                " precision, activation checkpointing, or an optimizer with less state."
            )

    def table(self, batches: Sequence[int] | None = None) -> pd.DataFrame:
        """Return a table of bytes by part, one row per batch size; None for the sizes run so far."""
        import pandas as pd

        sizes = self.sizes if batches is None else list(batches)
        rows = [{"batch_size": size, "peak": self.peak(size), **self.breakdown(size)} for size in sizes]
        return pd.DataFrame(rows).fillna(0).astype("int64").set_index("batch_size")

    def plot(self, batches: Sequence[int] | None = None, budgets: Mapping[str, int] | None = None) -> Figure:
        """Plot stacked areas of memory against batch size, with budgets as lines.

        Args:
            batches: the sizes to show; None for those run so far.
            budgets: bytes by name.
        """
        from lightning_fedscale.devices.plots import plot_memory

        return plot_memory(self.table(batches), dict(budgets or {}))

    def real_step(self, batch: int) -> Callable[[], None]:
        """Return a function that runs two real steps on a copy, to measure their memory."""
        return self._dry_run.real_step(batch)

    def _run(self, batch: int, stop_at: int | None = None) -> DryRunResult:
        if batch not in self._known:
            _checked_samples("batch", batch)
            self._known[batch] = self._dry_run.run(batch, fake=self.exact, stop_at=None if self.exact else stop_at)
        return self._known[batch]

    def _excess(self, batch: int, usable: int) -> float:
        """Return the bytes by which a batch exceeds the budget; infinite if its run was stopped early."""
        shared = self.kept_besides
        stop_at = usable - shared
        if not self.exact:
            # Real tensors are allocated on this machine, whichever device the budget belongs to.
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
