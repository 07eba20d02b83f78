"""Selection of runs that one law can be fitted to, by method, partition, batch size or local steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lightning_fedscale.scaling.partition_id import is_fingerprint, partition_id

_PLURALS = {
    "partition": "partitions", "method": "methods", "batch_size": "batch sizes",
    "local_steps": "numbers of local steps", "optimizer": "optimizers",
}  # fmt: skip
"""Settings that need a law for each value, with their plurals for messages."""

_COLUMNS = {
    "partition": ("fingerprint", "partition", "partition_name"), "method": ("method",),
    "batch_size": ("batch_size", "batch"), "local_steps": ("local_steps",),
}  # fmt: skip
"""Columns that record a setting, by the argument that selects it."""


def select(table: pd.DataFrame, **requested: Any) -> pd.DataFrame:
    """Select the rows of one method, partition, batch size or number of local steps; None selects all.

    Raises:
        ValueError: if the table does not record the setting or has no such row; the message names the argument.
    """
    for name, value in requested.items():
        if value is None:
            continue
        columns = [each for each in _COLUMNS[name] if each in table and table[each].notna().any()]
        if not columns:
            raise ValueError(
                f"{name}={value!r}: the table of runs does not record their {_PLURALS[name]}. Leave this argument out,"
                " or add the column."
            )
        if name == "partition":
            given = partition_id(value)
            wanted: set[Any] = {given.fingerprint} if given.fingerprint is not None else {given.name}
        else:
            wanted = {value}
        found = table[columns].isin(wanted).any(axis=1)
        if not found.any():
            recorded = ", ".join(_short(each) for each in dict.fromkeys(table[columns[0]].dropna()))
            raise ValueError(f"{name}={_shown(value)}: no run matches. Pass one of those in the table: {recorded}.")
        table = table[found]
    return table.reset_index(drop=True) if any(value is not None for value in requested.values()) else table


def mixed_settings(table: pd.DataFrame) -> list[str]:
    """Return a note on each setting that differs among the runs and needs a law for each value.

    Example:
        >>> mixed_settings(pd.DataFrame({"method": ["fed_avg", "scaffold"]}))
        ['the runs have two methods: fed_avg and scaffold; fit each separately (method=)']
    """
    notes = []
    for name, plural in _PLURALS.items():
        found = _partitions(table) if name == "partition" else values_of(table, name)
        if len(found) > 1:
            shown = [_short(each) for each in found]
            number = "two" if len(found) == 2 else str(len(found))
            among = " and ".join((", ".join(shown[:-1]), shown[-1]))
            how = f" ({name}=)" if name in _COLUMNS else ""
            notes.append(f"the runs have {number} {plural}: {among}; fit each separately{how}")
    return notes


def values_of(table: pd.DataFrame, name: str) -> list[Any]:
    """Return the values of a column without duplicates; an empty list without the column."""
    return list(dict.fromkeys(table[name].dropna())) if name in table else []


def _partitions(table: pd.DataFrame) -> list[Any]:
    """Return the partitions that differ; one partitioner with several numbers of clients counts as one."""
    if "partition" in table:
        return values_of(table, "partition")
    if "fingerprint" not in table:
        return []
    clients = table["clients"] if "clients" in table else pd.Series(1, table.index)
    several = [found for _, rows in table.groupby(clients) if len(found := values_of(rows, "fingerprint")) > 1]
    return several[0] if several else []


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text[:8]}.." if is_fingerprint(text) else text


def _shown(value: Any) -> str:
    return repr(str(value) if isinstance(value, Path) else value)
