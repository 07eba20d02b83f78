"""SCAFFOLD: clients correct their drift by control variates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_fedscale.local_rules.base import Correction, LocalRule, Merged, Outcome, Report
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def scaffold(option: str = "II") -> LocalRule:
    r"""SCAFFOLD (arXiv 1910.06378): every local gradient becomes :math:`g - c_k + c`.

    :math:`c_k` estimates client k's gradient at the global model, and :math:`c` that of all clients. Clients therefore
    do not drift towards their own optima, and many local steps lead to the optimum of the clients' plain mean. After a
    round

    - option II: :math:`c_k^+ = c_k - c + (x - y) / (H \eta_l)`, the mean gradient over the client's steps;
    - option I: :math:`c_k^+ = g_k(x)`, the gradient of its batches at the global model; it costs a pass over them, is
      more stable, and allows any optimizer on the clients;

    and :math:`c \leftarrow c + \frac{1}{K} \sum_{k \in S} (c_k^+ - c_k)`, over *all* K clients. Clients keep
    :math:`c_k`; uplink and downlink have two vectors each. A compressor only compresses the update: the change of
    :math:`c_k` is sent whole, so with top-k more than half of SCAFFOLD's bytes remain. The paper's server is
    ``aggregator="uniform"`` with ``server.fed_avg(lr)``.

    Args:
        option: "II", which needs plain SGD on the clients, or "I" for any other optimizer, such as Adam.

    Raises:
        ValueError: if the option is unknown.

    Example:
        A client that moves from x = 0 to y = -0.6 in 3 steps of 0.1 had a mean gradient of 2.

        >>> rule = scaffold()
        >>> server = rule.init(torch.zeros(1))
        >>> report = rule.finish(Outcome(torch.tensor([0.6]), steps=3, lr=0.1, momentum=0.0), None, server)
        >>> report.state, report.message
        ({'control': tensor([2.])}, tensor([2.]))
    """
    checks.one_of("option", option, ("I", "II"))
    return LocalRule(
        "scaffold",
        _init,
        _begin,
        partial(_finish, at_start=option == "I"),
        _merge,
        keeps_state=True,
        sends_message=True,
        vectors_up=2,
        vectors_down=2,
        needs_gradient=option == "I",
        needs_sgd=option == "II",
        instead="local_rules.scaffold(option='I'), which takes any optimizer for one more pass over the data",
    )


def _init(like: Tensor) -> dict[str, Tensor]:
    return {"control": torch.zeros_like(like)}


def _begin(client: Any, server: Any) -> Correction:
    return Correction(shift=server["control"].clone() if client is None else server["control"] - client["control"])


def _finish(outcome: Outcome, client: Any, server: Any, *, at_start: bool) -> Report:
    before = torch.zeros_like(outcome.delta) if client is None else client["control"]
    if at_start:
        assert outcome.gradient is not None
        control = outcome.gradient.clone()
    elif outcome.steps == 0:  # the gradient scaler has skipped all steps, and nothing is known of the gradient
        control = before.clone()
    else:
        control = before - server["control"] + outcome.delta / (outcome.steps * outcome.lr)
    return Report(state={"control": control}, message=control - before)


def _merge(merged: Merged, server: Any) -> tuple[Tensor, dict[str, Tensor]]:
    assert merged.messages is not None
    return merged.delta, {"control": server["control"] + merged.messages / merged.cohort.num_clients}
