"""Checks whether runs were too short, or had too little or too dissimilar data, for a law of size and data."""

from __future__ import annotations

import pandas as pd

from lightning_fedscale.scaling.form import Form
from lightning_fedscale.scaling.made_for import MadeFor

SHORT = 2
"""A run of this many rounds or fewer is too short: its clients were aggregated once or twice only."""

REPEATED = 4.0
"""Passes up to which repeated data are nearly as good as new data (arXiv 2305.16264)."""

UNLIKE = 0.1
"""Mean Jensen-Shannon distance of clients' labels beyond which clients count as non-IID."""


def without_short(table: pd.DataFrame, form: Form) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs of more than two rounds if these are enough for a fit, else all, and notes on the short ones.

    Example:
        >>> from lightning_fedscale.scaling import Rosenfeld
        >>> few = pd.DataFrame({"params": [10, 20], "clients": 1, "flops": 60.0, "rounds": [1, 9], "loss": [0.5, 0.3]})
        >>> without_short(few, Rosenfeld())[1]
        ['1 of 2 runs had one or two rounds (10 parameters at 60 FLOPs): they are kept, since too few others remain']
    """
    if "rounds" not in table:
        return table, []
    is_short = pd.to_numeric(table["rounds"], errors="coerce") <= SHORT
    if not is_short.any():
        return table, []
    rest = table[~is_short]
    several = "tokens" in form.columns and table["clients"].nunique() > 1
    enough = (
        len(rest) >= 2 * (len(form.unknowns) + several)
        and rest["clients"].nunique() == table["clients"].nunique()
        and ("params" not in table or rest["params"].nunique() >= min(4, table["params"].nunique()))
    )
    said = f"{is_short.sum()} of {len(table)} runs had one or two rounds ({_named(table[is_short])})"
    if enough:
        return rest, [f"{said} and are left out"]
    return table, [f"{said}: they are kept, since too few others remain"]


def doubts_of_runs(made: MadeFor, form: Form) -> list[str]:
    """Return notes on runs whose data were repeated too often, or whose clients are non-IID.

    Example:
        >>> from lightning_fedscale.scaling import Rosenfeld
        >>> print(*doubts_of_runs(MadeFor(passes=(2.0, 37.0), samples=3000), Rosenfeld()))
        up to 37 passes over 3,000 samples: a law of unlimited data does not hold beyond 4; fit law='RepeatedData'
    """
    doubts = []
    if made.passes is not None and made.passes[1] > REPEATED and "unique_tokens" not in form.columns:
        doubts.append(
            f"up to {made.passes[1]:.3g} passes over {_data(made)}: a law of unlimited data does not hold beyond"
            f" {REPEATED:g}; fit law='RepeatedData'"
        )
    if (floor := floor_of(made)) is not None:
        doubts.append(floor)
    return doubts


def floor_of(made: MadeFor) -> str | None:
    """Return a note if clients are non-IID, which more data cannot compensate; None if IID or not known."""
    if made.mean_js_distance is None or made.mean_js_distance <= UNLIKE:
        return None
    return (
        f"the clients are non-IID (mean Jensen-Shannon distance of their labels {made.mean_js_distance:.2g}), so that"
        " the irreducible loss E contains a part that more data cannot reduce; it differs by partition and method"
    )


def _data(made: MadeFor) -> str:
    return "the data" if made.samples is None else f"{made.samples:,} samples"


def _named(table: pd.DataFrame, most: int = 3) -> str:
    """Name the runs in words."""
    by_size = {"params", "flops"} <= set(table)
    names = [
        f"{row['params']:,.0f} parameters at {row['flops'] * row['clients']:.2g} FLOPs" if by_size else f"row {place}"
        for place, row in zip(table.index, table.to_dict("records"), strict=True)
    ]
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
