"""The number of tokens in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_fedscale.devices.profiling.batches import BatchSignature

_TEXT = (torch.int32, torch.int64)


class TokenCounter:
    """Counts the tokens in batches.

    Args:
        tokens_fn: returns the tokens in a batch. None counts the entries of the first tensor if it holds integers in
            two dimensions (samples and positions), else samples.
    """

    def __init__(self, tokens_fn: Callable[[Any], float] | None) -> None:
        self._tokens_fn = tokens_fn

    @property
    def is_custom(self) -> bool:
        """Whether the user counts them."""
        return self._tokens_fn is not None

    def of_batch(self, batch: Any) -> float:
        """Return the number that the user's function returns for a batch.

        Raises:
            ValueError: if it fails, or returns no number above 0.
        """
        assert self._tokens_fn is not None
        try:
            tokens = self._tokens_fn(batch)
        except Exception as error:
            raise ValueError(
                f"tokens_fn failed on a batch ({type(error).__name__}: {error}): it must accept every batch."
            ) from error
        if isinstance(tokens, bool) or not isinstance(tokens, Real) or not 0 < float(tokens) < math.inf:
            what = "a tensor" if isinstance(tokens, Tensor) else repr(tokens)
            raise ValueError(f"tokens_fn returned {what}: return a number above 0, the tokens in the batch.")
        return float(tokens)

    def of_signature(self, signature: BatchSignature, samples: int | None) -> float:
        """Return the number by the default rule, which needs only the batch signature."""
        first = signature.first
        if first is not None and first.dtype in _TEXT and len(first.shape) == 2:
            return float(math.prod(first.shape))
        return samples_of(signature, samples if first is None else None)


def samples_of(signature: BatchSignature, samples: int | None) -> float:
    """Return ``samples`` if known; else, as Lightning does, the length of the first tensor that has one."""
    if samples is not None:
        return float(samples)
    return 1.0 if signature.first is None else float(signature.first.shape[0])
