"""Somebody's LightningCLI project."""

import torch
from digits import Digits, DigitsData  # type: ignore[import-not-found]
from lightning.pytorch.cli import LightningCLI


def main():
    cli = LightningCLI(Digits, DigitsData)
    print(f"val_acc {cli.trainer.callback_metrics['val_acc']:.3f}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
