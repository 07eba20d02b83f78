"""Compressors that choose how much to send: by the phase of training, or by the loss from compression."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from lightning_fedscale.compressors.base import Compressor, Encoded, check_compressor
from lightning_fedscale.compressors.dense import identity
from lightning_fedscale.compressors.sparse import top_k
from lightning_fedscale.types import Params
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call

_State: TypeAlias = dict[str, Any]


class HasPhase(Protocol):
    """An object that knows the phase of training, such as the callback ``CriticalPhase``."""

    @property
    def critical(self) -> bool:
        """Whether training is in a critical phase; the same on every rank."""


@record_call
def phase_driven(phase: HasPhase, critical: Compressor, otherwise: Compressor) -> Compressor:
    """Use one compressor, which should send much, in critical phases, and another one otherwise (as in Accordion).

    It reads ``phase.critical`` for every message. `lightning_fedscale.callbacks.CriticalPhase` can be passed directly:
    its decision is the same on all ranks and saved in checkpoints, so no state is needed here. Clients use the decision
    of the last round. The first 8 bits of a message name its compressor.

    For error feedback wrap the whole, ``error_feedback(phase_driven(...))``, so that each compressor sends the errors
    of the other.

    Args:
        phase: an object with an attribute ``critical``.
        critical: compressor in critical phases.
        otherwise: compressor in all other phases.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if one of the compressors keeps errors.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> phase = SimpleNamespace(critical=True)
        >>> rule = phase_driven(phase, critical=top_k(k=2), otherwise=top_k(k=1))
        >>> delta = {"w": torch.arange(1.0, 9.0, dtype=torch.float64)}
        >>> for phase.critical in (True, False):
        ...     encoded, _ = rule.encode(delta, rule.init(delta), np.random.default_rng(0))
        ...     print(encoded.bits, encoded.seen["w"].count_nonzero().item())
        78 2
        43 1
    """
    if not hasattr(phase, "critical"):
        raise TypeError(
            f"phase={phase!r}: pass an object with the attribute critical, such as a CriticalPhase callback."
        )
    rules = check_compressor("critical", critical), check_compressor("otherwise", otherwise)
    for rule in rules:
        if rule.keeps_error:
            raise ValueError(
                f"phase_driven({rule.name}): its errors would not be sent while the other compressor is in use: apply"
                " error_feedback last, error_feedback(phase_driven(...))."
            )
    return Compressor(
        f"phase_driven(critical={critical.name}, otherwise={otherwise.name})",
        partial(_init_both, rules=rules),
        partial(_encode_by_phase, phase=phase, rules=rules),
        partial(_decode_either, rules=rules),
        stateful=any(rule.stateful for rule in rules),
        unbiased=all(rule.unbiased for rule in rules),
        contractive=all(rule.contractive for rule in rules),
        operations=max(rule.operations for rule in rules),
    )


_Rules: TypeAlias = tuple[Compressor, Compressor]


def _init_both(params: Params, *, rules: _Rules) -> list[Any] | None:
    return [rule.init(params) for rule in rules] if any(rule.stateful for rule in rules) else None


def _encode_by_phase(
    delta: Params, state: list[Any] | None, generator: np.random.Generator, *, phase: HasPhase, rules: _Rules
) -> tuple[Encoded, list[Any] | None]:
    which = 0 if phase.critical else 1
    encoded, after = rules[which].encode(delta, state and state[which], generator)
    if state is not None:
        state = [after if i == which else other for i, other in enumerate(state)]
    return _headed(bytes([which]), encoded), state


def _decode_either(payload: bytes, like: Params, *, rules: _Rules) -> Params:
    return rules[payload[0]].decode(payload[1:], like)


@record_call
def adaptive(
    compress: Callable[[float], Compressor] | None = None,
    threshold: float = 0.7,
    lowest: float = 10.0,
    highest: float = 1000.0,
    growth: float = 2.0,
    window: int = 10,
    tolerance: float = 0.01,
    smoothing: float = 0.16,
) -> Compressor:
    r"""Compress as much as the gain allows: the rule of GraVAC (arXiv 2305.12201).

    The gain of a compression is the part of the squared norm that it sends, :math:`E|C(u)|^2 / E|u|^2`, both averaged
    with exponential weights within the window. Every update is compressed by a lower and a higher factor: the higher
    one is used if its gain reaches the threshold, else the lower one if its gain does, else nothing is compressed. At
    the end of every window the higher factor replaces the lower one if their gains differ by at most the tolerance.
    Then the higher factor grows; if its gain was below the threshold, it grows from the lower one instead (the paper
    always lets it grow).

    Wrap it in `error_feedback`, as in the paper: u is then the sum of update and residual, and an uncompressed update
    clears the residual. A message has 32 bits more than that of the chosen compressor, for the factor.

    Args:
        compress: returns a compressor without state for a factor, one that sends this many times less. None is
            ``top_k(ratio=1 / factor)``.
        threshold: least gain, in (0, 1]; the paper has 0.7 and 0.9.
        lowest: initial lower factor; the paper's factors are 10 to 1000.
        highest: largest factor.
        growth: multiplier of the higher factor.
        window: messages of a sender in a window. The paper has 500 training steps; here a message is a round.
        tolerance: relative difference below which gains count as equal; the paper has 0.01.
        smoothing: weight of the newest update in the averages, in (0, 1]; the paper has a hundredth of the number of
            workers.

    Raises:
        TypeError, ValueError: if an argument is invalid.

    Example:
        >>> import torch
        >>> rule = adaptive(lambda factor: top_k(ratio=1 / factor), lowest=2, highest=4)
        >>> state = rule.init({"w": torch.zeros(4)})
        >>> for values in ([9.0, 0.1, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0]):
        ...     delta = {"w": torch.tensor(values, dtype=torch.float64)}
        ...     encoded, _ = rule.encode(delta, state, np.random.default_rng(0))
        ...     print(encoded.seen["w"].count_nonzero().item())
        1
        4
    """
    compress = _top_k_by_factor if compress is None else compress
    if not callable(compress):
        raise TypeError(f"compress={compress!r}: pass a function such as lambda factor: top_k(ratio=1 / factor).")
    bounds = "pass a compression factor above 1, at most highest."
    most = checks.number("highest", highest, bounds, lambda factor: factor > 1)
    rule = _Rule(
        compress,
        checks.number(
            "threshold", threshold, "pass the least share of the squared norm to send, in (0, 1].", _is_share
        ),
        checks.number("lowest", lowest, bounds, lambda factor: 1 < factor <= most),
        most,
        checks.number("growth", growth, "pass a number above 1.", lambda factor: factor > 1),
        checks.integer("window", window),
        checks.number("tolerance", tolerance, "pass a number in (0, 1].", _is_share),
        checks.number("smoothing", smoothing, "pass a number in (0, 1].", _is_share),
    )
    first = check_compressor("compress(lowest)", compress(rule.lowest))
    if first.stateful:
        raise ValueError(f"compress: it returned {first.name}, which has a state: return one without, such as top_k.")
    return Compressor(
        f"adaptive({first.name}, threshold={rule.threshold:g})",
        partial(_init_factors, rule=rule),
        partial(_encode_by_gain, rule=rule),
        partial(_decode_by_factor, rule=rule),
        stateful=True,
        contractive=first.contractive,
        operations=2 * first.operations + 6,  # two compressions, and three squared norms to choose between them
    )


def _top_k_by_factor(factor: float) -> Compressor:
    return top_k(ratio=1 / factor)


class _Rule(NamedTuple):
    compress: Callable[[float], Compressor]
    threshold: float
    lowest: float
    highest: float
    growth: float
    window: int
    tolerance: float
    smoothing: float

    def above(self, factor: float) -> float:
        """Return the next factor, rounded to float32 since it is sent as such."""
        return float(np.float32(min(factor * self.growth, self.highest)))


def _init_factors(params: Params, *, rule: _Rule) -> _State:
    low = float(np.float32(rule.lowest))
    return {"low": low, "high": rule.above(low), "seen": 0, "squares": [0.0, 0.0, 0.0]}


def _encode_by_gain(
    delta: Params, state: _State, generator: np.random.Generator, *, rule: _Rule
) -> tuple[Encoded, _State]:
    tried = [rule.compress(state[factor]).encode(delta, None, generator)[0] for factor in ("low", "high")]
    squares = [_square(delta), *(_square(encoded.seen) for encoded in tried)]
    # Division by the sum of weights is not needed, since it is the same for all three.
    squares = [(1 - rule.smoothing) * old + new for old, new in zip(state["squares"], squares, strict=True)]
    gains = [square / squares[0] if squares[0] else 1.0 for square in squares[1:]]
    if gains[1] >= rule.threshold:
        factor, encoded = state["high"], tried[1]
    elif gains[0] >= rule.threshold:
        factor, encoded = state["low"], tried[0]
    else:
        factor, encoded = 1.0, identity().encode(delta, None, generator)[0]
    state = {**state, "seen": state["seen"] + 1, "squares": squares}
    if state["seen"] == rule.window:
        state = _next_window(state["low"], state["high"], gains, rule)
    return _headed(np.array([factor], "<f4").tobytes(), encoded), state


def _next_window(low: float, high: float, gains: list[float], rule: _Rule) -> _State:
    if math.isclose(gains[0], gains[1], rel_tol=rule.tolerance):
        low = high
    high = rule.above(high if gains[1] >= rule.threshold else low)
    return {"low": low, "high": high, "seen": 0, "squares": [0.0, 0.0, 0.0]}


def _decode_by_factor(payload: bytes, like: Params, *, rule: _Rule) -> Params:
    factor = float(np.frombuffer(payload[:4], "<f4")[0])
    return (identity() if factor == 1 else rule.compress(factor)).decode(payload[4:], like)


def _square(params: Params) -> float:
    return math.fsum(float(tensor.square().sum()) for tensor in params.values())


def _headed(head: bytes, encoded: Encoded) -> Encoded:
    return encoded._replace(bits=8 * len(head) + encoded.bits, payload=partial(_join, head, encoded.payload))


def _join(head: bytes, payload: Callable[[], bytes]) -> bytes:
    return head + payload()


def _is_share(number: float) -> bool:
    return 0 < number <= 1
