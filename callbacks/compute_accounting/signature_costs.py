"""The costs of steps by signature: which steps to count, and what the others cost."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning_fedscale.devices.profiling.batches import BatchSignature, signature_of

_FIRST_STEPS = 8  # first steps of every signature, which are all counted
MAX_FIRST_STEPS = 64  # the same if costs vary
_IN_OCTAVE = 32  # if costs vary, about this many of steps 64 to 127, 128 to 255 and so on; else one of each octave
_RECENT = 128  # latest counted steps, from which the others are estimated
_SIGNATURES = 64  # with more signatures, batches of new shapes are estimated by their size
_NOTHING = signature_of(())


class SignatureCosts:
    """The costs of the steps of one signature: those that were counted, and their mean.

    Attributes:
        steps: number of steps.
        counted: number of steps that were counted.
        varies: whether the costs of the counted steps differ.
        mean: mean forward, backward, optimizer and tokens of the latest counted steps.
        largest: largest optimizer cost of these.
        error: standard error of the mean of forward and backward, or the recent change of this mean.
    """

    def __init__(self) -> None:
        self.steps = self.counted = 0
        self.varies = False
        self.mean = (0.0, 0.0, 0.0, 0.0)
        self.largest = self.error = 0.0
        self._recent: deque[tuple[float, ...]] = deque(maxlen=_RECENT)

    def add(self, *values: float) -> None:
        """Add a counted step."""
        self.counted += 1
        forward, backward, _, tokens = values  # an optimizer's first step may cost something else
        if self._recent and (forward, backward, tokens) != self._recent[-1][:2] + self._recent[-1][3:]:
            self.varies = True
        self._recent.append(values)
        self._sum_up()

    def is_due(self) -> bool:
        """Return whether to count the next step; steps are drawn at random, so that periodic costs cause no bias.

        The draw depends only on the number of the step, so that a resumed run counts the same steps.
        """
        number = self.steps
        if number < (MAX_FIRST_STEPS if self.varies else _FIRST_STEPS):
            return True
        octave = 1 << (number.bit_length() - 1)  # from this number to its double
        if self.varies:
            return _scrambled(number) % octave < _IN_OCTAVE
        return number == octave + _scrambled(octave) % octave

    def state(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        recent = list(map(list, self._recent if self.varies else list(self._recent)[-1:]))
        return {"steps": self.steps, "counted": self.counted, "varies": self.varies, "recent": recent}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.steps, self.counted, self.varies = state["steps"], state["counted"], state["varies"]
        self._recent.extend(map(tuple, state["recent"]))
        self._sum_up()

    def _sum_up(self) -> None:
        if not (latest := list(self._recent)):
            return
        if self.varies and len(latest) > 1:
            flops = [forward + backward for forward, backward, *_ in latest]
            spread, newest = statistics.stdev(flops), max(1, len(flops) // 4)
            drift = statistics.fmean(flops[-newest:]) - statistics.fmean(flops)
            self.error = spread / math.sqrt(len(flops))
            if abs(drift) > 3.0 * spread / math.sqrt(newest):  # costs drift: use only the newest quarter
                latest, self.error = latest[-newest:], abs(drift)
        forward, backward, optimizer, tokens = (math.fsum(column) / len(latest) for column in zip(*latest, strict=True))
        self.mean = forward, backward, optimizer, tokens
        self.largest = max(values[2] for values in latest)


class CostTable:
    """The costs of all steps, by signature.

    A signature consists of the name of the step, the batch signature and the flags of the trainable parameters. With
    many batch signatures, all batches of new shapes share one entry, whose costs are those of one element.
    """

    def __init__(self) -> None:
        self._known: dict[Any, SignatureCosts] = {}
        self._signatures: dict[str, int] = {}
        self._restored: dict[str, Any] = {}

    def of(
        self, name: str, signature: BatchSignature, flags: tuple[bool, ...], samples: int | None = None
    ) -> tuple[SignatureCosts, float]:
        """Return the costs of a signature, and the factor to multiply them by."""
        exact = signature
        if signature.first is None and samples is not None:
            exact = BatchSignature(signature.spec, (*signature.leaves, samples))  # the only known size of the batch
        key = name, exact, flags
        if (known := self._known.get(key)) is not None:
            return known, 1.0
        number, scale = self._signatures.get(name, 0), 1.0
        if number >= _SIGNATURES:
            key = f"{name} of any size", signature.without_sizes(), flags
            scale = float(signature.elements or samples or 1)
        if (known := self._known.get(key)) is None:
            known = self._known[key] = SignatureCosts()
            self._signatures[name] = number + 1
            if self._restored and (state := self._restored.pop(_digest(key), None)) is not None:
                known.load(state)
        return known, scale

    def of_optimizer(self, flags: tuple[bool, ...]) -> SignatureCosts:
        """Return the costs of optimizer steps."""
        return self.of("optimizer", _NOTHING, flags)[0]

    def similar(self, name: str) -> tuple[BatchSignature, SignatureCosts] | None:
        """Return the newest counted batch signature of a step whose samples are known, and its costs."""
        like = [(key[1], costs) for key, costs in self._known.items() if key[0] == name and costs.counted]
        return next(((signature, costs) for signature, costs in reversed(like) if signature.first is not None), None)

    def state(self) -> dict[str, Any]:
        """Return the state for the checkpoint; signatures are saved as digests, since they are not primitives."""
        known = {_digest(key): costs.state() for key, costs in self._known.items() if costs.counted}
        return {**self._restored, **known}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._known, self._signatures, self._restored = {}, {}, dict(state)


def _digest(key: Any) -> str:
    name, signature, flags = key
    # By the class names of the first release, since checkpoints are read by these digests.
    described = repr((name, signature.spec, signature.leaves, flags)).replace("_TensorSignature(", "_TensorForm(")
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _scrambled(number: int) -> int:
    """Hash a number to a large pseudo-random one, always the same (SplitMix64)."""
    mask = (1 << 64) - 1
    number = (number + 1) * 0x9E3779B97F4A7C15 & mask
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & mask
    number = (number ^ number >> 27) * 0x94D049BB133111EB & mask
    return number ^ number >> 31
