"""Checks of a table of runs: wrong units, clients that are counted twice or not at all, missing rows."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lightning_fedscale.scaling.form import Interval

_LEAST, _MOST = 0.05, 1e3
"""Limits of FLOPs over 6 params tokens. Frozen layers, or the first layer's shorter backward pass, lower it;
convolutions, which use a weight at every place of an image, raise it."""
_ODD = 10.0
_BEYOND = 0.25
"""How far outside 0 to 1 a ``rho`` without an interval may be."""


def doubts_of_flops(table: pd.DataFrame, flops_per: float | None = None) -> list[str]:
    """Return what is wrong with the FLOPs, compared with sizes and tokens.

    Args:
        table: table with ``params``, ``tokens``, ``flops`` and ``clients``.
        flops_per: the true FLOPs per parameter and token, if they are known.

    Example:
        >>> runs = {"params": [1e6, 1e7], "tokens": [1e8, 1e9], "clients": [1, 1], "flops": [6e5, 6e7]}
        >>> doubts_of_flops(pd.DataFrame(runs))  # in GFLOPs
        ['flops are 1e-09 times 6 params tokens; check that all three are plain numbers (no GFLOPs) of one client']
    """
    ratio = np.log((table["flops"] / (6.0 * table["params"] * table["tokens"])).to_numpy(dtype=np.float64))
    clients = np.log(table["clients"].to_numpy(dtype=np.float64))
    doubts = []
    if clients.std() > 0 and abs(slope := float(np.polyfit(clients, ratio, 1)[0])) > 0.5:
        all_, one = ("flops", "tokens") if slope > 0 else ("tokens", "flops")
        doubts.append(
            f"flops / (6 params tokens) grows as clients^{slope:.2g}: {all_} seem to be those of all clients, and {one}"
            " those of one client; pass one client's numbers in both columns"
        )
        ratio = ratio - slope * clients
    middle = math.exp(float(np.median(ratio))) / (1.0 if flops_per is None else flops_per / 6.0)
    limits = (_LEAST, _MOST) if flops_per is None else (1 / _ODD, _ODD)
    if not limits[0] <= middle <= limits[1]:
        known = "6" if flops_per is None else f"{flops_per:g}"
        right = "" if middle < 1 or flops_per is not None else "; if weights are used that often, pass flops_per="
        doubts.append(
            f"flops are {middle:.2g} times {known} params tokens; check that all three are plain numbers (no GFLOPs) of"
            f" one client{right}"
        )
    if (odd := np.abs(ratio - np.median(ratio)) > math.log(_ODD)).any():
        doubts.append(
            f"in {odd.sum()} of {len(ratio)} rows (the first is row {odd.argmax()}), flops do not match params and"
            " tokens; check that all rows have the same units"
        )
    return doubts


def doubt_of_rho(rho: Interval) -> str | None:
    """Return why a fitted ``rho`` is implausible; None if it is plausible.

    Example:
        >>> print(doubt_of_rho(Interval(0.9, 0.7, 1.2)), doubt_of_rho(Interval(1.7, 1.6, 1.8)), sep="; ")
        None; rho is 1.7 (1.6 to 1.8), but should lie between 0 (all compute counts) and 1 (the average client's): ...
    """
    known = math.isfinite(rho.low + rho.high)
    low, high = (rho.low, rho.high) if known else (rho.value - _BEYOND, rho.value + _BEYOND)
    if low <= 1.0 and high >= 0.0:
        return None
    if low > 1.0:
        causes = (
            "check whether tokens and flops are those of all clients instead of one client (which adds 1), and whether"
            " the learning rate was tuned for one client only"
        )
    else:
        causes = (
            "check whether tokens were divided by the clients twice (which subtracts 1), and whether several clients"
            " had better learning rates or other data than one client"
        )
    return f"rho is {rho}, but should lie between 0 (all compute counts) and 1 (the average client's): {causes}"


def notes_of_rows(table: pd.DataFrame) -> list[str]:
    """Return notes on rows that seem to be missing or duplicated."""
    notes, index = [], table.index
    if pd.api.types.is_integer_dtype(index) and index.is_unique and len(index):
        gone = int(index.max() - index.min() + 1 - len(index))
        if gone:
            notes.append(
                f"{gone} rows between the first and the last were dropped before; keep runs that diverged in the table"
            )
    if doubled := int(table.duplicated().sum()):
        notes.append(f"{doubled} rows are duplicates, which makes the intervals too narrow")
    if {"params", "clients"} <= set(table) and table["clients"].nunique() > 1:
        sizes = {clients: set(rows["params"].round()) for clients, rows in table.groupby(table["clients"].astype(int))}
        common, every = set.intersection(*sizes.values()), set.union(*sizes.values())
        if len(common) >= len(every) / 2:
            for clients, own in sizes.items():
                if missing := len(every - own):
                    notes.append(f"with {clients!r} clients, {missing} of {len(every)} sizes are missing")
    return notes
