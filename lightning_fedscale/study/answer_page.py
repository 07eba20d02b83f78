"""The result of a study in words, as a page and as a figure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fedscale.study.answer import AXES, Answer, Result
from lightning_fedscale.utils.memory import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, FIGURE, NUMBERS = "size.md", "size.png", "size.json"

_ASSUMED = (
    "Intervals are 95 % intervals over seeds (initial weights, order of the data, cohorts). They assume the same"
    " variance for all settings, and do not cover other validation data or another partition."
)
_MOST_ROWS = 12


def sentences(answer: Answer) -> list[str]:
    """Describe the result, one sentence per line."""
    best, name = answer.best, answer.argument
    least, most = _ends(answer.even("size"))
    said = [
        f"Best setting: {name} {best.setting.size} ({best.params:,.0f} parameters), method {best.setting.method}, batch"
        f" size {best.setting.batch_size}, {best.setting.local_steps} local steps, {best.setting.rate:g} times the"
        f" module's learning rate. Its loss is {_loss(best)}."
    ]
    if least != most:
        said.append(f"With {best.seeds} seeds, {name} {least} to {most} do not differ significantly from it.")
    open_ = {each: answer.even(each) for each in AXES[1:]}
    if undecided := [f"{_WORDS[each]} {_listed(values)}" for each, values in open_.items() if len(values) > 1]:
        said.append(f"The results do not decide between {'; '.join(undecided)}.")
    for each in answer.current:
        if each.setting.size == best.setting.size:
            continue
        said.append(
            f"The current {name}, {each.setting.size}, with {each.setting.method} differs in loss by {each.behind:+.3g}"
            f" ({each.behind_low:+.3g} to {each.behind_high:+.3g}), at the best batch size, local steps and learning"
            " rate that were tried for it."
        )
    said.append(
        f"The best setting trains for {best.rounds:,.0f} rounds, which are {best.passes:,.1f} passes over the data"
        f" ({best.most_passes:,.0f} for the client with the fewest samples). Each client sends and receives"
        f" {format_bytes(best.bytes)} in all."
        + ("" if math.isnan(best.worst) else f" The worst client has a loss of {best.worst:.4g} on its training data.")
    )
    said.append(f"Train with: {answer.strategy}")
    return [*said, *(f"Note: {note}." for note in answer.notes)]


def rows_of(answer: Answer) -> list[dict[str, str]]:
    """Return the table's rows: the best settings at the full budget, and the current ones."""
    shown = list(answer.results[:_MOST_ROWS])
    shown += [each for each in answer.current if each not in shown]
    return [
        {
            answer.argument: str(each.setting.size),
            "Method": each.setting.method,
            "Batch": str(each.setting.batch_size),
            "Local steps": str(each.setting.local_steps),
            "Rate": f"{each.setting.rate:g}",
            "Loss": _loss(each),
            "Above the best": "" if each is answer.best else f"{each.behind:.3g}",
            "Seeds": str(each.seeds),
            "As good": "yes" if each.is_even else "",
        }
        for each in shown
    ]


def page(answer: Answer) -> str:
    """Write the page in Markdown, with a link to the figure."""
    table = rows_of(answer)
    return "\n".join([
        f"# The best size for {answer.clients:,} clients and {answer.flops:.3g} FLOPs", "",
        *(f"- {line}" for line in sentences(answer)), "",
        f"![Loss over {answer.argument}]({FIGURE})", "",
        "| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0]),
        *("| " + " | ".join(row.values()) + " |" for row in table), "",
        f"{len(answer.results)} settings trained with the whole budget. The study took {answer.runs} runs, which"
        f" would last {answer.minutes:.1f} minutes in sequence, and {answer.study_flops:.3g} FLOPs. {_ASSUMED}", "",
    ])  # fmt: skip


def figure(answer: Answer) -> Figure:
    """Plot the loss at the full budget over the size, for the best setting of each method."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4), layout="constrained")
    axes = drawn.subplots()
    for method in dict.fromkeys(each.setting.method for each in answer.results):
        own: dict[int, Result] = {}
        for each in answer.results:
            if each.setting.method == method:
                own.setdefault(each.setting.size, each)
        line = [own[size] for size in sorted(own)]
        spread = [0.0 if math.isnan(each.high) else each.high - each.loss for each in line]
        axes.errorbar(sorted(own), [each.loss for each in line], spread, marker="o", ms=4, capsize=3, label=method)
    axes.set(xscale="log", xlabel=answer.argument, ylabel="validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return drawn


def write(answer: Answer, folder: str | Path) -> Path:
    """Write the page, the figure and the numbers to a folder.

    Returns:
        the page's path.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    figure(answer).savefig(place / FIGURE, dpi=150)
    (place / NUMBERS).write_text(json.dumps(answer.as_dict(), indent=1), encoding="utf-8")
    (place / PAGE).write_text(page(answer), encoding="utf-8")
    return place / PAGE


_WORDS = {"method": "method", "batch_size": "batch size", "local_steps": "local steps", "rate": "learning rate"}


def _loss(result: Result) -> str:
    ends = "" if math.isnan(result.low) else f" ({result.low:.4g} to {result.high:.4g})"
    return f"{result.loss:.4g}{ends}"


def _ends(values: list[Any]) -> tuple[Any, Any]:
    return values[0], values[-1]


def _listed(values: list[Any]) -> str:
    words = [each if isinstance(each, str) else f"{each:g}" for each in values]
    return f"{', '.join(words[:-1])} or {words[-1]}"
