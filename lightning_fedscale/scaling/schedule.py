"""The schedule of a planned run: a client's batch, its local steps, and the rounds."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_fedscale.scaling.base import Law
from lightning_fedscale.scaling.compute import Kaplan
from lightning_fedscale.scaling.diloco import DiLoCo
from lightning_fedscale.scaling.hardware import SENT_BYTES, Hardware

_LOCAL_STEPS = 30
"""Local steps of the runs behind DiLoCo's fits."""


class Schedule(NamedTuple):
    """How a model is trained; the fields are those of a `Plan`."""

    batch_per_client: float | None
    batch_limit: str | None
    local_steps: int
    rounds: float | None
    bytes_per_client: float | None
    inner_learning_rate: float | None
    outer_learning_rate: float | None


def schedule(
    law: Law,
    *,
    params: float,
    tokens: float,
    loss: float,
    clients: int,
    hardware: Hardware,
    batch_size: int | None,
    local_steps: int | None,
) -> Schedule:
    """Schedule the training of a model on ``tokens`` tokens of each client.

    Args:
        law: the law, whose runs give the batch size and the local steps that are None.
        params: model size.
        tokens: tokens of each client.
        loss: predicted loss; NaN if the law predicts none.
        clients: number of clients that train in a round.
        hardware: the clients' devices, which limit the batch.
        batch_size: a client's batch size, in samples.
        local_steps: batches between exchanges.

    Raises:
        ValueError: for a batch in samples if the number of tokens per sample is not known.
    """
    is_text = law.domain.task == "text" and math.isfinite(loss)
    batch, limit = _batch(law, params, loss, clients, hardware, batch_size, is_text)
    steps = local_steps or law.made_for.local_steps or _LOCAL_STEPS
    steps = steps if batch is None else max(1, min(steps, int(tokens / batch)))
    rounds = None if batch is None else max(1.0, tokens / (batch * steps))
    replicas = DiLoCo(replicas=min(clients, 8)) if is_text else None
    return Schedule(
        batch_per_client=batch,
        batch_limit=limit,
        local_steps=steps,
        rounds=rounds,
        bytes_per_client=None if rounds is None else 2.0 * SENT_BYTES * params * rounds,
        inner_learning_rate=None if replicas is None else replicas.inner_learning_rate(params),
        outer_learning_rate=None if replicas is None else replicas.outer_learning_rate,
    )


def _batch(
    law: Law, params: float, loss: float, clients: int, hardware: Hardware, batch_size: int | None, is_text: bool
) -> tuple[float | None, str | None]:
    """Return a client's batch in tokens and what limits it: the argument, the law's runs, a law of text, or memory."""
    made = law.made_for
    samples, per_sample = batch_size or made.batch_size, made.tokens_per_sample or (None if is_text else 1.0)
    if samples is not None and per_sample is not None:
        is_other = batch_size not in (None, made.batch_size)
        limits = {"as asked" if is_other else "as in the law's runs": samples * per_sample}
    elif batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size}: the law {law.name} counts tokens, and its runs do not record how many tokens a"
            " sample has. Leave batch_size out."
        )
    elif not is_text:
        return None, None
    else:
        replicas = law.replace(replicas=clients) if isinstance(law, DiLoCo) else None
        together = Kaplan().critical_batch(loss) if replicas is None else replicas.batch(params)
        limits = {"critical batch": max(1.0, together / clients)}
    most = hardware.most_tokens(params)
    if most is not None:
        if most < 1:
            return None, "memory"
        limits["memory"] = most
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit
