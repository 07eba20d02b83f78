"""Hostile clients, for tests and studies of robust aggregation.

`attacked` adds an attack to any aggregator: the attackers train as the other clients do, then send something else.
`flip_labels` makes clients train on wrong labels instead.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fedscale.aggregators import Aggregator, Stack, aggregator_of
from lightning_fedscale.aggregators.rows import fold, norm_of
from lightning_fedscale.types import ClientUpdate, Cohort, IntArray
from lightning_fedscale.utils import checks, randomness
from lightning_fedscale.utils.factory_repr import record_call

Attack: TypeAlias = Callable[[Stack, list[int], Cohort], Tensor]
"""A function of ``(stack, rows, cohort)``: the stack of all honest updates, the attackers' rows in it, the cohort. It
returns the trainable parts that the attackers send instead, one row for each of ``rows``."""


@record_call
def attacked(aggregator: str | Aggregator, attack: Attack, attackers: Iterable[int]) -> Aggregator:
    """Return an aggregator that replaces the updates of hostile clients.

    All updates are collected and those of the attackers replaced before the aggregator sees them. So it works with any
    executor and any number of ranks; every rank holds one copy of the model per client of the cohort. The norms and
    losses of single clients in the record are those before the attack. Attackers leave buffers unchanged.

    Args:
        aggregator: the rule under attack, or its name.
        attack: what attackers send: an attack of this module or a custom function.
        attackers: the hostile clients, by number; those in a round's cohort attack.

    Raises:
        TypeError: if ``aggregator`` is not an aggregator, ``attack`` not a function of three arguments, or
            ``attackers`` not client numbers.
        ValueError: if the aggregator's name is unknown or a client's number is negative; at the beginning of a round,
            if there is no such client, or the aggregator refuses the round.

    Example:
        >>> from lightning_fedscale.aggregators import aggregate, mean, median
        >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
        >>> aggregate(attacked(mean(), sign_flip(scale=5.0), attackers=[2]), rows).tolist()
        [-4.0]
        >>> aggregate(attacked(median(), sign_flip(scale=5.0), attackers=[2]), rows).tolist()
        [1.0]
    """
    aggregator = aggregator_of(aggregator)
    try:
        inspect.signature(attack).bind(None, [], None)
    except TypeError:
        raise TypeError(
            f"attack={attack!r}: pass an attack such as attacks.sign_flip(), or a function of (stack, rows, cohort)."
        ) from None
    if not isinstance(attackers, Iterable):
        raise TypeError(f"attackers={attackers!r}: pass the numbers of the hostile clients, such as [2, 5].")
    hostile = frozenset(checks.integer("attackers", client, minimum=0) for client in attackers)
    init = partial(_init, aggregator=aggregator, hostile=hostile)
    finish = partial(_finish, aggregator=aggregator, attack=attack, hostile=hostile)
    return aggregator._replace(init=init, accumulate=_accumulate, finish=finish, sees_all=True)


def _finish(
    total: Tensor, cohort: Cohort, *state: Any, aggregator: Aggregator, attack: Attack, hostile: frozenset[int]
) -> Any:
    updates = _updates(total, cohort)
    rows = [row for row, update in enumerate(updates) if update.client in hostile]
    if rows:
        stack = Stack(
            torch.stack([update.delta for update in updates]),
            total.new_tensor([aggregator.weigh(update) for update in updates]),
            [cohort.place(update.client) for update in updates],
            cohort.trainable,
        )
        for row, sent in zip(rows, attack(stack, rows, cohort), strict=True):
            delta = torch.cat([sent, updates[row].delta[cohort.trainable :]])
            updates[row] = updates[row]._replace(delta=delta, norm=norm_of(delta, cohort))
    delta, after = fold(aggregator, updates, total.new_zeros(_length(total, cohort)), cohort, *state)
    return (delta, after) if state else delta


_NUMBERS = 7  # numbers of a row after the delta: whether the client sent an update, and the scalars of the update


def _init(like: Tensor, cohort: Cohort, *, aggregator: Aggregator, hostile: frozenset[int]) -> Tensor:
    if hostile and max(hostile) >= cohort.num_clients:
        raise ValueError(
            f"attackers: client {max(hostile)} does not exist: pass numbers from 0 to {cohort.num_clients - 1}."
        )
    aggregator.init(like[:0], cohort)  # so that it can refuse the round
    return torch.zeros(len(cohort.clients) * (like.numel() + _NUMBERS), dtype=like.dtype, device=like.device)


def _length(total: Tensor, cohort: Cohort) -> int:
    return total.numel() // len(cohort.clients) - _NUMBERS


def _accumulate(total: Tensor, update: ClientUpdate, weight: float, cohort: Cohort) -> Tensor:
    row = total.view(len(cohort.clients), -1)[cohort.place(update.client)]
    row[:-_NUMBERS].copy_(update.delta)
    numbers = (1, update.norm, update.num_samples, update.samples, update.steps, update.loss, update.seconds)
    row[-_NUMBERS:].copy_(torch.tensor(numbers, dtype=row.dtype))
    return total


def _updates(total: Tensor, cohort: Cohort) -> list[ClientUpdate]:
    found = []
    for client, row in zip(cohort.clients.tolist(), total.view(len(cohort.clients), -1), strict=True):
        sent, norm, num_samples, samples, steps, loss, seconds = row[-_NUMBERS:].tolist()
        if sent:
            delta = row[:-_NUMBERS]
            found.append(ClientUpdate(client, delta, norm, int(num_samples), int(samples), int(steps), loss, seconds))
    return found


def sign_flip(scale: float = 1.0) -> Attack:
    """Let attackers send their update with the opposite sign, multiplied by ``scale``.

    A fraction ``p`` of attackers reverses the mean of equal clients if ``p * scale > 1 - p``.

    Example:
        >>> stack = Stack(torch.tensor([[1.0], [2.0]]), torch.ones(2), [0, 1], trainable=1)
        >>> sign_flip(3.0)(stack, [1], Cohort(0, np.arange(2), 2, 1, 0)).tolist()
        [[-6.0]]
    """
    return partial(_sign_flip, scale=checks.number("scale", scale, "pass a finite number."))


def _sign_flip(stack: Stack, rows: list[int], cohort: Cohort, *, scale: float) -> Tensor:
    return -scale * _own(stack, rows)


def gaussian(std: float) -> Attack:
    """Let attackers send normal noise with mean 0 instead of their update (Blanchard et al., 2017).

    The noise depends only on the strategy's seed, the round and the client.

    Args:
        std: standard deviation of every element, in the units of the parameters.

    Example:
        >>> stack = Stack(torch.zeros(2, 1000, dtype=torch.float64), torch.ones(2), [0, 1], trainable=1000)
        >>> noise = gaussian(20.0)(stack, [0, 1], Cohort(0, np.arange(2), 2, 1000, 0))
        >>> round(noise.std().item())
        20
    """
    return partial(_gaussian, std=checks.number("std", std, "pass a number of at least 0.", lambda number: number >= 0))


def _gaussian(stack: Stack, rows: list[int], cohort: Cohort, *, std: float) -> Tensor:
    sent = torch.empty_like(_own(stack, rows))
    for row, place in zip(sent, (stack.places[number] for number in rows), strict=True):
        keys = (cohort.round, int(cohort.clients[place]))
        draws = randomness.generator(cohort.seed, randomness.ATTACK, *keys).normal(0.0, std, stack.trainable)
        row.copy_(torch.from_numpy(draws))
    return sent


def model_replacement(boost: float | None = None) -> Attack:
    """Let attackers scale their update so that the mean equals theirs (Bagdasaryan et al., arXiv 1807.00459).

    Let them train on other data, such as `flip_labels`: the result replaces the global model.

    Args:
        boost: factor of the attackers' updates; None is the round's weight over the attackers' weight, with which the
            mean of all is the mean of the attackers, plus the share of the honest clients.

    Example:
        >>> stack = Stack(torch.tensor([[0.0], [0.0], [2.0]]), torch.ones(3), [0, 1, 2], trainable=1)
        >>> model_replacement()(stack, [2], Cohort(0, np.arange(3), 3, 1, 0)).tolist()
        [[6.0]]
    """
    if boost is not None:
        checks.number("boost", boost, "pass a finite number, or None.")
    return partial(_replaced, boost=boost)


def _replaced(stack: Stack, rows: list[int], cohort: Cohort, *, boost: float | None) -> Tensor:
    own = stack.weights[rows].sum()
    return _own(stack, rows) * (stack.weights.sum() / own if boost is None else boost)


def a_little_is_enough(z: float | None = None) -> Attack:
    r"""Let attackers send :math:`\mu - z \sigma`, as honest clients might (Baruch et al., arXiv 1902.06156).

    Mean and standard deviation of every element are those of the attackers' own honest updates, since they see no
    others; so there should be several attackers.

    Args:
        z: number of standard deviations. None takes the paper's: the largest with enough honest clients further away,
            :math:`\Phi(z) = (n - f - s) / (n - f)` with :math:`s = \lfloor n / 2 + 1 \rfloor - f` for ``n`` clients
            with ``f`` attackers in the round, see `enough`.

    Example:
        >>> stack = Stack(torch.tensor([[1.0], [3.0], [2.0]]), torch.ones(3), [0, 1, 2], trainable=1)
        >>> a_little_is_enough(z=1.5)(stack, [0, 1], Cohort(0, np.arange(3), 3, 1, 0)).tolist()
        [[0.5], [0.5]]
    """
    if z is not None:
        checks.number("z", z, "pass a finite number, or None.")
    return partial(_a_little, z=z)


def _a_little(stack: Stack, rows: list[int], cohort: Cohort, *, z: float | None) -> Tensor:
    own = _own(stack, rows)
    away = enough(len(stack.deltas), len(rows)) if z is None else z
    return (own.mean(dim=0) - away * own.std(dim=0, correction=0)).expand_as(own)


def enough(clients: int, attackers: int) -> float:
    """Return the paper's number of standard deviations for `a_little_is_enough`.

    Example:
        >>> round(enough(clients=50, attackers=24), 2)
        1.43
    """
    # The paper assumes a minority of attackers; a majority needs no such attack.
    attackers = min(attackers, clients // 2)
    supporters = math.floor(clients / 2 + 1) - attackers
    honest = clients - attackers
    share = (honest - supporters) / honest
    return max(0.0, NormalDist().inv_cdf(share)) if share > 0 else 0.0


def _own(stack: Stack, rows: list[int]) -> Tensor:
    return stack.deltas[rows, : stack.trainable]


def flip_labels(dataset: Any, indices: Iterable[int], num_classes: int) -> Dataset[Any]:
    """Return a dataset in which some samples have the wrong label: ``i`` becomes ``num_classes - 1 - i``.

    Partition the data first (``partition = partitioner.partition``, then
    ``FederatedStrategy(partitioner=partition)``): a partitioner by labels would see the wrong ones.

    Args:
        dataset: the dataset; its samples are tuples or lists whose last entry is the label.
        indices: the samples to flip, for instance ``partition.client(k)`` of an attacker ``k``.
        num_classes: number of classes.

    Raises:
        TypeError: when a sample is read that is not a tuple or list.
        ValueError: if ``num_classes`` is below 2.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> flipped = flip_labels(TensorDataset(torch.arange(3.0), torch.tensor([0, 1, 9])), [0, 2], num_classes=10)
        >>> [int(flipped[number][1]) for number in range(3)]
        [9, 1, 0]
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: pass the number of classes, at least 2.")
    return _FlippedLabels(dataset, np.fromiter(indices, np.int64), num_classes)


class _FlippedLabels(Dataset[Any]):
    def __init__(self, dataset: Any, indices: IntArray, num_classes: int) -> None:
        self._dataset, self._num_classes = dataset, num_classes
        self._flipped = np.zeros(len(dataset), dtype=bool)
        self._flipped[indices] = True

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self._dataset[index]
        if not isinstance(sample, tuple | list):
            raise TypeError(
                f"flip_labels: sample {index} is a {type(sample).__name__}: pass a dataset of tuples (..., label)."
            )
        if not self._flipped[index]:
            return sample
        return (*sample[:-1], self._num_classes - 1 - sample[-1])
