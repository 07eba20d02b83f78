"""The command line: ``python -m benchmarks``, or ``make bench``."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import report, tasks
from benchmarks.contenders import BY_NAME, CONTENDERS, FLOOR, Contender
from benchmarks.curves import CONTENDERS as CURVE_CONTENDERS
from benchmarks.curves import CURVES, TURNS, Curve
from benchmarks.referee import CACHE, ROOT, compete, profile

RESULTS = Path(__file__).resolve().parent / "results"
SECTIONS = [*tasks.RECIPES, *CURVES]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; tasks and contenders as lists of names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Round times, as tables.")

    def names(known: Any) -> Any:
        def split(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in known]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
            return text.split(",")

        return split

    parser.add_argument("--tasks", type=names(SECTIONS), help="only these, such as digits,cnn: " + ", ".join(SECTIONS))
    parser.add_argument("--contenders", type=names(BY_NAME), help="only these: " + ", ".join(BY_NAME))
    parser.add_argument("--repeats", type=int, help="5; with --fast 1")
    parser.add_argument("--fast", action="store_true", help="two turns a repeat, to see that it runs")
    parser.add_argument("--output", type=Path, help="folder for the report: benchmarks/results for all tasks and"
                        " contenders, .bench/partial otherwise")  # fmt: skip
    parser.add_argument("--update", action="store_true", help="keep what the report there says about other tasks")
    parser.add_argument("--profile", action="store_true", help="no report: list where the contenders' time goes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the report anew after every task."""
    options = parse(arguments)
    partial = options.tasks or options.contenders or options.fast
    folder: Path = options.output or (CACHE / "partial" if partial else RESULTS)
    repeats = options.repeats or (1 if options.fast else 5)
    whole: dict[str, Any] = {"environment": report.environment(), "sections": {}}
    if options.update and (folder / "benchmarks.json").exists():
        whole["sections"] = json.loads((folder / "benchmarks.json").read_text())["sections"]
    if options.profile:
        profile_all(options)
        return
    for name in options.tasks or SECTIONS:
        whole["sections"][name] = section = measure(name, options, repeats)
        write(folder, whole)
        print(f"\n## {section['title']}\n\n{report.draw(section)}\n")
    print(f"{report.goals(whole['sections'])}\n")
    tell(f"Written to {os.path.relpath(folder)}")


def profile_all(options: argparse.Namespace) -> None:
    """A profile of every contender on every task; see `benchmarks.referee.profile`."""
    for name in options.tasks or ["digits"]:
        prepared = tasks.prepare(name, tasks.RECIPES[name], options.fast)
        for contender in chosen(name, options.contenders):
            tell(f"Written to {os.path.relpath(profile(prepared, contender))}")


def tell(text: str) -> None:
    """How far it is; the report itself goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def measure(name: str, options: argparse.Namespace, repeats: int) -> report.Section:
    """One section of the report."""
    if name in CURVES:
        return measure_curve(name, CURVES[name], options)
    return measure_task(name, tasks.RECIPES[name], options.fast, chosen(name, options.contenders), repeats)


def measure_task(
    name: str, recipe: tasks.Recipe, fast: bool, contenders: list[Contender], repeats: int
) -> report.Section:
    """All contenders on a task."""
    try:
        prepared = tasks.prepare(name, recipe, fast)
    except tasks.Unavailable as missing:
        return {"title": recipe.title, "not_run": str(missing)}
    load, source = os.getloadavg()[0], fingerprint()
    section = report.section_of(prepared, contenders, compete(prepared, contenders, repeats, tell))
    return {**section, "load": round(load, 2), "source": source, "source_changed": fingerprint() != source}


def fingerprint() -> str:
    """Of the package's sources, so that a table says what it measured."""
    package = ROOT / "lightning_fedscale"
    sources = sorted([*package.rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def measure_curve(name: str, curve: Curve, options: argparse.Namespace) -> report.Section:
    """All points of a curve, each once: its turns are the repeats."""
    values = curve.values[:2] if options.fast else curve.values
    contenders = chosen(name, options.contenders)
    points = [
        {"value": value, **measure_task(f"{name}-{value}", curve.recipe(value), options.fast, contenders, repeats=1)}
        for value in values
    ]
    return {"title": curve.title, "axis": curve.axis, "turns": 2 if options.fast else TURNS, "points": points}


def chosen(task: str, asked: list[str] | None) -> list[Contender]:
    """Who takes part: those that were asked, or those that belong to the task; always the floor."""
    if asked is None and task in CURVES:
        asked = list(CURVE_CONTENDERS)
    if asked is None:
        return [contender for contender in CONTENDERS if not contender.tasks or task in contender.tasks]
    return [contender for contender in CONTENDERS if contender.name in {FLOOR.name, *asked}]


def write(folder: Path, whole: dict[str, Any]) -> None:
    """Both forms of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "benchmarks.md").write_text(report.markdown(whole))
