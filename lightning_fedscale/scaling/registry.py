"""All laws by name, and the lookup of a law by its name."""

from __future__ import annotations

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.batch import LossToLoss, LRAnnealing
from lightning_fedscale.scaling.chinchilla import (
    AverageParameters,
    Chinchilla,
    CompressedParameters,
    RepeatedData,
    Rosenfeld,
)
from lightning_fedscale.scaling.compute import (
    ComputeOnly,
    DataMixture,
    Farseer,
    Henighan,
    InferenceAware,
    Kaplan,
    Porian,
    Rectified,
    RoutedLM,
)
from lightning_fedscale.scaling.diloco import DiLoCo
from lightning_fedscale.scaling.federated import FederatedPACBayes
from lightning_fedscale.scaling.form import Form, closest

LAW_FILE = "fedscale_law.json"
"""File with the law that was fitted to a project's own runs, in the folder that runs are started from."""

LAWS: dict[str, type[Law]] = {
    law.__name__: law
    for law in (
        Chinchilla, RepeatedData, AverageParameters, CompressedParameters, Kaplan, Porian, DiLoCo, FederatedPACBayes,
        ComputeOnly, Henighan, Farseer, RoutedLM, Rectified, DataMixture, InferenceAware, Rosenfeld,
    )
}  # fmt: skip
"""All laws of loss by size and data, by name."""

FORMS: dict[str, type[Form]] = {**LAWS, "LRAnnealing": LRAnnealing, "LossToLoss": LossToLoss}
"""All forms that can be fitted, by name."""


def law_by_name(name: str) -> Law:
    """Return the law of this name, in upper or lower case, with its default constants.

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
