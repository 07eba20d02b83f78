"""Differential privacy of clients, privacy accounting, and secure aggregation."""

from lightning_fedscale.privacy.base import AdaptiveClipping, Privacy
from lightning_fedscale.privacy.budget import PrivacyBudget
from lightning_fedscale.privacy.dp_fed_avg import dp_fed_avg
from lightning_fedscale.privacy.secure import secure_mean

__all__ = ["AdaptiveClipping", "Privacy", "PrivacyBudget", "dp_fed_avg", "secure_mean"]
