"""What commands ask of this machine."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_fedscale.study.trial import quiet


def check_accelerator(accelerator: str) -> None:
    """Refuse an accelerator that is not there before anything else is done.

    Raises:
        ValueError: if it is not there, or unknown; names the argument.
    """
    try:
        with quiet():
            pl.Trainer(accelerator=accelerator, devices=1, barebones=True)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ValueError(f"accelerator={accelerator!r}: {error}") from None
