"""Wrong arguments as users pass them, some of every family: one clear message, before any client trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_fedscale import (
    Partition,
    aggregators,
    attacks,
    compressors,
    devices,
    local_rules,
    partitioners,
    privacy,
    samplers,
    schedules,
    server,
)
from lightning_fedscale.callbacks import RoundEvents
from lightning_fedscale.server.asynchrony import FedBuff
from tests.laws import reference
from tests.strategies import sequential

FOUR = 4


class NoClientTrains(RoundEvents):
    def on_client_start(self, *_: Any) -> None:
        raise AssertionError("a client trains")


def fit(**options: Any) -> None:
    """Four clients, unless told otherwise."""
    clients = options.pop("num_clients", FOUR)
    trainer = reference.quiet_trainer(
        max_epochs=2, strategy=sequential(clients, **options), callbacks=[NoClientTrains()]
    )
    trainer.fit(reference.make_module(), reference.loader(reference.dataset()))


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # server optimizers
    "fed_adam": (lambda: server.fed_adam(lr=-1), ValueError, "lr=-1: pass a finite number above 0"),
    "fed_yogi": (lambda: server.fed_yogi(lr="0.1"), TypeError, "lr='0.1': pass a finite number above 0"),  # type: ignore[arg-type]
    "fed_avgm": (lambda: server.fed_avgm(momentum=2.0), ValueError, r"momentum=2.0: pass a number in \[0, 1\)"),
    "fed_exp": (lambda: server.fed_exp(epsilon="a"), TypeError, "epsilon='a': pass a finite number above 0"),  # type: ignore[arg-type]
    "from_torch": (lambda: server.from_torch(torch.optim.SGD, lrr=1.0), TypeError, r"from_torch\(SGD, lrr=1.0\)"),
    "chain": (lambda: server.chain("adam"), TypeError, "argument 0 is 'adam': pass a server optimizer"),  # type: ignore[arg-type]
    # local rules
    "fed_prox": (lambda: local_rules.fed_prox(-1), ValueError, "mu=-1: pass a finite number above 0"),
    "scaffold": (lambda: local_rules.scaffold("III"), ValueError, "option='III': pass one of 'I', 'II'"),
    "fed_dyn": (lambda: local_rules.fed_dyn("a"), TypeError, "alpha='a': pass a finite number above 0"),  # type: ignore[arg-type]
    "ditto": (lambda: local_rules.Ditto("a"), TypeError, "strength='a': pass a number of at least 0"),  # type: ignore[arg-type]
    # local steps
    "no round": (lambda: fit(local_steps=lambda: 3), TypeError, "too many positional arguments; pass a number of"),
    "words": (lambda: fit(local_steps=lambda round: "3"), TypeError, r"local_steps\(0\)='3': pass an integer"),
    "post_local": (
        lambda: schedules.post_local(until=3, steps=0),
        ValueError,
        "steps=0: pass an integer of at least 1",
    ),
    # aggregators and attacks
    "trimmed_mean": (
        lambda: fit(aggregator=aggregators.trimmed_mean(3)),
        ValueError,
        r"trimmed_mean\(trim=3\): .*at least 7 clients",
    ),
    "krum": (
        lambda: fit(num_clients=10, clients_per_round=4, aggregator=aggregators.krum(1)),
        ValueError,
        r"krum\(attackers=1\): .*at least 5 clients in a round, .* round 0 has 4",
    ),
    "attacked krum": (
        lambda: fit(aggregator=attacks.attacked(aggregators.krum(1), attacks.sign_flip(), [0])),
        ValueError,
        r"krum\(attackers=1\): .*at least 5 clients",
    ),
    "clipped krum": (
        lambda: fit(aggregator=aggregators.norm_clipped(1.0, aggregators.krum(1))),
        ValueError,
        ": .*at least 5 clients",
    ),
    "attackers": (
        lambda: fit(aggregator=attacks.attacked(aggregators.mean(), attacks.sign_flip(), [7])),
        ValueError,
        "attackers: client 7 does not exist: pass numbers from 0 to 3",
    ),
    "aggregator": (
        lambda: sequential(FOUR, aggregator=3),
        TypeError,
        "aggregator=3: pass one of 'mean', 'median', 'geometric_median', 'uniform', or",
    ),
    "no rule": (
        lambda: attacks.attacked(3, attacks.sign_flip(), [0]),  # type: ignore[arg-type]
        TypeError,
        "aggregator=3: pass one of 'mean'",
    ),
    "no attack": (
        lambda: attacks.attacked("median", "sign_flip", [0]),  # type: ignore[arg-type]
        TypeError,
        r"attack='sign_flip': pass an attack such as attacks.sign_flip\(\)",
    ),
    "uncalled attack": (
        lambda: attacks.attacked("median", attacks.sign_flip, [0]),  # type: ignore[arg-type]
        TypeError,
        "attack=.*pass an attack such as",
    ),
    # parentheses forgotten
    "median": (
        lambda: sequential(FOUR, aggregator=aggregators.median),
        TypeError,
        r"aggregator=median is a function: call it, aggregators.median\(\)",
    ),
    "krum uncalled": (
        lambda: attacks.attacked(aggregators.krum, attacks.sign_flip(), [0]),  # type: ignore[arg-type]
        TypeError,
        r"aggregator=krum is a function: call it, aggregators.krum\(attackers=...\)",
    ),
    "top_k uncalled": (
        lambda: sequential(FOUR, compressor=compressors.top_k),
        TypeError,
        r"compressor=top_k is a function: call it, compressors.top_k\(\)",
    ),
    "error_feedback uncalled": (
        lambda: sequential(FOUR, downlink_compressor=compressors.error_feedback),
        TypeError,
        r"downlink_compressor=error_feedback is a function: call it, compressors.error_feedback\(compressor=...\)",
    ),
    "fed_adam uncalled": (
        lambda: sequential(FOUR, server_optimizer=server.fed_adam),
        TypeError,
        r"server_optimizer=fed_adam is a function: call it, server.fed_adam\(\)",
    ),
    "fed_prox uncalled": (
        lambda: sequential(FOUR, local_rule=local_rules.fed_prox),
        TypeError,
        r"local_rule=fed_prox is a function: call it, local_rules.fed_prox\(mu=...\)",
    ),
    # compressors
    "top_k": (lambda: compressors.top_k(ratio=2), ValueError, "ratio=2: pass a share of the elements"),
    "random_k": (lambda: compressors.random_k(True), TypeError, "ratio=True: pass a share of the elements"),
    "qsgd": (lambda: compressors.qsgd(1.5), TypeError, "levels=1.5: pass an integer from 1 to 65536"),  # type: ignore[arg-type]
    "adaptive": (lambda: compressors.adaptive(highest=1), ValueError, "highest=1: pass a compression factor above 1"),
    "growth": (lambda: compressors.adaptive(growth=np.nan), ValueError, "growth=nan: pass a number above 1"),
    "error_feedback": (
        lambda: sequential(FOUR, compressor="error_feedback"),
        ValueError,
        r"compressor='error_feedback' needs compressor: .* compressors.error_feedback\(compressors.top_k\(0.1\)\)",
    ),
    "phase_driven": (
        lambda: sequential(FOUR, compressor="phase_driven"),
        ValueError,
        "compressor='phase_driven' needs phase, critical, otherwise: pass an object",
    ),
    # privacy
    "clip_norm": (
        lambda: privacy.dp_fed_avg(clip_norm="1", noise_multiplier=1.0, delta=1e-5),  # type: ignore[arg-type]
        TypeError,
        "clip_norm='1': pass a finite number above 0",
    ),
    "target_epsilon": (
        lambda: privacy.dp_fed_avg(1.0, delta=1e-5, target_epsilon="two", rounds=3),  # type: ignore[arg-type]
        TypeError,
        "target_epsilon='two': pass a finite number above 0",
    ),
    "secure_mean": (lambda: privacy.secure_mean(clip=np.inf), ValueError, "clip=inf: pass the largest absolute value"),
    "privacy": (lambda: sequential(FOUR, privacy=3), TypeError, "privacy=3: "),
    # who takes part, and when
    "seconds": (lambda: FedBuff(seconds="fast"), ValueError, "seconds='fast': pass one number above 0"),  # type: ignore[arg-type]
    "two seconds": (lambda: fit(mode=FedBuff(seconds=[1.0, 2.0])), ValueError, "seconds: 2 .* 4 clients"),
    "staleness": (
        lambda: FedBuff(5, 0),  # type: ignore[arg-type]
        ValueError,
        "staleness=0: pass 'polynomial'",
    ),
    "mode": (lambda: sequential(FOUR, mode="asink"), ValueError, "mode='asink': choose 'sync', 'async'"),
    "power_of_choice": (
        lambda: fit(clients_per_round=3, sampler=samplers.power_of_choice(candidates=2)),
        ValueError,
        "candidates=2: .*clients_per_round=3",
    ),
    "weighted": (
        lambda: fit(clients_per_round=2, sampler=samplers.weighted([1, 2])),
        ValueError,
        "weights has 2 entries for 4 clients",
    ),
    "trace": (
        lambda: fit(sampler=samplers.available(samplers.uniform, [[1, 0]])),
        ValueError,
        "trace has 2 columns for 4 clients",
    ),
    "drop_out": (lambda: samplers.drop_out(3, 0.1), TypeError, "sampler=3: pass a sampler"),  # type: ignore[arg-type]
    # what stays with clients
    "personal": (
        lambda: sequential(FOUR, personal="head.*"),
        TypeError,
        r"personal='head.\*': pass a list of patterns",
    ),
    "personal number": (
        lambda: sequential(FOUR, personal=3),
        TypeError,
        "personal=3: pass a list of patterns",
    ),
    "buffers": (
        lambda: sequential(FOUR, buffers="queue"),
        TypeError,
        "buffers='queue': pass a dict",
    ),
    "buffers policy": (
        lambda: sequential(FOUR, buffers={"queue": "avg"}),
        ValueError,
        r"buffers\['queue'\]='avg': pass one of 'mean', 'server', 'largest', 'client'",
    ),
    "no such buffer": (
        lambda: fit(buffers={"queue": "mean"}),
        ValueError,
        "matches no buffer. The module has none: correct",
    ),
    # who holds what
    "split": (lambda: partitioners.split(5, 0.1), TypeError, "partition=5: pass a Partition, such as"),  # type: ignore[arg-type]
    "heterogeneity": (lambda: partitioners.heterogeneity(5, [0]), TypeError, "partition=5: pass a Partition"),  # type: ignore[arg-type]
    "label_counts": (lambda: partitioners.label_counts(5, [0]), TypeError, "partition=5: pass a Partition"),  # type: ignore[arg-type]
    "from_lists": (lambda: Partition.from_lists(5), TypeError, "clients=5: pass a list of sample positions for each"),  # type: ignore[arg-type]
    "load": (lambda: Partition.load("nope.json"), FileNotFoundError, "^path='nope.json': there is no such file: save"),
    "real labels": (
        lambda: sequential(FOUR, partitioner="dirichlet").client_sizes(np.linspace(0, 1, 20)),
        ValueError,
        r"^partitioner=DirichletPartitioner\(.*\): labels have dtype float64, .* name another column with partition_by",
    ),
    # devices
    "estimate_memory": (lambda: devices.estimate_memory(3, 4), TypeError, "module=3: pass a LightningModule"),  # type: ignore[arg-type]
    "no such layer": (lambda: fit(personal=["nothing.*"]), ValueError, "matches no parameter or buffer"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_message(case: str) -> None:
    make, error, message = CASES[case]
    with pytest.raises(error, match=message):
        make()
