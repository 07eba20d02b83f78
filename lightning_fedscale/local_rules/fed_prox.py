"""FedProx: clients stay close to the global model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from lightning_fedscale.local_rules.base import Correction, LocalRule, Merged, Outcome, Report
from lightning_fedscale.utils import checks
from lightning_fedscale.utils.factory_repr import record_call


@record_call
def fed_prox(mu: float) -> LocalRule:
    r"""FedProx (arXiv 1812.06127): clients minimise :math:`f_k(y) + \frac{\mu}{2} \|y - x\|^2`.

    Every local gradient becomes :math:`g + \mu (y - x)`. Use it if clients differ and train for many or unequal numbers
    of steps: it bounds their drift. It does not remove the bias of the drift, as `scaffold` and `fed_dyn` do. It costs
    no memory and no communication.

    Args:
        mu: :math:`\mu`, > 0; the paper tries 0.001, 0.01, 0.1 and 1. With plain SGD, ``mu * lr`` should stay below 1.

    Raises:
        TypeError: if ``mu`` is not a number.
        ValueError: if it is not positive and finite.

    Example:
        >>> fed_prox(mu=0.1).begin(None, None)
        Correction(shift=None, proximal=0.1)
    """
    return LocalRule("fed_prox", _init, partial(_begin, mu=checks.positive("mu", mu)), _finish, _merge)


def _init(like: Tensor) -> None:
    return None


def _begin(client: Any, server: Any, *, mu: float) -> Correction:
    return Correction(proximal=mu)


def _finish(outcome: Outcome, client: Any, server: Any) -> Report:
    return Report()


def _merge(merged: Merged, server: Any) -> tuple[Tensor, Any]:
    return merged.delta, server
