"""Messages of `utils`."""

from __future__ import annotations

from lightning_fedscale.utils import buffers, checks, fairness, memory
from tests.wording import Row

ROWS: list[Row] = [
    Row(
        lambda: checks.integer("rounds", 0),
        ValueError,
        "rounds=0: pass an integer of at least 1.",
    ),
    Row(
        lambda: checks.integer("levels", 1, 2, 16),
        ValueError,
        "levels=1: pass an integer from 2 to 16.",
    ),
    Row(
        lambda: checks.flag("verbose", 1),
        TypeError,
        "verbose=1: pass True or False.",
    ),
    Row(
        lambda: checks.in_interval("fraction", 2, 0.0, 1.0),
        ValueError,
        "fraction=2: pass a number in [0, 1].",
    ),
    Row(
        lambda: checks.positive("lr", 0),
        ValueError,
        "lr=0: pass a finite number above 0.",
    ),
    Row(
        lambda: checks.one_of("noise", "sever", ("server", "client")),
        ValueError,
        "noise='sever': pass one of 'server', 'client'. Did you mean 'server'?",
    ),
    Row(
        lambda: checks.named("local_rule", "fedprox", {"fed_prox": lambda mu: mu}),
        ValueError,
        "local_rule='fedprox' is not known. Did you mean 'fed_prox'? Known: 'fed_prox'.",
    ),
    Row(
        lambda: checks.named("local_rule", "fed_prox", {"fed_prox": lambda mu: mu}),
        ValueError,
        "local_rule='fed_prox' needs mu: pass an object, fed_prox(mu=...).",
    ),
    Row(
        lambda: checks.known_arguments("register", dict.fromkeys, {"itterable": 3}),
        TypeError,
        "register: fromkeys has no argument 'itterable'. Did you mean 'iterable'?",
    ),
    Row(
        lambda: buffers.checked("queue"),
        TypeError,
        "buffers='queue': pass a dict from patterns of names to policies, such as {'queue*': 'largest'}.",
    ),
    Row(
        lambda: buffers.checked({"queue": "average"}),
        ValueError,
        "buffers['queue']='average': pass one of 'mean', 'server', 'largest', 'client'.",
    ),
    Row(
        lambda: memory.parse_bytes("budget", "much"),
        ValueError,
        "budget='much': pass a number of bytes, a string such as '4GiB' or '500MB', or 'auto'.",
    ),
    Row(
        lambda: fairness.tail_mean([1.0], 0.0, highest=True),
        ValueError,
        "fraction=0.0: pass a number in (0, 1], 0.1 for ten per cent.",
    ),
    Row(
        lambda: fairness.jain_index([]),
        ValueError,
        "values=[]: pass one value per client, at least one.",
    ),
]
