"""The options that differ from FedAvg between a client's training and the server's step."""

from __future__ import annotations

from typing import NamedTuple

from lightning_fedscale.aggregators import Aggregator
from lightning_fedscale.compressors import Compressor
from lightning_fedscale.local_rules import Ditto, LocalRule
from lightning_fedscale.privacy import Privacy
from lightning_fedscale.types import ClientUpdate
from lightning_fedscale.utils.buffers import BufferPolicies, Policy
from lightning_fedscale.utils.moved import renamed

__getattr__ = renamed(__name__, {"Rules": "AlgorithmOptions"})


class AlgorithmOptions(NamedTuple):
    """The options that differ from FedAvg on the uplink; None as in FedAvg.

    Attributes:
        local_rule: the rule of the clients' training.
        compressor: compresses the updates.
        privacy: bounds the influence of each client.
        aggregator: aggregates the updates.
        personal: patterns of names of tensors that stay with each client.
        ditto: each client also trains its own model.
        buffers: patterns of names of buffers, and their policies.
    """

    local_rule: LocalRule | None
    compressor: Compressor | None
    privacy: Privacy | None
    aggregator: Aggregator
    personal: tuple[str, ...] = ()
    ditto: Ditto | None = None
    buffers: tuple[tuple[str, Policy], ...] = ()

    @property
    def own(self) -> tuple[str, ...]:
        """Patterns of all tensors that stay with each client."""
        return (*self.personal, *(pattern for pattern, policy in self.buffers if policy == "client"))

    @property
    def buffer_policies(self) -> BufferPolicies:
        """The policy of each buffer."""
        return BufferPolicies(self.buffers, self.aggregator.hides_clients, self.privacy is not None)

    @property
    def needs_pipeline(self) -> bool:
        """Whether a client does anything that differs from FedAvg, so that rounds need a `ClientPipeline`."""
        return bool(self.own) or any(rule is not None for rule in (self.local_rule, self.compressor, self.privacy))

    @property
    def keep_state(self) -> bool:
        """Whether these options make clients keep state."""
        return bool(self.own) or bool(self.kept_on_device)

    @property
    def kept_on_device(self) -> dict[str, float]:
        """The state that a client's device keeps for these options, in bytes per parameter by name."""
        kept: dict[str, float] = {}
        if self.local_rule is not None and self.local_rule.keeps_state:
            kept["control variates"] = 4.0 * self.local_rule.vectors_down
        if self.compressor is not None and self.compressor.stateful:
            kept["error feedback"] = 4.0
        if self.ditto is not None:
            kept["personal model"] = 4.0
        return kept

    @property
    def passes(self) -> int:
        """The number of times that a client computes the gradients of its batches in a round."""
        return 1 + (self.local_rule is not None and self.local_rule.needs_gradient) + (self.ditto is not None)

    @property
    def operations(self) -> float:
        """Operations per trainable element of each client's update, besides training and the sum over clients."""
        local = 0 if self.local_rule is None else self.local_rule.operations
        compressed = 0.0 if self.compressor is None else self.compressor.operations
        clipped = 0 if self.privacy is None else 3  # the squared norm and the scaling
        return local + compressed + clipped

    @property
    def bound_to_parameters(self) -> str | None:
        """The argument for which clients or server keep state of specific parameters; None if there is none."""
        if self.ditto is not None:
            return f"personal={self.ditto!r}"
        if self.local_rule is not None and (self.local_rule.keeps_state or self.local_rule.sends_message):
            return f"local_rule={self.local_rule.name!r}"
        if self.compressor is not None and self.compressor.stateful:
            return f"compressor={self.compressor.name}"
        if self.aggregator.kept is not None:
            return f"aggregator={self.aggregator.kept}"
        return None

    def weigh(self, update: ClientUpdate) -> float:
        """Return the client's weight in the aggregate, before normalisation."""
        return float(self.aggregator.weigh(update) if self.privacy is None else self.privacy.weigh(update))
