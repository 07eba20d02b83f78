"""The settings of a federated run as numbers and strings, by which the runs of a sweep are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_fedscale.core.options.options import Options
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.utils.factory_repr import numbers_of

PREFIX = "federated/"
NONE = "none"
"""Value of an unused setting, which must be present, since TensorBoard takes a sweep's columns from its first run."""

EXECUTOR_CHOSEN = PREFIX + "executor.chosen", PREFIX + "executor.reason"
"""Names of the settings that are known once the executor is chosen."""

_OFTEN_SWEPT = ("num_clients", "clients_per_round", "params", "alpha", "lr", "mu", "noise_multiplier")
_NOT_SWEPT = ("num_partitions", "min_partition_size", "seed")


def is_detail(name: str) -> bool:
    """Return whether a setting is one in which the runs of a sweep seldom differ.

    Example:
        >>> [name for name in ("lr", "federated/num_clients", "federated/mode", "federated/partitioner.alpha")
        ...  if is_detail(name)]
        ['federated/mode']
    """
    own = name.removeprefix(PREFIX)
    return own != name and own.rpartition(".")[2] not in _OFTEN_SWEPT


def settings_of(options: Options, partition: Partition, params: int) -> dict[str, Any]:
    """Return the settings by name, only numbers and strings.

    A rule's value is the call that makes it, such as ``fed_adam(lr=0.01)``; the numbers in it are also listed
    separately, such as ``federated/server_optimizer.lr``.

    Args:
        options: the strategy's checked arguments.
        partition: the partition of the data.
        params: number of parameters of the model.
    """
    clients = partition.num_clients
    found: dict[str, Any] = {
        "num_clients": clients,
        "clients_per_round": options.cohort_size(clients),
        "samples": partition.num_samples,
        "params": params,
        # Local work is given by one or the other.
        "local_epochs": options.local_epochs or NONE,
        "local_steps": -1 if callable(options.local_steps) else options.local_steps or NONE,
        "rounds_per_epoch": options.rounds_per_epoch,
        "client_optimizer": options.client_optimizer,
        "sampler": getattr(options.sampler, "__name__", type(options.sampler).__name__),
        "executor": options.executor,
        "seed": options.seed,
        "partitioner": "Partition" if isinstance(options.partitioner, Partition) else repr(options.partitioner),
        **_rules_of(options),
        "population": NONE if options.population is None else repr(options.population),
        **_parts(options),
        **_privacy(options),
    }
    for name, arguments in _arguments_of(options).items():
        found |= {f"{name}.{each}": value for each, value in numbers_of(arguments).items() if each not in _NOT_SWEPT}
    return {PREFIX + name: value for name, value in found.items()}


def method_of(options: Options) -> dict[str, Any]:
    """Return the settings that define the method of a run: how clients train and how updates are aggregated.

    Args:
        options: the strategy's checked arguments.
    """
    return {
        "client_optimizer": options.client_optimizer, **_rules_of(options), **_parts(options), **_privacy(options),
    }  # fmt: skip


def _rules_of(options: Options) -> dict[str, str]:
    """Return the rules as the calls that make them."""
    local = options.local_rule
    return {
        "aggregator": options.aggregator.call or "custom",
        "server_optimizer": options.server_optimizer.call or "custom",
        "local_rule": NONE if local is None else local.call or local.name,
        "compressor": NONE if options.compressor is None else options.compressor.name,
        "downlink_compressor": NONE if options.downlink_compressor is None else options.downlink_compressor.name,
        "mode": "sync" if options.asynchrony is None else repr(options.asynchrony),
    }


def _arguments_of(options: Options) -> dict[str, Mapping[str, Any]]:
    """Return the arguments of the rules by the rules' names."""
    given = options.partitioner
    return {
        "partitioner": {} if isinstance(given, Partition) else given._changed_arguments(),
        "aggregator": options.aggregator.arguments,
        "server_optimizer": options.server_optimizer.arguments,
        "local_rule": {} if options.local_rule is None else options.local_rule.arguments,
        "compressor": {} if options.compressor is None else options.compressor.arguments,
        "downlink_compressor": {} if options.downlink_compressor is None else options.downlink_compressor.arguments,
        "mode": {} if options.asynchrony is None else {"concurrency": options.asynchrony.concurrency},
    }


def _parts(options: Options) -> dict[str, str]:
    """Return the settings of the parts of the model that are not shared."""
    algorithm = options.algorithm
    return {
        "personal": repr(algorithm.ditto) if algorithm.ditto else ", ".join(algorithm.personal) or NONE,
        "buffers": ", ".join(f"{pattern}: {policy}" for pattern, policy in algorithm.buffers) or NONE,
    }


def _privacy(options: Options) -> dict[str, Any]:
    privacy = options.privacy
    if privacy is None:
        return {"privacy": NONE}
    known = {
        "privacy.clip_norm": privacy.clip_norm,
        "privacy.noise_multiplier": privacy.noise_multiplier,
        "privacy.target_epsilon": privacy.target_epsilon,
        "privacy.delta": privacy.delta,
    }
    return {"privacy": "dp_fed_avg", **{name: value for name, value in known.items() if value is not None}}
