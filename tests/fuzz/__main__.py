"""Train random recipes in all ways and report where these differ: ``python -m tests.fuzz --seeds 5000``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter

from tests.fuzz.check import Failure, check
from tests.fuzz.known import KNOWN
from tests.fuzz.recipes import Recipe, draw, read, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds (200)")
    parser.add_argument("--start", type=int, default=0, help="the first one (0)")
    parser.add_argument("--recipe", help="check this printed recipe instead")
    parser.add_argument("--known", action="store_true", help="draw also what is known to fail")
    parser.add_argument("--keep", action="store_true", help="print failing recipes as they were drawn")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if given.recipe:
        verdict = check(read(given.recipe))
        print(*(verdict.failures or (verdict.meaningless or "All ways agree.",)), sep="\n")
        return bool(verdict.failures)
    counts: Counter[str] = Counter()
    found: dict[tuple[str, str], int] = {}
    for seed in range(given.start, given.start + given.seeds):
        recipe = draw(seed, () if given.known else KNOWN)
        verdict = check(recipe)
        counts["seeds"] += 1
        counts["vectorized"] += verdict.vectorized
        counts["refused"] += verdict.refused
        counts["meaningless"] += verdict.meaningless is not None
        counts["failed"] += bool(verdict.failures)
        for failure in verdict.failures[:1]:
            small = recipe if given.keep else smallest(recipe, failure)
            key = failure.law, str(small)
            found[key] = found.get(key, 0) + 1
            if found[key] == 1:
                how = next((f for f in check(small, failure.law).failures if f.law == failure.law), failure)
                print(f"\nseed {seed}: {how}\n    python -m tests.fuzz --recipe {str(small)!r}", flush=True)
        if sys.stderr.isatty() or counts["seeds"] % 20 == 0:
            print(dict(counts), file=sys.stderr, flush=True)
    print(f"\n{dict(counts)}, {len(found)} distinct")
    return bool(found)


def smallest(recipe: Recipe, failure: Failure) -> Recipe:
    """The simplest recipe that breaks the same law."""
    return shrink(recipe, lambda other: any(f.law == failure.law for f in check(other, failure.law).failures))


if __name__ == "__main__":
    sys.exit(main())
