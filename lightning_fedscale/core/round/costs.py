"""The bytes that cross the network in a round, and the operations on them besides training."""

from __future__ import annotations

import math

import numpy as np
import torch

from lightning_fedscale.compressors import Compressor
from lightning_fedscale.core.executors import SharedTensors
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.types import ClientCost, ClientUpdate, Cohort
from lightning_fedscale.utils.flat_view import as_real


def model_bytes(algorithm: AlgorithmOptions, shared: SharedTensors) -> int:
    """Return the bytes that a client receives in a round, without compression."""
    return shared.buffer_bytes + shared.trainable_bytes * (
        1 if algorithm.local_rule is None else algorithm.local_rule.vectors_down
    )


def update_bytes(algorithm: AlgorithmOptions, shared: SharedTensors) -> int:
    """Return the bytes that a client sends in a round; with a compressor, for an update of random numbers."""
    extra = 0 if algorithm.local_rule is None else algorithm.local_rule.vectors_up - 1
    first = shared.trainable_bytes if algorithm.compressor is None else compressed_bytes(algorithm.compressor, shared)
    return shared.sent_buffer_bytes + first + extra * shared.trainable_bytes


def compressed_bytes(compressor: Compressor, shared: SharedTensors) -> int:
    """Return the bytes of a compressed update of random numbers."""
    generator = np.random.default_rng(0)
    named = {
        name: torch.from_numpy(generator.standard_normal(tuple(as_real(parameter).shape)))
        for name, parameter in zip(shared.names, shared.trainable_shared, strict=True)
    }
    encoded, _ = compressor.encode(named, compressor.init(named), generator)
    return math.ceil(encoded.bits / 8)


def corrected(operations: int, update: ClientUpdate, shared: SharedTensors) -> ClientCost:
    """Return the cost of correcting a client's gradients, given the operations per element and step."""
    return ClientCost(optimizer=float(operations * shared.view.trainable * update.optimizer_steps))


def operations(algorithm: AlgorithmOptions, downlink: Compressor | None, cohort: Cohort) -> float:
    """Return the operations of rules, compressors and privacy on the elements of a round's updates."""
    clients = len(cohort.clients)
    each = algorithm.operations * clients
    if algorithm.local_rule is not None:
        each += 2 * algorithm.local_rule.sends_message  # the server's own vector moves
    if algorithm.privacy is not None:
        each += 2  # noise is drawn and added
    if downlink is not None:
        each += downlink.operations * (1 + clients)  # each client decodes it
    return each * cohort.trainable
