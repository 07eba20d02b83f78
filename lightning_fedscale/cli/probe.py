"""``fedscale probe``: find the largest batch that fits, without a Trainer."""

from __future__ import annotations

import json as json_format
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from lightning_fedscale.devices import MemoryModel, ProbeResult, estimate_memory
from lightning_fedscale.devices import probe as find_batch
from lightning_fedscale.devices.classes import budget_in_bytes
from lightning_fedscale.devices.profiling.samples import largest_sample
from lightning_fedscale.study.loaders import train_loader
from lightning_fedscale.utils.checks import integer
from lightning_fedscale.utils.memory import format_bytes, free_memory


def probe(
    module: pl.LightningModule,
    data: pl.LightningDataModule | None = None,
    budget: str | list[int | str] = "auto",
    headroom: float = 0.1,
    precision: str = "32-true",
    max_samples: int | None = None,
    json: bool = False,
) -> None:
    """Find the largest batch that fits, without training and without using the memory.

    Args:
        module: class of the LightningModule, such as my_package.MyModule; its arguments follow as --module.name.
        data: class of the LightningDataModule, if the module itself has no train_dataloader.
        budget: memory that may be used: bytes, '8GiB', a device class such as 'phone', or 'auto' for the free memory
            of this machine; several in a list, '[8GiB, phone, t4]'.
        headroom: share of each budget to leave free.
        precision: precision, as for a Trainer.
        max_samples: limit of the batch size; 16,777,216 by default.
        json: print one JSON object instead of tables.
    """
    limit = None if max_samples is None else integer("max_samples", max_samples)
    budgets = {str(name): _bytes(str(name)) for name in ([budget] if isinstance(budget, str) else budget)}
    if not budgets:
        raise ValueError("budget=[]: pass an amount of memory, or several in a list.")
    if "auto" in budgets and torch.cuda.is_available():
        module.cuda()  # whose memory the budget is
    model = estimate_memory(module, _batch(module, data), precision=precision)
    found = {name: find_batch(model, amount, headroom=headroom, limit=limit) for name, amount in budgets.items()}
    if json:
        print(json_format.dumps({name: result.state_dict() for name, result in found.items()}))
        return
    _show(Console(soft_wrap=True), model, found)


def _bytes(budget: str) -> int:
    amount = budget_in_bytes("budget", budget)
    return free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")) if amount is None else amount


def _batch(module: pl.LightningModule, data: pl.LightningDataModule | None) -> Any:
    """Collate two of the largest samples with the project's own loader."""
    loader = train_loader(module, data)
    sample = largest_sample(loader.dataset).sample
    return loader.collate_fn(sample if loader.batch_sampler is None else [sample] * 2)


def _show(console: Console, model: MemoryModel, found: dict[str, ProbeResult]) -> None:
    table = Table("Budget", "Bytes", "Largest batch", "Predicted peak", "Per sample", "Limited by")
    for column in table.columns[1:5]:
        column.justify = "right"
    for name, result in found.items():
        table.add_row(
            name, format_bytes(result.budget), f"{result.max_batch:,}", format_bytes(result.predicted_bytes),
            format_bytes(result.bytes_per_sample), result.limited_by,
        )  # fmt: skip
    console.print(table)
    parts = Table("Part", *found)
    for column in parts.columns[1:]:
        column.justify = "right"
    for part in dict.fromkeys(part for result in found.values() for part in result.parts):
        parts.add_row(part, *(format_bytes(result.parts.get(part, 0)) for result in found.values()))
    console.print(parts)
    if model.assumed:
        console.print(f"The memory that libraries keep could not be measured and is assumed: {model.assumed}")
    if model.fallback:
        console.print(f"The training step depends on its data, so the probe ran it with real tensors: {model.fallback}")
