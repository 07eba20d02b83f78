"""Scaling laws: how loss depends on model size, data, compute and number of clients, and what is best."""

from lightning_fedscale.scaling.base import Allocation, Law, Range, Unfitted, closest, effective_flops, mean_flops
from lightning_fedscale.scaling.batch import (
    CriticalBatch,
    LossToLoss,
    LRAnnealing,
    average_parameters,
    compressed_parameters,
    ema_rule,
)
from lightning_fedscale.scaling.chinchilla import Chinchilla, RepeatedData, Rosenfeld, inference_wedge
from lightning_fedscale.scaling.compute import (
    ComputeOnly,
    DataMixture,
    Farseer,
    InferenceAware,
    Kaplan,
    Porian,
    PowerLaw,
    Rectified,
    RoutedLM,
)
from lightning_fedscale.scaling.diloco import DiLoCo
from lightning_fedscale.scaling.federated import Federated, FederatedPACBayes, federated, information
from lightning_fedscale.scaling.fit import Fit, Interval, fit, law_from_file
from lightning_fedscale.scaling.planning import Plan, plan, plot_plans
from lightning_fedscale.scaling.position import Position, position_of

LAWS: dict[str, type[Law]] = {
    law.__name__: law
    for law in (
        Chinchilla, RepeatedData, Kaplan, Porian, DiLoCo, FederatedPACBayes, ComputeOnly, PowerLaw, Farseer, RoutedLM,
        Rectified, DataMixture, InferenceAware, Rosenfeld,
    )
}  # fmt: skip
"""All laws of loss by size and data, by name."""


def law_by_name(name: str) -> Law:
    """The law of this name, upper or lower case, with its default constants.

    Raises:
        ValueError: for another name, with the closest match.

    Example:
        >>> law_by_name("chinchilla").name
        'Chinchilla'
        >>> law_by_name("chinchila")
        Traceback (most recent call last):
        ...
        ValueError: law='chinchila' is not known. Did you mean 'Chinchilla'? Known: ...
    """
    for known, law in LAWS.items():
        if known.lower() == name.lower():
            return law()
    raise closest("law", name, list(LAWS))


__all__ = [
    "LAWS",
    "Allocation",
    "Chinchilla",
    "ComputeOnly",
    "CriticalBatch",
    "DataMixture",
    "DiLoCo",
    "Farseer",
    "Federated",
    "FederatedPACBayes",
    "Fit",
    "InferenceAware",
    "Interval",
    "Kaplan",
    "LRAnnealing",
    "Law",
    "LossToLoss",
    "Plan",
    "Porian",
    "Position",
    "PowerLaw",
    "Range",
    "Rectified",
    "RepeatedData",
    "Rosenfeld",
    "RoutedLM",
    "Unfitted",
    "average_parameters",
    "compressed_parameters",
    "effective_flops",
    "ema_rule",
    "federated",
    "fit",
    "inference_wedge",
    "information",
    "law_by_name",
    "law_from_file",
    "mean_flops",
    "plan",
    "plot_plans",
    "position_of",
]
