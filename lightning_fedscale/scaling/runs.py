"""Tables of runs to fit: from a DataFrame, from CSV files, and from the logs of `ComputeAccounting`."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lightning_fedscale.scaling.doubts import doubts_of_runs, without_short
from lightning_fedscale.scaling.form import Form
from lightning_fedscale.scaling.logs import EVENTS, TABLE, read_logs
from lightning_fedscale.scaling.made_for import MadeFor, made_for, passes_of
from lightning_fedscale.scaling.selection import mixed_settings, select
from lightning_fedscale.scaling.tuning import NOT_RECORDED, RATES, tuned
from lightning_fedscale.scaling.units import notes_of_rows

LOSSES = ("val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "loss/val", "test_loss", "test/loss")
"""Names of the loss that are searched for in logs, in this order."""
_COUNTS = ("compute/params", "compute/tokens", "compute/flops_total", "compute/flops_per_client")
_RATE = "compute/learning_rate"
_SIZES = ("params", "tokens")
_UNIQUE = "unique_tokens"
_NUMBERS = (*_SIZES, "flops", "clients", "loss", *RATES)


class Runs(NamedTuple):
    """Runs that are to be fitted.

    Attributes:
        table: the runs that count.
        said: what is known about their learning rates, see `lightning_fedscale.scaling.tuning`.
        notes: doubts about the runs, in words.
        made_for: the settings that the runs have in common.
    """

    table: pd.DataFrame
    said: str = NOT_RECORDED
    notes: tuple[str, ...] = ()
    made_for: MadeFor = MadeFor()


def runs_table(runs: Any, form: Form, loss: str | None = None) -> pd.DataFrame:
    """Return the table of `runs_to_fit`."""
    return runs_to_fit(runs, form, loss).table


def runs_to_fit(runs: Any, form: Form, loss: str | None = None, **requested: Any) -> Runs:
    """Read runs as a table with what the form needs, ``loss`` and ``clients``; derive tokens from FLOPs or vice versa.

    If runs have several learning rates, those at the best rate count, see `lightning_fedscale.scaling.tuning`. Runs of
    one or two rounds are left out if enough others remain.

    Args:
        runs: a table (DataFrame, or mapping of columns), the path of a CSV file, of a run's directory or of a directory
            of runs, or several paths.
        form: the form to fit.
        loss: name of the logged loss, for directories; None for the first of `LOSSES`.
        requested: values of ``partition``, ``method``, ``batch_size`` and ``local_steps``; only their rows count.

    Raises:
        ValueError: for missing columns, numbers that are not positive, too few runs, or no run that matches
            ``requested``.
    """
    if isinstance(runs, (str, Path)):
        runs = [runs]
    if isinstance(runs, Sequence) and all(isinstance(each, (str, Path)) for each in runs):
        table = read_runs(runs, loss)
    else:
        table = _as_table(runs)
    for column in {*form.columns, *_NUMBERS} & set(table):
        _read_words(table, column)
    notes = notes_of_rows(table)
    table = select(table, **requested)
    notes += mixed_settings(table)
    has_clients = "clients" in table
    table = _completed(table, form)
    for column in _needed(table, form):
        if column != "loss":
            _check_column(table, column)
    found = tuned(table)  # before losses are checked, since runs at some rates diverge
    table = found.table.copy()
    _check_column(table, "loss")
    table, short = without_short(table, form)
    made = made_for(table, found.said, has_clients=has_clients)
    notes += [*found.notes, *short, *doubts_of_runs(made, form)]
    return Runs(table.reset_index(drop=True), found.said, tuple(notes), made)


def _read_words(table: pd.DataFrame, column: str) -> None:
    """Convert text in a column to numbers, if there is any.

    Raises:
        ValueError: for text that is not a number.
    """
    given = table[column]
    words = np.array([isinstance(each, str) for each in given], dtype=bool)
    if not words.any():
        return
    numbers = pd.to_numeric(given, errors="coerce").to_numpy(dtype=np.float64)
    if (wrong := words & ~np.isfinite(numbers)).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"runs: {column}={given.iloc[row]!r} in row {row} is not a number. Write it as 12000 or 1.2e4."
        )
    warnings.warn(f"runs: the column {column} holds text, which is read as numbers.", stacklevel=4)
    table[column] = numbers


def _check_column(table: pd.DataFrame, column: str) -> None:
    """Convert a column to floats.

    Raises:
        ValueError: for an invalid number.
    """
    numbers = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64)
    wrong = ~(np.isfinite(numbers) & ((numbers > 0) | (column == "S2") | column.startswith("share.")))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"runs: {column}={numbers[row]:g} in row {row}: leave out runs without a finite {column} above 0."
        )
    if column == "clients" and (wrong := (numbers < 1) | (numbers % 1 != 0)).any():
        row = int(wrong.argmax())
        raise ValueError(f"runs: clients={numbers[row]:g} in row {row}: pass whole numbers, at least 1.")
    table[column] = numbers


def columns_of(table: pd.DataFrame, form: Form) -> dict[str, Any]:
    """Return the columns that the form's formula needs, by name; "name.0", "name.1", ... are in one tuple."""
    found: dict[str, Any] = {}
    for name in _needed(table, form):
        whole, dot, _ = name.partition(".")
        values = table[name].to_numpy(dtype=np.float64)
        found[whole] = (*found.get(whole, ()), values) if dot else values
    return found


def read_runs(paths: str | Path | Iterable[str | Path], loss: str | None = None) -> pd.DataFrame:
    """Read the rows of CSV files, and a row for every run directory.

    A run directory holds the scalars of `ComputeAccounting` and a loss, as TensorBoard's events or CSVLogger's
    ``metrics.csv``; the last value of each counts. Its ``position.json``, if there is one, records how the run trained.
    Tokens and FLOPs of the row are those of one client. From the directory of a sweep, ``runs.csv`` is read.

    Raises:
        ValueError: if there are no runs, or no loss in them.
    """
    if not isinstance(paths, (str, Path, Iterable)):
        raise TypeError(f"runs={paths!r}: pass paths of CSV files or run directories.")
    tables = [_read(each, loss) for each in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not tables:
        raise ValueError("runs=[]: pass a table, CSV files or run directories.")
    return pd.concat(tables, ignore_index=True)


def _read(path: str | Path, loss: str | None) -> pd.DataFrame:
    if not isinstance(path, (str, Path)):
        raise TypeError(f"runs: {path!r} is not the path of a CSV file or a run directory. Pass such a path.")
    return _read_table(Path(path)) if Path(path).is_file() else _read_folder(Path(path), loss)


def _as_table(runs: Any) -> pd.DataFrame:
    if isinstance(runs, (pd.DataFrame, Mapping)):
        return pd.DataFrame(dict(runs) if isinstance(runs, Mapping) else runs).copy()
    if not isinstance(runs, Sequence) or not all(isinstance(each, Mapping) for each in runs):
        raise TypeError(f"runs={runs!r}: pass a table, CSV files or run directories.")
    return pd.DataFrame(list(runs))


def _read_table(file: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"runs={str(file)!r}: not readable as CSV: {error}") from None
    if table.empty:
        raise ValueError(f"runs={str(file)!r}: this table has no rows. Pass a table with a row for each run.")
    return table


def _needed(table: pd.DataFrame, form: Form) -> list[str]:
    shares = [str(name) for name in table if str(name).startswith("share.")] if "share.0" in form.columns else []
    names = [*form.columns, *shares, "loss", "clients"]
    return list(dict.fromkeys([*names, "flops"] if set(_SIZES) <= set(form.columns) else names))


def _completed(table: pd.DataFrame, form: Form) -> pd.DataFrame:
    there = ", ".join(map(str, table))
    known = {"tokens", "clients"} | ({_UNIQUE} if {"passes", "samples"} & set(table) else set())
    if missing := {*form.columns, "loss"} - {*table} - known:
        names = f"column {missing.pop()} is" if len(missing) == 1 else f"columns {', '.join(sorted(missing))} are"
        raise ValueError(f"runs: the {names} missing; there are {there or 'none'}.")
    if "clients" not in table:
        table["clients"] = 1
    if "tokens" in form.columns and "tokens" not in table:
        if not {"flops", "params"} <= set(table):
            raise ValueError(f"runs: a column tokens or flops is missing; there are {there}.")
        table["tokens"] = table["flops"] / (6.0 * table["params"])
    if set(_SIZES) <= set(table) and "flops" not in table:
        table["flops"] = 6.0 * table["params"] * table["tokens"]
    if _UNIQUE in form.columns and _UNIQUE not in table and (passes := passes_of(table)) is not None:
        table[_UNIQUE] = table["tokens"] / passes
    return table


def _read_folder(folder: Path, loss: str | None) -> pd.DataFrame:
    if not folder.is_dir():
        raise ValueError(f"runs={str(folder)!r}: there is no such file or directory.")
    if (folder / "runs.csv").is_file():
        return _read_table(folder / "runs.csv")
    logs = {path.parent for pattern in (EVENTS, TABLE) for path in folder.rglob(pattern)}
    rows = {log: row for log in sorted(logs) if (row := _read_run(log, loss)) is not None}
    if not rows:
        raise ValueError(f"runs={str(folder)!r}: no run in it logged {_COUNTS[0]}. Train with ComputeAccounting().")
    parts, counted = ({str(log.relative_to(folder)).split("/")[0] for log in found} for found in (logs, rows))
    if others := ", ".join(sorted(parts - counted)):
        warnings.warn(f"runs={str(folder)!r}: {others} did not log {_COUNTS[0]}, and is left out.", stacklevel=4)
    return pd.DataFrame(list(rows.values()))


def _read_run(log: Path, loss: str | None) -> dict[str, Any] | None:
    last = {name: float(values.iloc[-1]) for name, values in read_logs(log).scalars.items()}
    if not set(_COUNTS) <= set(last):
        return None
    names = LOSSES if loss is None else (loss,)
    name = next((each for each in names if each in last), None)
    if name is None:
        others = ", ".join(sorted(set(last) - {each for each in last if each.startswith("compute/")}))
        raise ValueError(
            f"loss={loss!r}: {log} did not log {' or '.join(names)}. Pass loss= with a name that it logged:"
            f" {others or 'none'}."
        )
    # The number that trains in a round, by which `ComputeAccounting` divides.
    clients = max(1, round(last["compute/flops_total"] / last["compute/flops_per_client"]))
    return {
        "run": str(log),
        "params": last["compute/params"],
        "tokens": last["compute/tokens"] / clients,
        "flops": last["compute/flops_per_client"],
        "clients": clients,
        "loss": last[name],
        **({"learning_rate": last[_RATE]} if _RATE in last else {}),
        **_trained_as(log / "position.json"),
    }


def _trained_as(file: Path) -> dict[str, Any]:
    """Read how the run trained from the file of `ComputeAccounting`, as columns of a sweep; empty without it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return dict(json.loads(file.read_text(encoding="utf-8"))["trained_as"])
    return {}


def decades(values: pd.Series[float]) -> float:
    """Return the number of powers of ten that the values span."""
    return math.log10(values.max() / values.min())
