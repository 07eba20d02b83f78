"""Accounting of a run: FLOPs by purpose and by client, samples and tokens, bytes, seconds, energy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PURPOSES = ("forward", "backward", "optimizer", "aggregation", "evaluation", "probing")
"""The purposes of FLOPs. "forward" and "backward" are the training compute of scaling laws: matrix products,
convolutions, attention and recurrent layers, where a multiplication and an addition count as two, including the extra
passes of local rules and personal models. "optimizer" and "aggregation" are counted per element: "optimizer" includes
what local rules add to gradients, and "aggregation" what rules, compressors and privacy do with updates. "evaluation"
is validation and test. "probing" is what callbacks compute in addition."""

_SUMS = (
    "samples", "tokens", "size_tokens", "cohort_tokens", "upload_bytes", "download_bytes", "seconds", "updates",
    "energy", "meters", "steps", "counted", "error",
)  # fmt: skip


class Ledger:
    """Sums of what a run spends.

    Attributes:
        flops: FLOPs by purpose (`PURPOSES`), over all clients and ranks.
        clients: training FLOPs of each client.
        samples: samples trained on; every pass counts.
        tokens: tokens trained on; every pass counts.
        size_tokens: sum of active parameters times tokens.
        cohort_tokens: sum of a round's number of clients times its tokens; 0 without clients.
        upload_bytes: bytes sent by clients.
        download_bytes: bytes sent to clients.
        seconds: seconds of training.
        updates: optimizer steps, or rounds if there are clients.
        energy: energy in joules, as far as it was measured.
        meters: number of readings in `energy`; 0 if energy cannot be measured.
        steps: batches trained on.
        counted: steps whose FLOPs were counted while they ran, including those that only verified the vectorized
            executor; the FLOPs of all other steps are estimated from these.
        error: standard error of the training FLOPs by this estimate, the sum of all steps' errors; 0 if all steps cost
            the same.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add(forward=2e6, backward=4e6, samples=8, tokens=8, size=1000, seconds=0.1)
        >>> ledger.training_flops, ledger.average_params
        (6000000.0, 1000.0)
    """

    def __init__(self) -> None:
        self.flops = dict.fromkeys(PURPOSES, 0.0)
        self.clients: dict[int, float] = {}
        self.samples = self.tokens = self.size_tokens = self.cohort_tokens = 0.0
        self.upload_bytes = self.download_bytes = self.seconds = self.updates = 0.0
        self.energy = self.meters = 0.0
        self.steps = self.counted = self.error = 0.0

    @property
    def training_flops(self) -> float:
        """FLOPs of forward and backward, the compute of scaling laws."""
        return self.flops["forward"] + self.flops["backward"]

    @property
    def flops_interval(self) -> tuple[float, float]:
        """95 % interval of the training FLOPs, which are estimated where steps cost differently."""
        return max(0.0, self.training_flops - 1.96 * self.error), self.training_flops + 1.96 * self.error

    @property
    def average_params(self) -> float:
        """Active parameters, averaged over tokens (the average size of arXiv 2501.12486)."""
        return self.size_tokens / self.tokens if self.tokens else 0.0

    @property
    def average_cohort(self) -> int:
        """Number of clients that train in a round, averaged over tokens and rounded; 1 without clients."""
        return max(1, round(self.cohort_tokens / self.tokens)) if self.tokens else 1

    @property
    def six_n_ratio(self) -> float:
        """Training FLOPs over ``6 parameters tokens``: near 1 for transformers, more if weights are reused."""
        return self.training_flops / (6.0 * self.size_tokens) if self.size_tokens else float("nan")

    @property
    def joules(self) -> float | None:
        """Energy in joules, None if it cannot be measured."""
        return self.energy if self.meters else None

    def add(self, *, tokens: float = 0.0, size: float = 0.0, cohort: int = 0, **amounts: float) -> None:
        """Add FLOPs by purpose, and the other sums by name.

        Args:
            tokens: tokens trained on.
            size: active parameters of the trained model.
            cohort: number of clients that trained on the tokens.
            amounts: amounts by name, of `PURPOSES` or of the other sums.
        """
        for name, amount in amounts.items():
            if name in self.flops:
                self.flops[name] += amount
            else:
                setattr(self, name, getattr(self, name) + amount)
        self.tokens += tokens
        self.size_tokens += size * tokens
        self.cohort_tokens += cohort * tokens

    def add_clients(self, flops: Iterable[tuple[int, float]]) -> None:
        """Add the training FLOPs of each client; `add` receives their sum separately."""
        for client, spent in flops:
            self.clients[client] = self.clients.get(client, 0.0) + spent

    def numbers(self) -> list[float]:
        """Return everything except the clients, in a fixed order, to be summed over ranks."""
        return [*self.flops.values(), *(getattr(self, name) for name in _SUMS)]

    def add_numbers(self, numbers: Sequence[float]) -> None:
        """Add the `numbers` of another ledger."""
        for purpose, amount in zip(PURPOSES, numbers, strict=False):
            self.flops[purpose] += amount
        for name, amount in zip(_SUMS, numbers[len(PURPOSES) :], strict=True):
            setattr(self, name, getattr(self, name) + amount)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        clients = {"ids": list(self.clients), "flops": list(self.clients.values())}
        return {"flops": {**self.flops}, **{name: getattr(self, name) for name in _SUMS}, "clients": clients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint's state."""
        self.flops = {**state["flops"]}
        # An older checkpoint lacks some sums; its cohort is estimated by the number of clients that have trained.
        known = {"cohort_tokens": len(state["clients"]["ids"]) * state["tokens"], **state}
        for name in _SUMS:
            setattr(self, name, known.get(name, 0.0))
        self.clients = dict(zip(state["clients"]["ids"], state["clients"]["flops"], strict=True))
