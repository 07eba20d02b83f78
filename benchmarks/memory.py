"""What a round costs in memory: the plain Trainer and FederatedStrategy, each in a process of its own.

    python benchmarks/memory.py                       # 25 million float32 parameters, half a minute
    python benchmarks/memory.py --parameters 1 --wide

Every process trains the same model on the same batches and reports the peak of its resident memory. The difference to
the plain Trainer is also given in float64 vectors as long as the model: what a round holds beside parameters,
gradients and optimizer state. One thread.
"""

from __future__ import annotations

import argparse
import logging
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedscale import FederatedStrategy

PLAIN, FEDERATED = "Trainer(strategy='auto')", "FederatedStrategy, 4 clients a round"
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
LAYERS = 25


class Net(pl.LightningModule):
    """As many parameters as wanted in equal layers, or nearly all of them in a single one."""

    def __init__(self, parameters: int, optimizer: str, wide: bool) -> None:
        super().__init__()
        width = round((parameters if wide else parameters / LAYERS) ** 0.5)
        layers = [nn.Linear(width, width, bias=False) for _ in range(1 if wide else LAYERS)]
        self.net = nn.Sequential(nn.Linear(8, width), *layers)
        self._optimizer = OPTIMIZERS[optimizer]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """A loss that every parameter has a part in."""
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With no state, or with two more tensors for every parameter."""
        return self._optimizer(self.parameters(), lr=1e-3)


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def train(contender: str, parameters: int, optimizer: str, wide: bool) -> tuple[int, int]:
    """Two rounds of four clients with two batches each, or as many batches; returns parameters and peak memory."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    module = Net(parameters, optimizer, wide)
    strategy = "auto" if contender == PLAIN else FederatedStrategy(4, executor="sequential", cache_dataset=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(32, 8)), batch_size=4))
    return sum(parameter.numel() for parameter in module.parameters()), peak_memory()


def measured(contender: str, options: list[str]) -> tuple[int, int]:
    """`train` in a new process."""
    command = [sys.executable, __file__, *options, "--contender", contender]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    count, peak = done.stdout.split()[-2:]
    return int(count), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=25.0, help="millions of them, in float32")
    parser.add_argument("--wide", action="store_true", help="nearly all of them in one layer")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="of the clients; both one after the other if left out")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contender:
        print(*train(asked.contender, round(asked.parameters * 1e6), asked.optimizer, asked.wide))
        return
    console = Console(width=100)
    console.print(f"torch {torch.__version__}, lightning {pl.__version__}, {platform.machine()}, 1 thread")
    for optimizer in [asked.optimizer] if asked.optimizer else OPTIMIZERS:
        options = ["--parameters", str(asked.parameters), "--optimizer", optimizer, *(["--wide"] * asked.wide)]
        table = Table(title=f"{asked.parameters:g} million float32 parameters, {optimizer}")
        for column in ("", "peak memory, MB", "more than the plain Trainer, MB", "in float64 vectors of that length"):
            table.add_column(column, justify="right" if column else "left")
        plain = measured(PLAIN, options)
        for contender, (count, peak) in ((PLAIN, plain), (FEDERATED, measured(FEDERATED, options))):
            more = peak - plain[1]
            table.add_row(contender, f"{peak / 1e6:.0f}", f"{more / 1e6:.0f}", f"{more / (8 * count):.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
