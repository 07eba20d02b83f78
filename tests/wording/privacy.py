"""Messages of `privacy`."""

from __future__ import annotations

import torch

from lightning_fedscale.aggregators import aggregate
from lightning_fedscale.privacy import AdaptiveClipping, dp_fed_avg, secure_mean
from tests.wording import Row

ROWS: list[Row] = [
    Row(
        lambda: dp_fed_avg(0, 1.0, delta=1e-5),
        ValueError,
        "clip_norm=0: pass a finite number above 0.",
    ),
    Row(
        lambda: dp_fed_avg(1.0, 1.0, delta=1),
        ValueError,
        "delta=1: pass a probability in (0, 1), well below 1 / number of clients.",
    ),
    Row(
        lambda: dp_fed_avg(1.0, delta=1e-5),
        ValueError,
        "noise_multiplier=None and target_epsilon=None: pass exactly one of them.",
    ),
    Row(
        lambda: dp_fed_avg(1.0, -1.0, delta=1e-5),
        ValueError,
        "noise_multiplier=-1.0: pass a number of at least 0.",
    ),
    Row(
        lambda: dp_fed_avg(1.0, target_epsilon=2.0, delta=1e-5),
        ValueError,
        "target_epsilon=2.0 and rounds=None: pass both, or neither.",
    ),
    Row(
        lambda: dp_fed_avg(1.0, 1.0, delta=1e-5, adaptive=0.5),  # type: ignore[arg-type]
        TypeError,
        "adaptive=0.5: pass privacy.AdaptiveClipping(), or None.",
    ),
    Row(
        lambda: dp_fed_avg(1.0, 1.0, delta=1e-5, adaptive=AdaptiveClipping(quantile=2.0)),
        ValueError,
        "adaptive: quantile=2.0: pass a share of the clients in [0, 1].",
    ),
    Row(
        lambda: dp_fed_avg(1.0, 1.0, delta=1e-5, adaptive=AdaptiveClipping(), weight_cap=5.0),
        ValueError,
        "weight_cap=5.0 with adaptive=AdaptiveClipping(quantile=0.5, rate=0.2, count_noise=None): adaptive "
        "clipping weighs all clients equally: pass only one of them.",
    ),
    Row(
        lambda: dp_fed_avg(1.0, 1.0, delta=1e-5, noise="sever"),  # type: ignore[arg-type]
        ValueError,
        "noise='sever': pass one of 'server', 'client'. Did you mean 'server'?",
    ),
    Row(
        lambda: dp_fed_avg(1.0, 1.0, delta=1e-5, accountant="moments"),  # type: ignore[arg-type]
        ValueError,
        "accountant='moments': pass one of 'pld', 'rdp'.",
    ),
    Row(
        lambda: dp_fed_avg(1.0, 1.0, delta=1e-5, adaptive=AdaptiveClipping()).calibrated(0.1, clients=5),
        ValueError,
        "adaptive: with count_noise=0.25 (by default a twentieth of the clients in a round), no amount of "
        "noise on the updates can give noise_multiplier=1: use at least 11 clients per round, or pass "
        "AdaptiveClipping(count_noise=...) above 0.5.",
    ),
    Row(
        lambda: secure_mean(clip=0),
        ValueError,
        "clip=0: pass the largest absolute value of an element, above 0.",
    ),
    Row(
        lambda: secure_mean(clip=1.0, bits=40),
        ValueError,
        "bits=40: pass an integer from 1 to 30.",
    ),
    Row(
        lambda: secure_mean(clip=1.0, threshold=0),
        ValueError,
        "threshold=0: pass a share of the round's clients in (0, 1].",
    ),
    Row(
        lambda: aggregate(secure_mean(clip=1.0, bits=30), torch.zeros(3, 1)),
        ValueError,
        "secure_mean: bits=30: the sum of 3 clients does not fit into 31 bits: pass at most 29, or sample "
        "fewer clients per round.",
    ),
    Row(
        lambda: aggregate(secure_mean(clip=1.0), torch.tensor([[1.0], [float("nan")], [float("nan")]])),
        RuntimeError,
        "secure_mean: 1 of 3 clients sent a finite update in round 0, and removing their masks takes 2: pass a "
        "lower threshold, or find out why updates are not finite.",
    ),
]
