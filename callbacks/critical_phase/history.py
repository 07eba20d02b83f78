"""The record of `CriticalPhase` for its figure, and the layout of its charts in TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ROWS = 4000
_SMALL = 0.01
"""The statistic is drawn on a linear scale below this value."""

LAYOUT = {
    "CriticalPhase": {
        "critical phase and scale": ["Multiline", [r"phase/critical(/\d+)?$", "phase/scale$"]],
        "statistic and threshold": ["Multiline", ["phase/relative_change", "phase/cumulative_sum", "phase/threshold"]],
        "gradient norm": ["Multiline", ["phase/grad_norm"]],
        # No margin chart: without enough evidence one of the three values is missing, and it would show nothing.
        "noise scale": ["Multiline", ["phase/noise_scale"]],
        "critical batch and cohort": ["Multiline", ["phase/critical_batch", "phase/critical_cohort"]],
    }
}
"""Layout for ``SummaryWriter.add_custom_scalars``."""


class PhaseRecord:
    """The history of norm, statistic and phase, in bounded memory: when full, every second row is dropped.

    Attributes:
        rows: step, gradient norm, statistic, threshold and scale.
        spans: first and last step of every critical phase; none is dropped.
    """

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        self.spans: list[list[int]] = []
        self._stride = 1
        self._seen = self._critical = 0
        self._open = False  # whether the last observation was critical

    def add(self, at: int, norm: float, statistic: float, threshold: float, scale: float, critical: bool) -> None:
        """Add a judged observation."""
        if self._seen % self._stride == 0:
            self.rows.append([float(at), norm, statistic, threshold, scale])
            if len(self.rows) >= _MOST_ROWS:
                self.rows, self._stride = self.rows[::2], 2 * self._stride
        self._seen += 1
        if not critical:
            self._open = False
            return
        self._critical += 1
        if self._open:
            self.spans[-1][1] = at
        else:
            self.spans.append([at, at])
        self._open = True

    def summary(self, unit: str) -> str:
        """Return the number of critical observations, in words."""
        if not self._seen:
            return f"no {unit} was observed"
        last = f", the last one {self.spans[-1][1]}" if self.spans else ""
        return f"{self._critical:,} of {self._seen:,} observed {unit}s were critical{last}"

    def plot(self, unit: str, statistic: str) -> Figure:
        """Plot the norm above, statistic and threshold below, with critical spans shaded."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import SymmetricalLogLocator

        figure = Figure(figsize=(8, 5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        columns = list(zip(*self.rows, strict=True)) or [()] * 5
        upper.plot(columns[0], columns[1], color="tab:blue", linewidth=1)
        upper.set_ylabel("gradient norm")
        if any(value > 0 for value in columns[1]):
            upper.set_yscale("log")
        lower.plot(columns[0], columns[2], color="tab:orange", linewidth=1, label=statistic.replace("_", " "))
        lower.plot(columns[0], columns[3], color="black", linestyle="--", linewidth=1, label="threshold")
        if any(value > 0 for value in columns[2]):
            lower.set_yscale("symlog", linthresh=_SMALL)
            lower.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=_SMALL, subs=[1, 2, 5]))
            lower.yaxis.set_major_formatter("{x:g}")
        lower.set_xlabel(unit)
        for first, last in self.spans:
            for axes in (upper, lower):
                axes.axvspan(first - 0.5, last + 0.5, color="tab:red", alpha=0.15, linewidth=0)
        lower.plot([], [], color="tab:red", alpha=0.3, linewidth=8, label="critical")
        lower.legend(loc="upper right", fontsize="small")
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {**vars(self), "rows": [*self.rows], "spans": [[*span] for span in self.spans]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        vars(self).update({**state, "rows": [*state["rows"]], "spans": [[*span] for span in state["spans"]]})
