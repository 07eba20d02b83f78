"""From results to tables. A report is a dictionary of plain values, the JSON file; markdown is drawn from it.

{"environment": ..., "sections": {"digits": {"title": ..., "rows": [...]}, ...}}
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.contenders import FLOOR, Contender
from benchmarks.contest import Turns
from benchmarks.goals import GOALS, Verdict, ratios, verdict
from benchmarks.referee import Result
from benchmarks.tasks import Prepared

Section = dict[str, Any]
GROSS = 0.1
NOTABLE = 0.3  # seconds


def environment() -> dict[str, Any]:
    """Hardware and versions, nothing that names the machine."""
    packages = ("torch", "lightning", "lightning-fedscale", "numpy")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def processor() -> str:
    """The processor's name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def section_of(prepared: Prepared, contenders: Iterable[Contender], results: Mapping[str, Result]) -> Section:
    """A task's results with everything that was asked of its rows."""
    settings = prepared.task.settings
    return {
        "title": prepared.title,
        "data": prepared.source,
        "settings": settings,
        "test_labels": prepared.test_labels.size,
        "rows": [
            {
                "name": contender.name,
                "label": contender.label,
                "kind": contender.kind,
                "seconds": results[contender.name].medians,
                "turns": results[contender.name].seconds,
                "start_up": results[contender.name].start_up,
                "once": once(results[contender.name], prepared.task.turns),
                "accuracy": results[contender.name].accuracy,
                "utilisation": results[contender.name].utilisation,
                "notes": results[contender.name].notes,
                "not_run": results[contender.name].failure,
                "refused": refusal(contender, results, prepared.test_labels.size),
            }
            for contender in contenders
        ],
    }


def once(result: Result, turns: Turns) -> float | None:
    """Seconds of the warm-up beyond what its rounds take later on: compiling, measuring; median of the repeats."""
    if not result.medians:
        return None
    rounds = turns.warm_up - 1  # the first is part of the start-up
    return statistics.median(
        spent - rounds * later for spent, later in zip(result.warm_up, result.medians, strict=True)
    )


def refusal(contender: Contender, results: Mapping[str, Result], test_labels: int) -> str:
    """Why a contender's time does not count: its model is not as good as the floor's, or better, beyond noise.

    Noise is two standard errors of a share among so many test labels, or two standard deviations of the floor's own
    accuracy over its repeats, each of another seed, whichever is more. Fewer than three repeats cannot tell noise from
    error: then only what is off by more than ``GROSS`` is refused.
    """
    result, floor = results[contender.name], results.get(FLOOR.name)
    if not result.accuracy or contender.kind == "trainer" or contender.name == FLOOR.name:
        return ""
    if floor is None or not floor.accuracy:
        return "there is no floor to compare its accuracy with"
    mine, expected = statistics.mean(result.accuracy), statistics.mean(floor.accuracy)
    error = math.sqrt(expected * (1 - expected) / test_labels)
    allowed = GROSS if len(floor.accuracy) < 3 else 2 * max(error, statistics.stdev(floor.accuracy))
    if abs(mine - expected) <= allowed:
        return ""
    return f"accuracy {mine:.3f} is not the floor's {expected:.3f} ± {allowed:.3f}"


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = ["# Benchmark results", conditions(report["environment"]), "## Goals", goals(report["sections"])]
    for section in report["sections"].values():
        parts += [f"## {section['title']}", draw(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(environment: Mapping[str, Any]) -> str:
    """What it ran on."""
    packages = ("python", "torch", "lightning", "lightning-fedscale", "numpy")
    versions = ", ".join(f"{name} {environment[name]}" for name in packages)
    return (
        f"{environment['processor']}, {environment['cores']} cores, {environment['memory_gib']} GiB memory,"
        f" {environment['system']}. {versions}; peers' versions in their rows."
        " One thread and one core for each process; how it is measured: [README](../README.md)."
    )


def draw(section: Section) -> str:
    """A section's table."""
    if section.get("not_run"):
        return f"Not run: {section['not_run']}."
    if "points" in section:
        return draw_curve(section)
    repeats = max((len(row["seconds"]) for row in section["rows"]), default=0)
    turns = section["settings"]["turns"]
    lines = [
        f"Data: {section['data']}. Medians of {repeats} repeats of {turns['number']} turns of {turns['rounds']} rounds."
        " Ratios are within a repeat; in brackets the least and the most of them."
        f" Load average before: {section['load']}. Sources: {section['source']}."
        + (" **They changed meanwhile: measure again.**" if section["source_changed"] else ""),
        "",
        "| | ms per round | ratio to the loop | accuracy | start-up, s | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    return "\n".join(lines + [draw_row(row, section) for row in section["rows"]])


def draw_curve(section: Section) -> str:
    """A line for each value of what varies, a column for each contender."""
    labels = {row["name"]: row["label"] for point in section["points"] for row in point["rows"]}
    lines = [
        f"Milliseconds per round, median of {section['turns']} turns (ratio to the loop), then start-up.",
        "",
        f"| {section['axis']} | {' | '.join(labels.values())} |",
        f"|---:|{'---:|' * len(labels)}",
    ]
    for point in section["points"]:
        cells = [draw_cell(row, point) for row in point["rows"]]
        lines.append(f"| {point['value']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_cell(row: Mapping[str, Any], point: Section) -> str:
    """A contender at one point of a curve."""
    if row["not_run"] or row["refused"]:
        return "not run" if row["not_run"] else "refused"
    found = ratios(point, row["name"], FLOOR.name) or [math.nan]
    return f"{row['seconds'][0] * 1e3:.2f} ({found[0]:.2f}), {row['start_up'][0]:.1f} s"


def draw_row(row: Mapping[str, Any], section: Section) -> str:
    """A contender's line; times of one that is refused are not shown."""
    if row["not_run"]:
        return f"| {row['label']} | | | | | not run: {row['not_run']} |"
    accuracy, start_up = f"{statistics.mean(row['accuracy']):.3f}", f"{statistics.median(row['start_up']):.1f}"
    if row["refused"]:
        return f"| {row['label']} | | | {accuracy} | | refused: {row['refused']} |"
    seconds = f"{statistics.median(row['seconds']) * 1e3:.2f}"
    found = ratios(section, row["name"], FLOOR.name)
    return f"| {row['label']} | {seconds} | {spread(found)} | {accuracy} | {start_up} | {remarks(row)} |"


def spread(values: list[float] | None) -> str:
    """Median, least and most."""
    if not values:
        return ""
    return f"**{statistics.median(values):.2f}** ({min(values):.2f} to {max(values):.2f})"


def remarks(row: Mapping[str, Any]) -> str:
    """Versions of a peer; what else a contender said."""
    notes = dict(row["notes"])
    if row["kind"] != "peer":
        notes = {name: note for name, note in notes.items() if name not in ("torch", "lightning")}
    if row["once"] > NOTABLE:
        notes["once"] = f"{row['once']:.1f} s"
    if row["utilisation"]:
        notes["GPU busy"] = f"{statistics.median(row['utilisation']):.0%}"
    return ", ".join(f"{name} {note}" for name, note in notes.items())


def goals(sections: Mapping[str, Section]) -> str:
    """The goals and whether they are met."""
    lines = ["| goal | measured | |", "|---|---:|---|"]
    for goal in GOALS:
        found: Verdict = verdict(goal, sections)
        lines.append(f"| {goal.text} | {found.measured} | {found.word} |")
    return "\n".join(lines)
