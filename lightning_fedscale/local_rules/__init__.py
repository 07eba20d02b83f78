"""What a client does differently from plain local training: FedProx, SCAFFOLD, ..."""

from lightning_fedscale.local_rules.base import Correction, LocalRule, Merged, Outcome, Report

__all__ = ["Correction", "LocalRule", "Merged", "Outcome", "Report"]
