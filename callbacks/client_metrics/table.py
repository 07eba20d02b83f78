"""The values that each rank found for its clients, combined on all ranks in one collective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_fedscale.callbacks.client_metrics.module_copy import Found
from lightning_fedscale.types import FloatArray
from lightning_fedscale.utils import collectives


class ClientTable:
    """A table of clients and metrics to which every rank contributes the rows of its clients.

    Its columns are the names that any client of any rank has logged so far. If a rank finds a new name, all ranks
    exchange their names and sum again; usually this happens only in the first evaluation.

    Args:
        judge: returns whether higher is better, given a name and the ``higher_is_better`` of the metric.
        device: device of the tensors that are sent between ranks.

    Attributes:
        higher_is_better: by name; its names are the columns.
    """

    def __init__(self, judge: Callable[[str, bool | None], bool], device: torch.device) -> None:
        self._judge = judge
        self._device = device
        self.higher_is_better: dict[str, bool] = {}

    def put_together(
        self, clients: Sequence[int], mine: Mapping[int, Mapping[str, Found]], *, failed: bool = False
    ) -> dict[str, FloatArray] | None:
        """Combine every client's values by name; call it on all ranks.

        Args:
            clients: all clients that are evaluated, on any rank.
            mine: values of this rank's clients.
            failed: whether this rank failed.

        Returns:
            Values by name, NaN for clients that did not log it; None if a rank failed.
        """
        found = {name: each for logged in mine.values() for name, each in logged.items()}
        own = {name: self._judge(name, each.higher_is_better) for name, each in found.items()}
        while True:
            news = not own.keys() <= self.higher_is_better.keys()
            total = self._table(clients, mine, [news, failed])
            collectives.sum_over_ranks(total)
            if total[-1]:
                return None
            if not total[-2]:
                return self._columns(total[:-2].view(len(clients), -1, 2).cpu().numpy())
            for theirs in collectives.gather_over_ranks(own, self._device):
                self.higher_is_better = dict(sorted({**theirs, **self.higher_is_better}.items()))

    def _table(self, clients: Sequence[int], mine: Mapping[int, Mapping[str, Found]], flags: list[bool]) -> Tensor:
        table = np.zeros((len(clients), len(self.higher_is_better), 2))
        for row, client in enumerate(clients):
            for column, name in enumerate(self.higher_is_better):
                if (each := mine.get(client, {}).get(name)) is not None:
                    table[row, column] = each.value, 1.0
        return torch.tensor([*table.ravel(), *map(float, flags)], dtype=torch.float64, device=self._device)

    def _columns(self, table: FloatArray) -> dict[str, FloatArray]:
        values = np.where(table[..., 1] > 0, table[..., 0], np.nan)
        return {name: values[:, column] for column, name in enumerate(self.higher_is_better)}
