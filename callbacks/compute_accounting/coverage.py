"""Which operators of the counted steps have known FLOPs, and the messages for those that have none."""

from __future__ import annotations

import math

from lightning.pytorch.utilities import rank_zero_warn

from lightning_fedscale.devices.profiling.operator_counter import UNKNOWN, Operator, OperatorCounter

_UNCOUNTED = 0.01
"""Fraction of time in operators of unknown cost above which a warning is given."""


class OperatorCoverage:
    """The operators of all counted steps.

    Attributes:
        operators: by name, with their calls and FLOPs.
    """

    def __init__(self) -> None:
        self.operators: dict[str, Operator] = {}
        self._uncounted = math.nan

    @property
    def unknown(self) -> list[str]:
        """Names of the operators whose FLOPs are not known."""
        return [name for name, operator in self.operators.items() if operator.kind == UNKNOWN]

    @property
    def uncounted(self) -> float:
        """Largest fraction of a step's time in operators whose FLOPs are unknown; NaN if not measured."""
        return self._uncounted if self.unknown else 0.0

    def add(self, counter: OperatorCounter) -> None:
        """Add the operators of a counted step."""
        for name, operator in counter.operators.items():
            seen = self.operators.setdefault(name, Operator(operator.kind))
            seen.calls, seen.flops = seen.calls + operator.calls, seen.flops + operator.flops
        if counter.timed and any(operator.kind == UNKNOWN for operator in counter.operators.values()):
            share = counter.uncounted_share()
            self._uncounted = share if math.isnan(self._uncounted) else max(self._uncounted, share)

    def warn_if_incomplete(self) -> None:
        """Warn if operators of unknown FLOPs take a noticeable part of the time."""
        share = self.uncounted
        if math.isnan(share) or share > _UNCOUNTED:
            part = "an unknown part" if math.isnan(share) else f"{share:.0%}"
            rank_zero_warn(
                "ComputeAccounting: the FLOPs are underestimated, since operators of unknown cost"
                f" ({', '.join(self.unknown)}) take {part} of the time."
            )

    def why_nothing(self, module: object) -> str:
        """Return why no FLOPs were counted, in words."""
        unknown = ", ".join(self.unknown)
        found = f"only operators of unknown cost ({unknown})" if unknown else "no matrix multiplication"
        return f"the steps of {type(module).__name__} contain {found}"

    def table(self) -> str:
        """Return all operators as a table in Markdown."""
        rows = sorted(self.operators.items(), key=lambda item: (item[1].kind, -item[1].flops, item[0]))
        lines = [f"| {name} | {seen.kind} | {seen.calls:,} | {seen.flops:.3g} |" for name, seen in rows]
        return "\n".join(["| operator | FLOPs are | calls | FLOPs |", "|---|---|---:|---:|", *lines])
