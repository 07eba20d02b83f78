"""Recipes that failed once, as simple as they can be; each with what was wrong."""

from __future__ import annotations

from tests.fuzz.recipes import Recipe

REGRESSIONS: dict[str, Recipe] = {
    "weights of a checkpoint in double precision were rounded on resume": Recipe(),
}
