"""Checks of this machine for commands."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_fedscale.study.trial import quiet


def check_accelerator(accelerator: str) -> None:
    """Check that the accelerator is available, before any work is done.

    Raises:
        ValueError: if it is not available or unknown; the message names the argument.
    """
    try:
        with quiet():
            pl.Trainer(accelerator=accelerator, devices=1, barebones=True)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ValueError(f"accelerator={accelerator!r}: {error}") from None
