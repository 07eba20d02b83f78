"""The batches of a wave's clients, grouped by signature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_fedscale.core.executors.device_cache import DeviceData
from lightning_fedscale.core.executors.round_context import RoundContext
from lightning_fedscale.core.executors.transfer import Transfer
from lightning_fedscale.core.executors.vectorized.rng import ClientStreams
from lightning_fedscale.core.executors.vectorized.rows import Rows
from lightning_fedscale.core.executors.vectorized.stacking import Opened, opened, stacked
from lightning_fedscale.core.plan import LocalWork
from lightning_fedscale.devices.profiling.batches import BatchSignature, signature_of


class StepBatch(NamedTuple):
    """A batch of each of some clients, which have one signature and so share a step."""

    rows: Rows
    batch: Opened  # stacked
    alone: Callable[[int], Any]  # each client's batch as in sequential training
    samples: list[int]
    batch_size: int  # as Lightning would read it off each batch

    def signature(self) -> BatchSignature:
        """Return the batch signature, which all the batches share."""
        return signature_of(self.batch.close(self.batch.tensors)).without_rows().anonymous()

    def weight(self, device: torch.device) -> Tensor | int:
        """Return the samples in each batch; a single number if they are all the same."""
        if len(set(self.samples)) == 1:
            return self.samples[0]
        return torch.tensor(self.samples, dtype=torch.float64).to(device, non_blocking=True)


class WaveBatches:
    """Fetches the batches of a wave's clients and stacks those that have one signature.

    Args:
        trainer: the Trainer.
        transfer: brings batches to the device.
        rows: returns the selection of some rows.
    """

    def __init__(self, trainer: pl.Trainer, transfer: Transfer, rows: Callable[[Sequence[int]], Rows]) -> None:
        self._trainer = trainer
        self._transfer = transfer
        self._rows = rows

    def are_cut(self, context: RoundContext) -> bool:
        """Return whether batches of many clients are cut from cached data at once rather than collated singly."""
        return context.cache is not None and not self._transfer.has_hooks

    def of_step(
        self,
        context: RoundContext,
        wave: list[LocalWork],
        active: list[int],
        batch_idx: int,
        streams: ClientStreams,
        user_code_ran: Callable[[], None],
    ) -> Iterator[StepBatch]:
        """Yield the batches of a step, one for each signature.

        Args:
            context: the round.
            wave: the wave's clients.
            active: the rows of those that have a batch left.
            batch_idx: number of the batch within each client's round.
            streams: random streams of the clients.
            user_code_ran: called after the loader and the transfer hooks, which are the user's code, made a batch.
        """
        if self.are_cut(context):
            assert context.cache is not None
            by_size: dict[int, list[int]] = {}
            for row in active:
                by_size.setdefault(len(wave[row].batches[batch_idx]), []).append(row)
            for size, members in by_size.items():
                indices = [wave[row].batches[batch_idx] for row in members]
                convert = self._trainer.precision_plugin.convert_input
                batch = opened(convert(context.cache.stacked(indices)))

                def cut(position: int, cache: DeviceData = context.cache, indices: list[list[int]] = indices) -> Any:
                    return self._trainer.precision_plugin.convert_input(cache.batch(indices[position]))

                yield StepBatch(self._rows(members), batch, cut, [size] * len(members), size)
            return
        found: dict[Any, tuple[list[int], list[Any], list[Opened]]] = {}
        for row in active:
            with streams.of(row):
                batch = next(context.batches)
                if batch is None:
                    continue
                if batch_idx or wave[row] is not context.first:
                    # The first batch of a round was already transferred, in the Trainer's own loop.
                    batch = self._transfer(batch)
            user_code_ran()
            parts = opened(batch)
            members, batches, each = found.setdefault(parts.signature, ([], [], []))
            members.append(row)
            batches.append(batch)
            each.append(parts)
        for members, batches, each in found.values():
            samples = [len(wave[row].batches[batch_idx]) for row in members]
            size = extract_batch_size(batches[0])
            yield StepBatch(self._rows(members), stacked(each), batches.__getitem__, samples, size)
