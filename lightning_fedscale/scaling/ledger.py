"""What a run has spent: FLOPs by purpose and by client, samples and tokens, bytes, seconds, energy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PURPOSES = ("forward", "backward", "optimizer", "aggregation", "evaluation", "probing")
"""What FLOPs are spent on. Forward and backward are the training that scaling laws count: products of matrices,
convolutions, attention and recurrent layers, a multiplication and an addition as two, with all passes that a local rule
or a personal model asks for besides. Optimizer and aggregation are counted element by element: what a local rule adds
to gradients is the optimizer's, and what rules, compressors and privacy do with updates is the aggregation's.
Evaluation is validation and test. Probing is what callbacks run on the side."""

_SUMS = (
    "samples", "tokens", "size_tokens", "cohort_tokens", "upload_bytes", "download_bytes", "seconds", "updates",
    "energy", "meters", "steps", "counted", "error",
)  # fmt: skip


class Ledger:
    """Adds up what a run spends.

    Attributes:
        flops: by purpose (`PURPOSES`), over all clients and ranks.
        clients: training FLOPs of each client.
        samples: trained on, every pass counted.
        tokens: the same in tokens.
        size_tokens: sum of active parameters times tokens.
        cohort_tokens: sum of a round's clients times its tokens; 0 without clients.
        upload_bytes: sent by clients.
        download_bytes: sent to clients.
        seconds: of training.
        updates: optimizer steps; rounds where there are clients.
        energy: in joules, as far as it was measured.
        meters: how many readings `energy` is of; 0 where nothing can be read.
        steps: batches trained on.
        counted: steps whose FLOPs were counted while they ran, those included that only proved what clients do side by
            side; the others cost what the counted ones say.
        error: standard error of training FLOPs for that, 0 where steps cost the same: the sum of all steps' errors.

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
        """Forward and backward: what scaling laws mean by compute."""
        return self.flops["forward"] + self.flops["backward"]

    @property
    def flops_interval(self) -> tuple[float, float]:
        """95 % interval of training FLOPs, which are estimated where steps cost differently; no wider than that."""
        return max(0.0, self.training_flops - 1.96 * self.error), self.training_flops + 1.96 * self.error

    @property
    def average_params(self) -> float:
        """Active parameters, averaged over tokens (the average size of arXiv 2501.12486)."""
        return self.size_tokens / self.tokens if self.tokens else 0.0

    @property
    def average_cohort(self) -> int:
        """Clients that train in a round, averaged over tokens, to the nearest whole number; 1 without clients."""
        return max(1, round(self.cohort_tokens / self.tokens)) if self.tokens else 1

    @property
    def six_n_ratio(self) -> float:
        """Training FLOPs over ``6 parameters tokens``: near 1 for transformers, more where weights are used often."""
        return self.training_flops / (6.0 * self.size_tokens) if self.size_tokens else float("nan")

    @property
    def joules(self) -> float | None:
        """Energy, None where it cannot be read."""
        return self.energy if self.meters else None

    def add(self, *, tokens: float = 0.0, size: float = 0.0, cohort: int = 0, **amounts: float) -> None:
        """Add what was spent: FLOPs by purpose, and the sums by name.

        Args:
            tokens: trained on.
            size: active parameters of the model that they trained.
            cohort: clients that trained on them.
            amounts: of `PURPOSES`, or of what this class sums up.
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
        """Note the training FLOPs of clients, which `add` has got as a sum."""
        for client, spent in flops:
            self.clients[client] = self.clients.get(client, 0.0) + spent

    def numbers(self) -> list[float]:
        """Everything but the clients, in a fixed order, to be summed over ranks."""
        return [*self.flops.values(), *(getattr(self, name) for name in _SUMS)]

    def add_numbers(self, numbers: Sequence[float]) -> None:
        """Add another ledger's `numbers`."""
        for purpose, amount in zip(PURPOSES, numbers, strict=False):
            self.flops[purpose] += amount
        for name, amount in zip(_SUMS, numbers[len(PURPOSES) :], strict=True):
            setattr(self, name, getattr(self, name) + amount)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        clients = {"ids": list(self.clients), "flops": list(self.clients.values())}
        return {"flops": {**self.flops}, **{name: getattr(self, name) for name in _SUMS}, "clients": clients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.flops = {**state["flops"]}
        # An older checkpoint says nothing of some, and of the cohort no more than who has trained.
        known = {"cohort_tokens": len(state["clients"]["ids"]) * state["tokens"], **state}
        for name in _SUMS:
            setattr(self, name, known.get(name, 0.0))
        self.clients = dict(zip(state["clients"]["ids"], state["clients"]["flops"], strict=True))
