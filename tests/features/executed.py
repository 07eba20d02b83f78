"""Runs the Python that a page shows, from its top to its end, as README.md and the pages of docs/ promise."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from tests.laws import reference

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
CLAIM = re.compile(r"# (?:.* )?-> (.+)$")


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[list[torch.Tensor]]:
        return reference.loader(reference.dataset())


def blocks(page: Path) -> list[str]:
    """The Python of a page."""
    return BLOCK.findall(page.read_text("utf8"))


def project(trained: list[int], **always: Any) -> dict[str, Any]:
    """The reader's own ``Trainer``, ``module`` and ``datamodule``, small and quiet.

    Args:
        trained: gets the number of steps of every ``fit``.
        **always: options of every Trainer, whatever the page says.
    """

    def trainer(**options: Any) -> Any:
        run = reference.quiet_trainer(**{**options, **always})
        fit = run.fit

        def watched(*arguments: Any, **named: Any) -> None:
            fit(*arguments, **named)
            trained.append(run.global_step)

        run.fit = watched  # type: ignore[method-assign]
        return run

    return {"Trainer": trainer, "module": reference.make_module(), "datamodule": Data()}


def execute(page: Path, names: dict[str, Any]) -> int:
    """Run all blocks of a page with these names, and check every line that ends in ``# -> value``.

    Returns:
        How many values were checked.
    """
    text, checked = page.read_text("utf8"), 0
    for found in BLOCK.finditer(text):
        # Lines keep their numbers, so that a failure says where on the page it is.
        code = "\n" * text[: found.start(1)].count("\n") + found[1]
        lines = code.splitlines()
        for statement in ast.parse(code, str(page)).body:
            assert statement.end_lineno is not None
            claim = CLAIM.search(lines[statement.end_lineno - 1])
            if claim is None or not isinstance(statement, ast.Expr):
                exec(compile(ast.Module([statement], []), str(page), "exec"), names)
                continue
            value = eval(compile(ast.Expression(statement.value), str(page), "eval"), names)
            assert repr(value) == claim[1], f"{page.name}, line {statement.end_lineno}: {value!r}"
            checked += 1
    return checked
