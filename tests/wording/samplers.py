"""Messages of `samplers`."""

from __future__ import annotations

from lightning_fedscale.samplers import available, daily_cycle, drop_out, power_of_choice, uniform, weighted
from lightning_fedscale.samplers.base import Sampler
from lightning_fedscale.samplers.registry import by_name
from tests.wording import Row


def draw(sampler: Sampler) -> object:
    return sampler(seed=0, round=0, num_clients=4, clients_per_round=3)


ROWS: list[Row] = [
    Row(
        lambda: by_name("unifrom"),
        ValueError,
        "sampler='unifrom' is not known. Did you mean 'uniform'? Known: 'uniform', 'poisson', 'round_robin', "
        "'weighted', 'power_of_choice', 'available', 'daily_cycle', 'drop_out'.",
    ),
    Row(
        lambda: by_name("weighted"),
        ValueError,
        "sampler='weighted' needs weights: pass an object, weighted(weights=...).",
    ),
    Row(
        lambda: weighted(["a"]),  # type: ignore[list-item]
        TypeError,
        "weights=['a']: pass a list of numbers, one per client.",
    ),
    Row(
        lambda: weighted([1.0, -1.0]),
        ValueError,
        "weights=[1.0, -1.0]: pass one finite number of at least 0 per client, not all of them 0.",
    ),
    Row(
        lambda: draw(weighted([1.0])),
        ValueError,
        "weights has 1 entries for 4 clients: pass one per client.",
    ),
    Row(
        lambda: power_of_choice(0),
        ValueError,
        "candidates=0: pass an integer of at least 1.",
    ),
    Row(
        lambda: draw(power_of_choice(2)),
        ValueError,
        "candidates=2: pass at least clients_per_round=3.",
    ),
    Row(
        lambda: available(uniform, [[1, 2]]),
        ValueError,
        "trace has shape (1, 2), or values other than 0 and 1: pass 0 and 1, or False and True, one row per "
        "round and one column per client.",
    ),
    Row(
        lambda: available(uniform, "lost.csv"),
        ValueError,
        "trace='lost.csv' cannot be read (lost.csv not found.): pass 0 and 1, or False and True, one row per "
        "round and one column per client.",
    ),
    Row(
        lambda: draw(available(uniform, [[1, 0]])),
        ValueError,
        "trace has 2 columns for 4 clients: pass one column per client.",
    ),
    Row(
        lambda: available("uniform", [[1]]),  # type: ignore[arg-type]
        TypeError,
        "sampler='uniform': pass a sampler such as samplers.uniform or samplers.weighted([...]).",
    ),
    Row(
        lambda: daily_cycle(uniform, period=1),
        ValueError,
        "period=1: pass an integer of at least 2.",
    ),
    Row(
        lambda: daily_cycle(uniform, period=24, share=0.0),
        ValueError,
        "share=0.0: pass a finite number above 0.",
    ),
    Row(
        lambda: drop_out(uniform, 1.0),
        ValueError,
        "probability=1.0: pass a number in [0, 1).",
    ),
]
