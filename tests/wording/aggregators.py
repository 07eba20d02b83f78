"""Messages of `aggregators`."""

from __future__ import annotations

import torch

from lightning_fedscale import aggregators
from lightning_fedscale.aggregators import aggregate, aggregator_of, by_name
from tests.wording import Row

ROWS: list[Row] = [
    Row(
        lambda: by_name("unifrom"),
        ValueError,
        "aggregator='unifrom' is not known. Did you mean 'uniform'? Known: 'mean', 'median', 'trimmed_mean', "
        "'krum', 'multi_krum', 'geometric_median', 'norm_clipped', 'centered_clipping', 'uniform'.",
    ),
    Row(
        lambda: by_name("krum"),
        ValueError,
        "aggregator='krum' needs attackers: pass an object, krum(attackers=...).",
    ),
    Row(
        lambda: aggregator_of(aggregators.median),
        TypeError,
        "aggregator=median is a function: call it, aggregators.median().",
    ),
    Row(
        lambda: aggregator_of(3),
        TypeError,
        "aggregator=3: pass one of 'mean', 'median', 'geometric_median', 'uniform', or an Aggregator such as "
        "aggregators.krum(1).",
    ),
    Row(
        lambda: aggregator_of(aggregators.mean()._replace(finish=lambda total: total)),  # type: ignore[arg-type]
        TypeError,
        "aggregator: finish has other arguments (too many positional arguments): pass a function of (total, "
        "cohort), or pass init_state=... as well to keep a state.",
    ),
    Row(
        lambda: aggregators.mean("steps"),
        ValueError,
        "weighting='steps': pass one of 'samples', 'uniform'.",
    ),
    Row(
        lambda: aggregators.trimmed_mean(0.7),
        ValueError,
        "trim=0.7: pass a share of the clients in [0, 0.5), cut off at each end, or an int.",
    ),
    Row(
        lambda: aggregators.trimmed_mean("0.2"),  # type: ignore[arg-type]
        TypeError,
        "trim='0.2': pass a number of clients such as 2, or a share of them in [0, 0.5).",
    ),
    Row(
        lambda: aggregators.trimmed_mean(-1),
        ValueError,
        "trim=-1: pass the number of clients to cut off at each end, at least 0.",
    ),
    Row(
        lambda: aggregators.krum(-1),
        ValueError,
        "attackers=-1: pass the number of clients of a round that may be hostile, an integer of at least 0.",
    ),
    Row(
        lambda: aggregators.krum(0.2),  # type: ignore[arg-type]
        TypeError,
        "attackers=0.2: pass the number of clients of a round that may be hostile, an integer of at least 0, "
        "not float.",
    ),
    Row(
        lambda: aggregators.multi_krum(1, keep=0),
        ValueError,
        "keep=0: pass the number of updates to average, an integer of at least 1.",
    ),
    Row(
        lambda: aggregators.geometric_median(smoothing=0),
        ValueError,
        "smoothing=0: pass a finite number above 0.",
    ),
    Row(
        lambda: aggregators.centered_clipping(0.0),
        ValueError,
        "radius=0.0: pass a finite number above 0.",
    ),
    Row(
        lambda: aggregators.norm_clipped(0),
        ValueError,
        "max_norm=0: pass the largest norm of a client's update, above 0.",
    ),
    Row(
        lambda: aggregators.norm_clipped(1.0, "median"),  # type: ignore[arg-type]
        TypeError,
        "inner='median': pass an aggregators.Aggregator such as aggregators.median(), or None.",
    ),
    Row(
        lambda: aggregate(aggregators.mean(), [[1.0], [2.0]]),  # type: ignore[arg-type]
        TypeError,
        "rows=[[1.0], [2.0]]: pass a tensor, (clients, elements), with one update per client.",
    ),
    Row(
        lambda: aggregate(aggregators.mean(), torch.ones(3)),
        ValueError,
        "rows=(3,): pass a tensor, (clients, elements), with one update per client.",
    ),
    Row(
        lambda: aggregate(aggregators.mean(), torch.ones(3, 1), [1, 2]),
        ValueError,
        "num_samples=[1, 2]: pass a number of samples, at least 0, for each of the 3 rows.",
    ),
    Row(
        lambda: aggregate(aggregators.mean(), torch.ones(2, 1), [1, -2]),
        ValueError,
        "num_samples=[1, -2]: pass a number of samples, at least 0, for each of the 2 rows.",
    ),
    Row(
        lambda: aggregate(aggregators.krum(2), torch.zeros(6, 1)),
        ValueError,
        "aggregator=krum(attackers=2): it needs at least 7 clients in a round, and round 0 has 6: raise "
        "clients_per_round, or lower its arguments.",
    ),
]
