"""The aggregators by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from lightning_fedscale.aggregators.base import Aggregator
from lightning_fedscale.aggregators.centered_clipping import centered_clipping
from lightning_fedscale.aggregators.coordinates import median, trimmed_mean
from lightning_fedscale.aggregators.geometric_median import geometric_median
from lightning_fedscale.aggregators.krum import krum, multi_krum
from lightning_fedscale.aggregators.mean import mean
from lightning_fedscale.aggregators.norm_clipped import norm_clipped
from lightning_fedscale.utils import checks

FACTORIES: dict[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "norm_clipped": norm_clipped,
    "centered_clipping": centered_clipping,
}
"""The factories of this package's aggregators by name; contract tests read it."""

_BY_NAME = {**FACTORIES, "uniform": lambda: mean("uniform")}


def by_name(name: str) -> Aggregator:
    """Return the aggregator of this name, which must not need arguments.

    Raises:
        ValueError: if the name is unknown (the message has the closest match), or its rule needs arguments.

    Example:
        >>> by_name("unifrom")
        Traceback (most recent call last):
        ...
        ValueError: aggregator='unifrom' is not known. Did you mean 'uniform'? Known: 'mean', 'median', ...
    """
    rule: Aggregator = checks.named("aggregator", name, _BY_NAME)()
    return rule


def aggregator_of(value: object) -> Aggregator:
    """Return the aggregator for the argument ``aggregator=``: an aggregator, or the name of one without arguments.

    Raises:
        TypeError: for anything else, such as a rule of this room that was not called, or one whose ``finish`` takes
            other arguments.
        ValueError: for a name that is unknown or not enough.

    Example:
        >>> aggregator_of(median)
        Traceback (most recent call last):
        ...
        TypeError: aggregator=median is a function: call it, aggregators.median().
    """
    if isinstance(value, str):
        return by_name(value)
    checks.called("aggregator", value, "aggregators", FACTORIES)
    if not isinstance(value, Aggregator):
        names = ", ".join(repr(name) for name, make in _BY_NAME.items() if not checks.needed(make))
        raise TypeError(f"aggregator={value!r}: pass one of {names}, or an Aggregator such as aggregators.krum(1).")
    takes = ("total", "cohort") if value.init_state is None else ("total", "cohort", "state")
    try:
        inspect.signature(value.finish).bind(*takes)
    except TypeError as error:
        raise TypeError(
            f"aggregator: finish has other arguments ({error}): pass a function of ({', '.join(takes)})"
            f"{', or pass init_state=... as well to keep a state' if value.init_state is None else ''}."
        ) from None
    return value
