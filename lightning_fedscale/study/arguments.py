"""Checks of the arguments of a study or a sweep."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_fedscale.partitioners import FinishedPartitioner, Partition, Partitioner, by_name, heterogeneity
from lightning_fedscale.partitioners.labels import find_labels
from lightning_fedscale.strategy import FederatedStrategy
from lightning_fedscale.study.methods import METHODS
from lightning_fedscale.utils.checks import integer, known_arguments, one_of


def positive(name: str, value: Any) -> float:
    """Return the number if it is finite and above 0.

    Raises:
        ValueError: for anything else; the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: pass a finite number above 0.")
    return float(value)


def check_makers(module: Any, data: Any) -> None:
    """Check that a module and a data module can be made.

    Raises:
        TypeError: if an argument is not callable; the message names it.
    """
    for name, given in (("module", module), ("data", data)):
        if not callable(given):
            raise TypeError(f"{name}={given!r}: pass a class or a function that makes it.")


def axis(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Sort the whole numbers to try, ascending and without duplicates.

    Raises:
        ValueError: for none, or for numbers below 1; the message names the argument.
    """
    if not values:
        raise ValueError(
            f"{name}={values!r}: pass at least one value to try" + (", or current=" if name == "sizes" else "") + "."
        )
    return tuple(sorted({integer(name, each, 1) for each in values}))


def rates_of(values: Sequence[float]) -> tuple[float, ...]:
    """Sort the learning rates to try, ascending and without duplicates.

    Raises:
        ValueError: for none, or for numbers that are not above 0.
    """
    if not values:
        raise ValueError(f"rates={values!r}: pass at least one multiple of the module's learning rate.")
    return tuple(sorted({positive("rates", each) for each in values}))


def current_size(module: Callable[..., Any], argument: str, current: int | None) -> int | None:
    """Return the size of the current model: the one that was passed, else the argument's default.

    Raises:
        ValueError: if the module has no such argument.
    """
    parameters = inspect.signature(module).parameters
    if argument not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        raise ValueError(
            f"argument={argument!r}: {name_of(module)} has no such argument. Name the one that sets the model's size;"
            f" it has {', '.join(parameters) or 'no arguments'}."
        )
    if current is not None:
        return integer("current", current, 1)
    default = parameters[argument].default if argument in parameters else None
    return default if isinstance(default, int) and not isinstance(default, bool) and default > 0 else None


def methods_of(
    given: Sequence[str] | Mapping[str, Mapping[str, Any]] | None, strategy: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the arguments of the methods by name; None stands for all of `METHODS`.

    Args:
        given: names, or arguments of `FederatedStrategy` by custom names.
        strategy: default arguments of all methods.

    Raises:
        ValueError: for no method, or an unknown name.
        TypeError: for arguments that the strategy does not have.
    """
    if strategy is not None and not isinstance(strategy, Mapping):
        raise TypeError(
            f"strategy={strategy!r}: pass arguments of FederatedStrategy by name, {{'compressor': 'qsgd'}}."
        )
    shared = dict(strategy or {})
    known_arguments("strategy", FederatedStrategy, shared)
    if studied := sorted(set(_STUDIED) & set(shared)):
        name, own = studied[0], _STUDIED[studied[0]]
        instead = f", or pass {own} next to it" if own else ""
        raise ValueError(f"strategy: {name}={shared[name]!r} cannot be set here. Leave it out of strategy={instead}.")
    if given is None or not isinstance(given, Mapping):
        if given is not None and not given:
            raise ValueError(f"methods={given!r}: pass at least one method, or None for all.")
        for name in given or ():
            one_of("methods", name, tuple(METHODS))
        given = {name: METHODS[name] for name in given or METHODS}
    if not given:
        raise ValueError(f"methods={given!r}: pass at least one method, or None for all.")
    return {name: {**shared, **each} for name, each in given.items()}


_STUDIED = {
    "num_clients": "clients=", "partitioner": "partition=", "clients_per_round": "size's clients_per_round=",
    "local_epochs": "", "local_steps": "local_steps=", "executor": "", "seed": "seed=",
}  # fmt: skip
"""Arguments of the strategy that a study or a sweep sets, each with the argument of these that does."""


def batch_sizes_of(own: int | None, partition: Partition) -> tuple[int, ...]:
    """Return the data's own batch size, and four times that if clients have enough samples on average."""
    own = own or 32
    return tuple(each for each in (own, 4 * own) if each == own or each <= partition.sizes.mean())


def check_size(module: Callable[..., nn.Module], argument: str, sizes: Sequence[int]) -> None:
    """Check that the argument changes the size of the model.

    Raises:
        ValueError: if it does not.
    """
    least, most = (
        sum(each.numel() for each in module(**{argument: size}).parameters()) for size in (sizes[0], sizes[-1])
    )
    if len(sizes) > 1 and least == most:
        raise ValueError(
            f"argument={argument!r}: {name_of(module)} has {least:,} parameters both with {sizes[0]} and with"
            f" {sizes[-1]}. Name the argument that sets its size."
        )


def partition_of(given: Any, clients: int | None, dataset: Any) -> tuple[Partition, dict[str, Any]]:
    """Return the partition, and facts for a study: name, clients, samples, fingerprint, heterogeneity of labels.

    Raises:
        TypeError: for anything that is not a partition, a partitioner or a name.
        ValueError: for a different number of clients, or a partition of other data.
    """
    clients = None if clients is None else integer("clients", clients)
    partitioner = by_name(given, clients) if isinstance(given, str) else given
    if isinstance(partitioner, Partition):
        partitioner = FinishedPartitioner(partitioner)
    if not isinstance(partitioner, Partitioner):
        raise TypeError(f"partition={given!r}: pass a name such as 'dirichlet', a file, a Partition or a Partitioner.")
    partitioner = copy.copy(partitioner)
    partitioner.dataset = dataset
    try:
        found = partitioner.partition
    except ValueError as error:
        raise ValueError(f"partition={given!r}: {error}") from error
    facts: dict[str, Any] = {
        "partition": "partition" if isinstance(given, Partition) else repr(given), "clients": found.num_clients,
        "samples": found.num_samples, "fingerprint": found.fingerprint,
    }  # fmt: skip
    try:
        skew = heterogeneity(found, find_labels(dataset, partitioner.partition_by))
        facts["mean_js_distance"] = round(skew.mean_js_distance, 4)
    except (TypeError, ValueError):
        facts["mean_js_distance"] = None  # there are no labels
    return found, facts


def name_of(made: Any) -> str:
    """Return the path of a class or function."""
    return f"{getattr(made, '__module__', '')}.{getattr(made, '__qualname__', repr(made))}"
