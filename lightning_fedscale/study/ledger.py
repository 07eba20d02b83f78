"""A file with every run of a study, so that an interrupted study resumes with the missing runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_fedscale.study.race import Job
from lightning_fedscale.study.settings import Setting

_RUNS, _STUDY = "runs.csv", "study.json"


class Ledger:
    """The rows of finished runs, by job.

    Args:
        folder: folder for ``runs.csv`` and ``study.json``, which are created if they are missing.
        study: what all runs have in common.

    Raises:
        ValueError: if the folder holds another study; the message names the differences.
    """

    def __init__(self, folder: str | Path, study: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study = dict(study)
        self._check()
        file = self.folder / _RUNS
        table = pd.read_csv(file) if file.is_file() else pd.DataFrame()
        self._rows: dict[Job, dict[str, Any]] = {
            _job(row): row
            for row in ({str(name): value for name, value in each.items()} for each in table.to_dict("records"))
        }

    def get(self, job: Job) -> dict[str, Any] | None:
        """Return the row of a finished run; None if there is none."""
        return self._rows.get(_key(job))

    def add(self, job: Job, row: Mapping[str, Any]) -> None:
        """Store a finished run."""
        self._rows[_key(job)] = dict(row)
        file = self.folder / _RUNS
        pd.DataFrame([row]).to_csv(file, mode="a", header=not file.is_file(), index=False)

    def _check(self) -> None:
        file, mine = self.folder / _STUDY, json.loads(json.dumps(self.study))
        if not file.is_file():
            file.write_text(json.dumps(mine, indent=1), encoding="utf-8")
            return
        kept = json.loads(file.read_text(encoding="utf-8"))
        if others := sorted(name for name in {*kept, *mine} if kept.get(name) != mine.get(name)):
            differences = ", ".join(f"{name} {kept.get(name)!r} there and {mine.get(name)!r} here" for name in others)
            raise ValueError(
                f"runs={str(self.folder)!r}: this folder holds another study ({differences}). Name another folder."
            )


def _job(row: Mapping[str, Any]) -> Job:
    return _key(Job(Setting(*(row[name] for name in Setting._fields)), row["share"], row["seed"]))


def _key(job: Job) -> Job:
    """Round the numbers of a job as they are read from a file."""
    size, method, batch, steps, rate = job.setting
    setting = Setting(int(size), str(method), int(batch), int(steps), _digits(rate))
    return Job(setting, _digits(job.share), int(job.seed))


def _digits(number: float) -> float:
    return float(f"{number:.12g}") if math.isfinite(number) else number
