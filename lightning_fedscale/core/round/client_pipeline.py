"""What the chosen algorithm does to a client: its start, its gradients, and its update on the way to the server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedscale.core.client_state import ClientStore
from lightning_fedscale.core.executors import SharedTensors
from lightning_fedscale.core.executors.meter import ClientMeter, CostMeter
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.round.costs import corrected, update_bytes
from lightning_fedscale.local_rules import Correction, Ditto, LocalRule, Outcome
from lightning_fedscale.types import ClientCost, ClientUpdate, Cohort
from lightning_fedscale.utils import randomness
from lightning_fedscale.utils.flat_view import as_real, elements_at_once

RULE, RESIDUAL, PERSONAL, DITTO, PRIVACY = "local_rule", "compressor", "personal", "ditto", "privacy"
DITTO_BUFFERS = "ditto_buffers"
"""Names of what clients and the server keep."""


class Contribution(NamedTuple):
    """What a client contributes to the round, as the server receives it.

    Attributes:
        update: as the server sees it.
        message: the local rule's second vector.
        weight: of the update.
        bytes: number of bytes that the client sends.
        normalizer: see `lightning_fedscale.local_rules.Report`.
        within: 1 if the update was not clipped for privacy.
    """

    update: ClientUpdate
    message: Tensor | None
    weight: float
    bytes: float
    normalizer: float = 1.0
    within: float = 0.0


class ClientPipeline:
    """What the chosen algorithm does to the clients of this rank in a round.

    Args:
        algorithm: local rule, compressor, privacy and personal tensors.
        store: what clients keep.
        shared: the module's tensors.
        cohort: who takes part.
        optimizer: the clients' first optimizer, as it is when the round begins.
        states: of the server, by rule.
        starts: the models of clients that do not start from the global one, by client.
        scales: the factors by which the server scales these clients' updates.
        gradient_of: mean gradient of a client's batches at the model that the module holds, counted by a meter if any.
        meter: counts what that costs; None if no callback needs it.
    """

    def __init__(
        self,
        algorithm: AlgorithmOptions,
        store: ClientStore,
        shared: SharedTensors,
        cohort: Cohort,
        optimizer: Optimizer,
        states: dict[str, Any],
        starts: Mapping[int, Tensor],
        scales: Mapping[int, float],
        gradient_of: Callable[[int, ClientMeter | None], Tensor],
        meter: CostMeter | None = None,
    ) -> None:
        self._algorithm = algorithm
        self._store = store
        self._shared = shared
        self._cohort = cohort
        self._states = states
        self._lr = float(optimizer.param_groups[0]["lr"])
        self._momentum = float(optimizer.param_groups[0].get("momentum", 0.0))
        self._starts = starts
        self._scales = scales
        self._gradient_of = gradient_of
        self._meter = meter
        self._gradients: dict[int, Tensor] = {}
        self._tallies: dict[int, ClientMeter] = {}  # of these gradients
        self._corrections: dict[int, int] = {}  # operations for each element in every step

    # ---- before and while a client trains: see `lightning_fedscale.core.executors.round_context.Pipeline`

    def start(self, client: int) -> Tensor | None:
        """Return the model that the client starts from; None is the global one."""
        return self._starts.get(client)

    def correction(self, client: int) -> Correction | None:
        """Return what the local rule adds to the client's gradients."""
        if (rule := self._algorithm.local_rule) is None:
            return None
        if rule.needs_gradient:
            # Computed again if the client is trained again in another way: an attempt that did not end does not count.
            tally = None if self._meter is None else self._meter.client()
            self._gradients[client] = self._gradient_of(client, tally)
            if tally is not None:
                self._tallies[client] = tally
        correction = rule.begin(self._store.states.get(client, RULE), self._states[RULE])
        self._corrections[client] = correction.operations
        return correction

    def personal(self, client: int) -> dict[str, Tensor]:
        """Return the tensors of the module that stay with the client."""
        return self._store.states.get(client, PERSONAL) or {} if self._algorithm.own else {}

    def keep_personal(self, client: int, values: dict[str, Tensor]) -> None:
        """Store these tensors as the client's training left them."""
        self._store.states.stage(client, PERSONAL, values)

    def cost(self, update: ClientUpdate) -> ClientCost:
        """Return what a client's training has cost besides plain local training; call it once, at the end."""
        tally = self._tallies.pop(update.client, None)
        gradient = ClientCost() if tally is None else tally.total(0)
        return gradient.plus(corrected(self._corrections.get(update.client, 0), update, self._shared))

    # ---- what it sends

    def send(self, update: ClientUpdate) -> Contribution:
        """Take an update from its client to the server; it may be changed in place.

        What the client keeps is staged. An update that is not finite is returned as it is.
        """
        algorithm, shared = self._algorithm, self._shared
        if not update.finite:
            return Contribution(update, None, algorithm.weigh(update), self._plain_bytes())
        delta = update.delta[: shared.view.trainable]
        message, normalizer, within = None, 1.0, 0.0
        if algorithm.local_rule is not None:
            message, normalizer = self._finish(algorithm.local_rule, update, delta)
        sent = self._plain_bytes() if algorithm.compressor is None else self._compress(update.client, delta)
        if message is not None and algorithm.local_rule is not None and algorithm.local_rule.vectors_up == 1:
            message = delta.clone()  # the message is the update itself, which the server sees as it was sent
        if algorithm.privacy is not None:
            within = float(algorithm.privacy.clip(delta, self._states[PRIVACY]))
        if (scale := self._scales.get(update.client)) is not None:
            update.delta.mul_(scale)
        changed = scale is not None or (algorithm.local_rule is not None and algorithm.local_rule.changes_delta)
        if changed or algorithm.privacy is not None:
            self._round(delta)
        if scale is not None or any(rule is not None for rule in algorithm[:3]):
            update = update._replace(norm=float(torch.linalg.vector_norm(delta)))
        return Contribution(update, message, algorithm.weigh(update), sent, normalizer, within)

    def _finish(self, rule: LocalRule, update: ClientUpdate, delta: Tensor) -> tuple[Tensor | None, float]:
        client = update.client
        outcome = Outcome(delta, update.optimizer_steps, self._lr, self._momentum, self._gradients.pop(client, None))
        report = rule.finish(outcome, self._store.states.get(client, RULE), self._states[RULE])
        if rule.keeps_state:
            self._store.states.stage(client, RULE, report.state)
        if report.message is not None:
            self._round(report.message)
        return report.message, report.normalizer

    def _round(self, vector: Tensor) -> None:
        """Round to the parameters' precision: sums over clients are then exact on any number of ranks.

        It rounds towards zero, so that a clipped update does not become longer.
        """
        dtypes = [as_real(parameter).dtype for parameter in self._shared.trainable_shared]
        if len(set(dtypes)) != 1:
            views = self._shared.trainable_views(vector)
        else:  # the bits are the same for any parts, and each layer would take ten launches
            views = list(torch.split(vector, elements_at_once(vector.device)))
            dtypes = dtypes[:1] * len(views)
        for view, dtype in zip(views, dtypes, strict=True):
            near = view.to(dtype).double()
            less = (near * (1 - torch.finfo(dtype).eps)).to(dtype).double()  # the next number towards zero
            view.copy_(torch.where(near.abs() > view.abs(), less, near))

    def _compress(self, client: int, delta: Tensor) -> float:
        compressor = self._algorithm.compressor
        assert compressor is not None
        named = dict(zip(self._shared.names, self._shared.trainable_views(delta), strict=True))
        state = self._store.states.get(client, RESIDUAL) if compressor.stateful else None
        state = compressor.init(named) if state is None else state
        generator = randomness.generator(self._cohort.seed, randomness.COMPRESSION, self._cohort.round, client)
        encoded, state = compressor.encode(named, state, generator)
        if compressor.stateful:
            self._store.states.stage(client, RESIDUAL, state)
        for name, view in named.items():
            view.copy_(encoded.seen[name])
        rule = self._algorithm.local_rule
        extra = 0 if rule is None else rule.vectors_up - 1
        return math.ceil(encoded.bits / 8) + self._shared.sent_buffer_bytes + extra * self._shared.trainable_bytes

    def _plain_bytes(self) -> int:
        return update_bytes(self._algorithm._replace(compressor=None), self._shared)


class PersonalPipeline:
    """What Ditto does to clients that each train a personal model, which is not sent.

    Args:
        ditto: how strongly they are pulled to the global model.
        store: what clients keep.
        shared: the module's tensors.
        server: the global model.
    """

    def __init__(self, ditto: Ditto, store: ClientStore, shared: SharedTensors, server: Tensor) -> None:
        self._ditto = ditto
        self._store = store
        self._shared = shared
        self._server = server
        self._last: tuple[int, Tensor | None] | None = None  # a model may have to be read from a file

    def start(self, client: int) -> Tensor | None:
        """Return the client's own model as it left it; None, before the first time, is the global one."""
        if self._last is None or self._last[0] != client:
            self._last = client, self._store.states.get(client, DITTO)
        return self._last[1]

    def correction(self, client: int) -> Correction:
        """Return the correction that pulls the client's model to the global one."""
        own, cut = self.start(client), self._shared.view.trainable
        return self._ditto.correction((self._server if own is None else own)[:cut], self._server[:cut])

    def personal(self, client: int) -> dict[str, Tensor]:
        """Return the client's buffers that are not in the vector of its model; they are kept apart."""
        return self._store.states.get(client, DITTO_BUFFERS) or {}

    def keep_personal(self, client: int, values: dict[str, Tensor]) -> None:
        """Store these buffers as the client's training left them."""
        self._store.states.stage(client, DITTO_BUFFERS, values)

    def keep(self, update: ClientUpdate) -> None:
        """Store the trained model, unless the update is not finite."""
        if update.finite:
            start = self.start(update.client)
            model = self._shared.origin(self._server if start is None else start) - update.delta
            self._store.states.stage(update.client, DITTO, model)
