"""Results of `fedscale size` on runs like this one; measurements take precedence over the predictions of any law."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_fedscale.strategy import FederatedStrategy

STUDY_FILE = "size.json"
"""The file that ``fedscale size`` writes; it is looked up in the working directory of the training."""

_SAME_FLOPS, _SAME_PARAMS = 1.25, 0.02
"""Two runs have the same compute within this factor, and the same size within this fraction of the parameters."""


_PARTS = {"study", "results", "best", "flops", "argument"}
_FACTS = {"fingerprint", "partition", "clients", "cohort", "methods"}


class Measured(NamedTuple):
    """The result of a study for a run.

    Attributes:
        best: the study's best result, as in its file.
        here: its best result for this run's size and method; None if it has none.
        said: the result in one sentence.
    """

    best: Mapping[str, Any]
    here: Mapping[str, Any] | None
    said: str


def study_of(given: str | Path | None) -> dict[str, Any] | None:
    """Read the results of a study.

    Args:
        given: "auto" for the study in this folder, if there is one; a file; or None for none.

    Raises:
        ValueError: for a file that is missing, or is not a study.
        TypeError: for another kind of argument.
    """
    if given is None:
        return None
    if not isinstance(given, (str, Path)):
        raise TypeError(f"study={given!r}: pass 'auto', the {STUDY_FILE} of fedscale size, or None.")
    is_auto = given == "auto"
    try:
        found = json.loads(Path(STUDY_FILE if is_auto else given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if is_auto:
            return None
        raise ValueError(
            f"study={str(given)!r}: it cannot be read ({error}): pass the {STUDY_FILE} of fedscale size, or None."
        ) from None
    made_for = found.get("study") if isinstance(found, dict) else None
    if isinstance(made_for, dict) and _PARTS.issubset(found) and _FACTS.issubset(made_for):
        return dict(found)
    if is_auto:
        return None  # a file of the project that happens to have this name
    raise ValueError(f"study={str(given)!r}: it is no result of fedscale size: pass its {STUDY_FILE}, or None.")


def measured_of(study: Mapping[str, Any], trainer: pl.Trainer, params: float, flops: float) -> Measured | str:
    """Return a study's result for a run, or the reason why it has none.

    Args:
        study: the study, from `study_of`.
        trainer: Trainer of the run.
        params: active parameters of the run's model.
        flops: FLOPs of all clients together.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, FederatedStrategy) or strategy.partition is None:
        return "it was made for clients, and this run has none"
    made_for = study["study"]
    if made_for["fingerprint"] != strategy.partition.fingerprint:
        return f"it was made for another partition ({made_for['partition']}, {made_for['clients']:,} clients)"
    if made_for["cohort"] != strategy.cohort_size:
        return f"it was made for {made_for['cohort']:,} clients per round, and this run has {strategy.cohort_size:,}"
    if not 1 / _SAME_FLOPS <= flops / study["flops"] <= _SAME_FLOPS:
        return f"it was made for {study['flops']:.3g} FLOPs, and this run takes {flops:.3g}"
    if not any(_is_size(each, params) for each in study["results"]):
        return f"it tried no size of about {params:,.0f} parameters"
    method = next((name for name, rules in made_for["methods"].items() if rules == strategy.method), None)
    if method is None:
        return "it did not try this run's method"
    own = [each for each in study["results"] if _is_size(each, params) and each["method"] == method]
    here = min(own, key=lambda each: float(each["behind"]), default=None)
    return Measured(study["best"], here, _sentence(study, here, method))


def measured_for(given: str | Path | None, trainer: pl.Trainer, params: float, flops: float) -> Measured | None:
    """Return the result of a study for a run; log the reason if the study has none."""
    try:
        study = study_of(given)
        if study is None:
            return None
        found = measured_of(study, trainer, params, flops)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:  # edited or deleted during the run
        found = f"it cannot be read ({error!r})"
    if isinstance(found, Measured):
        return found
    rank_zero_info(f"ComputeAccounting: the study of fedscale size does not apply to this run: {found}.")
    return None


def _is_size(result: Mapping[str, Any], params: float) -> bool:
    return abs(float(result["params"]) - params) <= _SAME_PARAMS * params


def _sentence(study: Mapping[str, Any], here: Mapping[str, Any] | None, method: str) -> str:
    best, name = study["best"], study["argument"]
    found = (
        f"fedscale size measured on these clients, with {study['flops']:.3g} FLOPs: {name} {best['size']}"
        f" ({best['params']:,.0f} parameters) with {best['method']} is best, loss {_loss(best)}"
    )
    if here is None:
        return f"{found}; this size with {method} did not reach the study's final"
    this = f"this size ({name} {here['size']}) with {method}"
    if _of(here) == _of(best):
        return f"{found}, which is this size and method"
    at = ", at the best batch, local steps and learning rate that it tried"
    if here["even"]:
        return f"{found}; {this} is not significantly worse{at}"
    more = f"{here['behind']:.3g} ({here['behind_low']:.3g} to {here['behind_high']:.3g})"
    return f"{found}; the loss of {this} is higher by {more}{at}"


def _of(result: Mapping[str, Any]) -> tuple[Any, Any]:
    return result["size"], result["method"]


def _loss(result: Mapping[str, Any]) -> str:
    low, high = result["low"], result["high"]
    is_known = low is not None and high is not None and math.isfinite(low + high)
    return f"{result['loss']:.4g}" + (f" ({low:.4g} to {high:.4g})" if is_known else "")
