"""What a client does differently from plain local training: FedProx, SCAFFOLD, ..."""

from lightning_fedscale.local_rules.base import Correction, LocalRule, Merged, Outcome, Report
from lightning_fedscale.local_rules.ditto import Ditto

__all__ = ["Correction", "Ditto", "LocalRule", "Merged", "Outcome", "Report"]
