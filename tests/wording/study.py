"""Messages of `study`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from torch import nn

from lightning_fedscale import study
from lightning_fedscale.partitioners import Partition
from lightning_fedscale.study.arguments import axis, check_size, current_size, methods_of, partition_of, rates_of
from lightning_fedscale.study.ledger import Ledger
from lightning_fedscale.study.sweeping import _finished, _numbers
from lightning_fedscale.study.trial import _loss_in
from tests.wording import Row


def _reused(second: object) -> None:
    """Use a study's folder for another study."""
    with TemporaryDirectory() as folder:
        Ledger(Path(folder, "study"), {"flops": 1e9})
        try:
            Ledger(Path(folder, "study"), {"flops": second})
        except ValueError as error:
            raise ValueError(str(error).replace(folder, "")) from None


def _swept(local_steps: int) -> None:
    """Use a sweep's folder for another sweep."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "sweep", "runs.csv")
        file.parent.mkdir()
        pd.DataFrame([{"local_steps": 5}]).to_csv(file, index=False)
        try:
            _finished(file, {"local_steps": local_steps})
        except ValueError as error:
            raise ValueError(str(error).replace(folder, "")) from None


def _fixed(size: int = 4, *, bias: bool = True) -> nn.Module:
    """A model whose argument does not change its size."""
    return nn.Linear(3, 3, bias)


ROWS: list[Row] = [
    Row(
        lambda: study.size(3, BoringDataModule, 1e6),  # type: ignore[arg-type]
        TypeError,
        "module=3: pass a class or a function that makes it.",
    ),
    Row(
        lambda: study.size(BoringModel, BoringDataModule, -1.0), ValueError, "flops=-1.0: pass a finite number above 0."
    ),
    Row(
        lambda: study.sweep(BoringModel, BoringDataModule, [1, 2], 1e6),
        ValueError,
        "sizes=[1, 2]: pass at least four different sizes; fewer do not determine a law.",
    ),
    Row(lambda: axis("sizes", []), ValueError, "sizes=[]: pass at least one value to try, or current=."),
    Row(lambda: axis("local_steps", []), ValueError, "local_steps=[]: pass at least one value to try."),
    Row(lambda: rates_of([]), ValueError, "rates=[]: pass at least one multiple of the module's learning rate."),
    Row(
        lambda: current_size(_fixed, "width", None),
        ValueError,
        "argument='width': tests.wording.study._fixed has no such argument. Name the one that sets the model's size; it"
        " has size, bias.",
    ),
    Row(
        lambda: check_size(_fixed, "size", (4, 8)),
        ValueError,
        "argument='size': tests.wording.study._fixed has 12 parameters both with 4 and with 8. Name the argument that"
        " sets its size.",
    ),
    Row(lambda: methods_of([]), ValueError, "methods=[]: pass at least one method, or None for all."),
    Row(
        lambda: methods_of(None, {"local_steps": 3}),
        ValueError,
        "strategy: local_steps=3 cannot be set here. Leave it out of strategy=, or pass local_steps= next to it.",
    ),
    Row(
        lambda: methods_of(None, {"num_clients": 3}),
        ValueError,
        "strategy: num_clients=3 cannot be set here. Leave it out of strategy=, or pass clients= next to it.",
    ),
    Row(
        lambda: methods_of(None, {"executor": "auto"}),
        ValueError,
        "strategy: executor='auto' cannot be set here. Leave it out of strategy=.",
    ),
    Row(
        lambda: methods_of(None, "qsgd"),  # type: ignore[arg-type]
        TypeError,
        "strategy='qsgd': pass arguments of FederatedStrategy by name, {'compressor': 'qsgd'}.",
    ),
    Row(
        lambda: partition_of(3, None, [0, 1]),
        TypeError,
        "partition=3: pass a name such as 'dirichlet', a file, a Partition or a Partitioner.",
    ),
    Row(
        lambda: _numbers([2], Partition.from_lists([[0], [1], [2]])),
        ValueError,
        "clients=[2]: the partition has 3 clients. Pass clients=[3], or leave it out.",
    ),
    Row(lambda: _numbers([0], None), ValueError, "clients=[0]: pass whole numbers, at least 1."),
    Row(
        lambda: _reused(2.0),
        ValueError,
        "runs='/study': this folder holds another study (flops 1000000000.0 there and 2.0 here). Name another folder.",
    ),
    Row(
        lambda: _swept(7),
        ValueError,
        "folder='/sweep': this folder holds a sweep with other values of local_steps. Name another folder.",
    ),
    Row(
        lambda: _loss_in([{"accuracy": 0.5}], None),
        ValueError,
        "loss=None: validation_step logs accuracy. Log the loss as val_loss or val/loss, or pass its name as loss=.",
    ),
]
