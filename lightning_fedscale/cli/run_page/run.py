"""A finished run, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lightning_fedscale.scaling import has_logs, read_logs

Series = pd.Series


@dataclass(frozen=True)
class Run:
    """The logs and files of a run; parts that are missing are empty.

    Attributes:
        folder: folder of the run.
        scalars: logged values by name, over steps; a step of `FederatedStrategy` is a round.
        settings: hyperparameters, with nested names joined by "/".
        position: ``position.json`` of `ComputeAccounting`: costs, and the run's position under a law.
        pictures: logged pictures by name, as PNG.
    """

    folder: Path
    scalars: dict[str, Series[float]]
    settings: dict[str, Any]
    position: dict[str, Any]
    pictures: dict[str, bytes]

    @property
    def federated(self) -> bool:
        """Whether its steps are rounds."""
        return "round/clients" in self.scalars

    @property
    def unit(self) -> str:
        """Name of a step: "round" or "step"."""
        return "round" if self.federated else "step"

    def last(self, name: str) -> float | None:
        """Return the last logged value of a name; None if it was not logged."""
        values = self.scalars.get(name)
        return None if values is None else float(values.iloc[-1])

    def spans(self) -> list[tuple[int, int]]:
        """Return the first and last logged step of each critical phase."""
        found: list[tuple[int, int]] = []
        before = False
        for step, critical in self.scalars.get("phase/critical", pd.Series(dtype=float)).items():
            if critical and before:
                found[-1] = (found[-1][0], int(str(step)))
            elif critical:
                found.append((int(str(step)), int(str(step))))
            before = bool(critical)
        return found


def read_run(folder: str | Path) -> Run:
    """Read a run's folder: TensorBoard's events, ``metrics.csv``, ``hparams.yaml``, ``position.json``.

    Args:
        folder: folder of the run, or one above it with only one run below.

    Raises:
        ValueError: if there is no run or more than one.
    """
    folder = _only_run(Path(folder))
    logs = read_logs(folder)
    return Run(folder, logs.scalars, _settings(folder / "hparams.yaml"), _position(folder), logs.pictures)


def along(values: Series[float], axis: Series[float]) -> Series[float]:
    """Convert values over steps to values over another quantity, such as FLOPs.

    Example:
        >>> along(pd.Series([3.0, 2.0], index=[5, 20]), pd.Series([100.0, 200.0], index=[0, 10])).to_dict()
        {150.0: 3.0}
    """
    inside = values[(values.index >= axis.index[0]) & (values.index <= axis.index[-1])]
    at = np.interp(inside.index.to_numpy(dtype=float), axis.index.to_numpy(dtype=float), axis.to_numpy(dtype=float))
    return pd.Series(inside.to_numpy(), index=at)


def _only_run(folder: Path) -> Path:
    if folder.is_file():
        raise ValueError(f"run={str(folder)!r}: this is a file. Pass the folder that a logger wrote.")
    if not folder.is_dir():
        raise ValueError(f"run={str(folder)!r}: there is no such directory.")
    if has_logs(folder):
        return folder
    below = sorted(path for path in folder.rglob("*") if path.is_dir() and has_logs(path))
    runs = [
        path for path in below if not any(other in path.parents for other in below)
    ]  # folders below a run's folder hold its curves
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise ValueError(
            f"run={str(folder)!r}: it has neither TensorBoard's events nor a metrics.csv. Pass the folder that a"
            " logger wrote, such as lightning_logs/version_0."
        )
    shown = ", ".join(map(str, runs[:5])) + (", ..." if len(runs) > 5 else "")
    raise ValueError(
        f"run={str(folder)!r}: it holds {len(runs)} runs, and a report is about one. Pass one of: {shown}."
    )


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader that reads saved Python objects as the name of their class."""


def _named(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> str:
    return str(getattr(node, "value", "") or tag) if isinstance(node, yaml.ScalarNode) else tag.rpartition(":")[2]


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _named)
_Plain.add_multi_constructor("!", _named)


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = yaml.load(file.read_text("utf-8"), Loader=_Plain)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not readable as YAML: {error}") from None
    return dict(_flat(found)) if isinstance(found, Mapping) else {}


def _flat(nested: Mapping[Any, Any], above: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in nested.items():
        rows += _flat(value, f"{above}{name}/") if isinstance(value, Mapping) and value else [(f"{above}{name}", value)]
    return rows


def _position(folder: Path) -> dict[str, Any]:
    file = folder / "position.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from None
    return found if isinstance(found, dict) else {}
