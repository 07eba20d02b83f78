"""Scaling laws: how loss depends on model size, data, compute and number of clients, and what is best."""

from importlib import import_module
from typing import Any

from jsonargparse import set_parsing_settings

from lightning_fedscale.scaling.base import (
    Allocation,
    Law,
    effective_flops,
    mean_flops,
)
from lightning_fedscale.scaling.batch import CriticalBatch, EMARule, LossToLoss, LRAnnealing
from lightning_fedscale.scaling.chinchilla import (
    AverageParameters,
    Chinchilla,
    CompressedParameters,
    RepeatedData,
    Rosenfeld,
    inference_wedge,
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
from lightning_fedscale.scaling.federated import Federated, FederatedPACBayes, federated, information
from lightning_fedscale.scaling.fit import Fit, fit, law_from_file
from lightning_fedscale.scaling.fit_page import plot_fit, write_report
from lightning_fedscale.scaling.form import Form, Interval, Range, Unfitted
from lightning_fedscale.scaling.isoflop import IsoFlop, isoflop
from lightning_fedscale.scaling.logs import Logs, has_logs, read_logs
from lightning_fedscale.scaling.planning import Plan, plan, plot_plans
from lightning_fedscale.scaling.position import Position, position_of
from lightning_fedscale.scaling.project import law_of, project_law, sweep_command
from lightning_fedscale.scaling.registry import FORMS, LAW_FILE, LAWS, law_by_name
from lightning_fedscale.scaling.runs import read_runs

__all__ = [
    "FORMS",
    "LAWS",
    "LAW_FILE",
    "Allocation",
    "AverageParameters",
    "Chinchilla",
    "CompressedParameters",
    "ComputeOnly",
    "CriticalBatch",
    "DataMixture",
    "DiLoCo",
    "EMARule",
    "Farseer",
    "Federated",
    "FederatedPACBayes",
    "Fit",
    "Form",
    "Henighan",
    "InferenceAware",
    "Interval",
    "IsoFlop",
    "Kaplan",
    "LRAnnealing",
    "Law",
    "Logs",
    "LossToLoss",
    "Plan",
    "Porian",
    "Position",
    "Range",
    "Rectified",
    "RepeatedData",
    "Rosenfeld",
    "RoutedLM",
    "Unfitted",
    "effective_flops",
    "federated",
    "fit",
    "has_logs",
    "inference_wedge",
    "information",
    "isoflop",
    "law_by_name",
    "law_from_file",
    "law_of",
    "mean_flops",
    "plan",
    "plot_fit",
    "plot_plans",
    "position_of",
    "project_law",
    "read_logs",
    "read_runs",
    "sweep_command",
    "write_report",
]

set_parsing_settings(subclasses_enabled=[Law])  # laws are dataclasses, which configuration files name by their classes


def __getattr__(name: str) -> Any:
    """Import `size` only when it is used: it trains, and the rest of this package needs neither Lightning nor torch."""
    if name == "size":
        return import_module("lightning_fedscale.study").size
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
