"""What the README shows can be typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

import lightning_fedscale
from tests.laws import reference

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf8"), re.S)


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[list[torch.Tensor]]:
        return reference.loader(reference.dataset())


def test_its_code_runs_from_top_to_bottom() -> None:
    trained: list[int] = []

    def trainer(**options: Any) -> Any:
        run = reference.quiet_trainer(**{**options, "max_epochs": 2})
        fit = run.fit

        def watched(*arguments: Any, **named: Any) -> None:
            fit(*arguments, **named)
            trained.append(run.global_step)

        run.fit = watched  # type: ignore[method-assign]
        return run

    names: dict[str, Any] = {"Trainer": trainer, "module": reference.make_module(), "datamodule": Data()}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    assert len(BLOCKS) >= 3
    # Two rounds with a hundred clients, two with a probe before them; the others train without clients.
    assert trained[:2] == [2, 2]
    assert len(trained) == 6
    assert names["probe"].result.device_classes.keys() == {"phone", "jetson", "t4"}
    assert names["model"].best_batch(clients=4, local_steps=5) == 89


def test_its_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text("utf8"))
    assert len(pictures) == 5
    assert all((README.parent / picture).stat().st_size > 10_000 for picture in pictures)


def test_every_promised_metric_is_logged_and_no_other() -> None:
    text = README.read_text("utf8")
    sentence = re.search(r"Every round logs (.*?), whatever", text, re.S)
    assert sentence is not None
    promised = {name.removeprefix("round/") for name in re.findall(r"`([\w/]+)`", sentence[1])}
    run = reference.quiet_trainer(max_epochs=1, strategy=lightning_fedscale.FederatedStrategy())
    run.fit(reference.make_module(), reference.loader(reference.dataset()))
    assert promised == {name.removeprefix("round/") for name in run.strategy.last_round.metrics()}  # type: ignore[attr-defined]
