"""FedDyn: a regulariser that tracks each client's gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_fedscale.local_rules.base import Correction, LocalRule, Merged, Outcome, Report
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def fed_dyn(alpha: float) -> LocalRule:
    r"""FedDyn (arXiv 2111.04263): clients minimise :math:`f_k(y) - \lambda_k^\top y + \frac\alpha2 \|y - x\|^2`.

    Every local gradient becomes :math:`g - \lambda_k + \alpha (y - x)`. After a round
    :math:`\lambda_k \leftarrow \lambda_k - \alpha (y_k - x)`, the client's gradient at its final model, and the server
    moves to :math:`\bar y_S - h / \alpha` with :math:`h \leftarrow h - \frac{\alpha}{K} \sum_{k \in S} (y_k - x)` over
    *all* K clients. The only fixed point is the optimum of the clients' plain mean, for any number of local steps.
    Clients keep :math:`\lambda_k`; communication is that of FedAvg. The paper's server is ``aggregator="uniform"`` with
    ``server.fed_avg()``.

    Args:
        alpha: :math:`\alpha`, > 0; the paper tries 0.1, 0.01 and 0.001. With plain SGD, ``alpha * lr`` should be
            below 1.

    Raises:
        TypeError: if ``alpha`` is not a number.
        ValueError: if it is not positive and finite.

    Example:
        >>> rule = fed_dyn(alpha=0.1)
        >>> server = rule.init(torch.zeros(1))
        >>> report = rule.finish(Outcome(torch.tensor([2.0]), steps=5, lr=0.1, momentum=0.0), None, server)
        >>> rule.begin(report.state, server)
        Correction(shift=tensor([-0.2000]), proximal=0.1)
    """
    alpha = checks.positive("alpha", alpha)
    return LocalRule(
        "fed_dyn",
        _init,
        partial(_begin, alpha=alpha),
        partial(_finish, alpha=alpha),
        partial(_merge, alpha=alpha),
        keeps_state=True,
        sends_message=True,
    )


def _init(like: Tensor) -> dict[str, Tensor]:
    return {"h": torch.zeros_like(like)}


def _begin(client: Any, server: Any, *, alpha: float) -> Correction:
    return Correction(shift=None if client is None else -client["gradient"], proximal=alpha)


def _finish(outcome: Outcome, client: Any, server: Any, *, alpha: float) -> Report:
    moved = alpha * outcome.delta
    state = {"gradient": moved if client is None else client["gradient"] + moved}
    # The server needs the plain sum of deltas for every aggregator; the client sends no additional data for it.
    return Report(state=state, message=outcome.delta.clone())


def _merge(merged: Merged, server: Any, *, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
    assert merged.messages is not None
    h = server["h"] + merged.messages * (alpha / merged.cohort.num_clients)
    return merged.delta.add_(h / alpha), {"h": h}
