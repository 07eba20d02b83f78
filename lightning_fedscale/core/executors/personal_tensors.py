"""The division of a module's tensors into shared ones and ones that stay with each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)


class PersonalPatterns:
    """The tensors of a module of which all names match the user's patterns.

    Args:
        module: the user's module.
        patterns: patterns of names (`fnmatch`, as in a shell).

    Raises:
        ValueError: if a tensor has a name that matches and one that does not.
    """

    def __init__(self, module: nn.Module, patterns: Sequence[str]) -> None:
        self._patterns = list(patterns)
        self._ids: set[int] = set()
        if not patterns:
            return
        names: dict[int, dict[str, bool]] = {}
        for tensors in (module.named_parameters, module.named_buffers):
            for name, tensor in tensors(remove_duplicate=False):
                names.setdefault(id(tensor), {})[name] = any(fnmatchcase(name, pattern) for pattern in patterns)
        for matches in names.values():
            if len(set(matches.values())) > 1:
                own, shared = (next(n for n, match in matches.items() if match is which) for which in (True, False))
                raise ValueError(
                    f"personal={self._patterns!r} matches {own!r} but not {shared!r}, another name of the same tensor:"
                    f" add {shared!r} to keep the tensor with each client, or untie the two."
                )
        self._ids = {number for number, matches in names.items() if all(matches.values())}

    def divide(self, tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
        """Split tensors into shared and personal ones."""
        own = {name: tensor for name, tensor in tensors.items() if id(tensor) in self._ids}
        return {name: tensor for name, tensor in tensors.items() if name not in own}, own

    def check_memory(self, own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        """Raise an error if personal and shared tensors overlap: parameters tied by their ``.data``, or views."""
        if not self._patterns:
            return
        reach = {True: (0, ""), False: (0, "")}  # end of the personal and of the shared memory so far
        parts = (own, True), (others, False)
        spans = [(*span_of(tensor), name, mine) for part, mine in parts for name, tensor in part.items()]
        for start, end, name, mine in sorted(spans):
            until, other = reach[not mine]
            if start < until:
                kept, shared = (name, other) if mine else (other, name)
                raise ValueError(
                    f"personal={self._patterns!r} matches {kept!r} but not {shared!r}, which shares its memory: add"
                    f" {shared!r} to keep both with each client, or clone one of them."
                )
            reach[mine] = max(reach[mine], (end, name))


def span_of(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's start and end."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
