"""The methods that a study tries, each as arguments of `FederatedStrategy` in Hydra's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate

from lightning_fedscale.study.settings import FED_AVG

_HERE = "lightning_fedscale."

METHODS: dict[str, dict[str, Any]] = {
    FED_AVG: {},
    "kept_optimizer": {"client_optimizer": "keep"},
    "scaffold": {
        "local_rule": {"_target_": f"{_HERE}local_rules.scaffold", "option": "I"},  # works with any optimizer
        "aggregator": "uniform",
    },
    "fed_prox": {"local_rule": {"_target_": f"{_HERE}local_rules.fed_prox", "mu": 0.1}},
    "fed_avgm": {"server_optimizer": {"_target_": f"{_HERE}server.fed_avgm", "lr": 0.3, "momentum": 0.9}},
    "diloco": {"client_optimizer": "keep", "server_optimizer": {"_target_": f"{_HERE}server.nesterov"}},
}
"""Methods by name. SCAFFOLD weights clients equally, as in its paper."""


def options_of(method: Mapping[str, Any]) -> dict[str, Any]:
    """Instantiate a method's arguments, with new objects.

    Example:
        >>> options_of(METHODS["scaffold"])["aggregator"]
        'uniform'
    """
    return {name: instantiate(value) if isinstance(value, Mapping) else value for name, value in method.items()}


def expression_of(method: Mapping[str, Any]) -> list[str]:
    """Write a method's arguments as Python.

    Example:
        >>> expression_of(METHODS["scaffold"])
        ["local_rule=local_rules.scaffold(option='I')", "aggregator='uniform'"]
    """
    return [f"{name}={_expression(value)}" for name, value in method.items()]


def _expression(value: Any) -> str:
    if not isinstance(value, Mapping):
        return repr(value)
    arguments = ", ".join(f"{name}={_expression(each)}" for name, each in value.items() if name != "_target_")
    return f"{str(value['_target_']).removeprefix(_HERE)}({arguments})"
