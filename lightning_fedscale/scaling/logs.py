"""Reading the logs in a run's folder: TensorBoard's events and CSVLogger's ``metrics.csv``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

EVENTS, TABLE = "events.out.tfevents*", "metrics.csv"


class Logs(NamedTuple):
    """The logs of a run.

    Attributes:
        scalars: values by name, indexed by step; the last value counts if a step has several.
        pictures: the last picture of each name, as PNG.
    """

    scalars: dict[str, pd.Series[float]]
    pictures: dict[str, bytes]


def read_logs(folder: str | Path) -> Logs:
    r"""Read the logs of one folder, without its subfolders; events take precedence over the table.

    Raises:
        ValueError: for a table that was not written by CSVLogger.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "metrics.csv").write_text("epoch,step,loss\n0,4,2.5\n1,9,\n1,9,1.5\n")
        ...     read_logs(folder).scalars["loss"].to_dict()
        {4: 2.5, 9: 1.5}
    """
    scalars, pictures = _from_events(Path(folder))
    return Logs({**_from_table(Path(folder)), **scalars}, pictures)


def has_logs(folder: str | Path) -> bool:
    """Return whether a run has logged to this folder, subfolders excluded."""
    return (Path(folder) / TABLE).is_file() or any(Path(folder).glob(EVENTS))


def _from_table(folder: Path) -> dict[str, pd.Series[float]]:
    if not (folder / TABLE).is_file():
        return {}
    table = pd.read_csv(folder / TABLE)
    if "step" not in table:
        raise ValueError(f"{folder / TABLE}: it has no column step, so it is not a file of CSVLogger.")
    known = {str(name): table[["step", name]].dropna() for name in table if name not in ("step", "epoch")}
    return {name: _series(each["step"], each[name]) for name, each in known.items() if len(each)}


def _from_events(folder: Path) -> Logs:
    if not any(folder.glob(EVENTS)):
        return Logs({}, {})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1}).Reload()
    tags = events.Tags()
    points = {name: events.Scalars(name) for name in tags["scalars"]}
    points.pop("epoch", None)  # Lightning logs it next to all other values
    scalars = {name: _series([p.step for p in of], [p.value for p in of]) for name, of in points.items() if of}
    return Logs(scalars, {name: events.Images(name)[-1].encoded_image_string for name in tags["images"]})


def _series(steps: npt.ArrayLike, values: npt.ArrayLike) -> pd.Series[float]:
    series = pd.Series(np.asarray(values, dtype=np.float64), index=np.asarray(steps, dtype=np.int64))
    return series[~series.index.duplicated(keep="last")].sort_index()
