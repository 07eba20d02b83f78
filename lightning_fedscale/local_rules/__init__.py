"""Local rules, which change plain local training: FedProx, SCAFFOLD, ..."""

from lightning_fedscale.local_rules import schedules as schedules  # which has no rules, but is found here too
from lightning_fedscale.local_rules.base import Correction, LocalRule, Merged, Outcome, Report
from lightning_fedscale.local_rules.ditto import Ditto
from lightning_fedscale.local_rules.fed_dyn import fed_dyn
from lightning_fedscale.local_rules.fed_nova import fed_nova
from lightning_fedscale.local_rules.fed_prox import fed_prox
from lightning_fedscale.local_rules.registry import FACTORIES, by_name
from lightning_fedscale.local_rules.scaffold import scaffold

__all__ = [
    "FACTORIES",
    "Correction",
    "Ditto",
    "LocalRule",
    "Merged",
    "Outcome",
    "Report",
    "by_name",
    "fed_dyn",
    "fed_nova",
    "fed_prox",
    "scaffold",
]
