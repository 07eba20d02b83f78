"""The interface of a local rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_fedscale.types import Cohort
from lightning_fedscale.utils.factory_repr import Arguments


class Correction(NamedTuple):
    r"""The correction of a client's gradient before every optimizer step (and before clipping).

    :math:`g \leftarrow g + s + \mu (y - x)`, where :math:`y` is the client's model and :math:`x` the global model that
    it started from.

    Attributes:
        shift: :math:`s`, one float64 vector over the trainable parameters, constant during the round; None is zero.
        proximal: :math:`\mu`.
    """

    shift: Tensor | None = None
    proximal: float = 0.0

    @property
    def operations(self) -> int:
        """Operations per element and optimizer step: one for the shift, two for the proximal term."""
        return (self.shift is not None) + 2 * (self.proximal != 0)


class Outcome(NamedTuple):
    """The result of a client's local training.

    Attributes:
        delta: ``x - y`` over the trainable parameters, a float64 vector; a rule may change it in place before it is
            sent.
        steps: number of optimizer steps.
        lr: learning rate of the local optimizer's first group in this round.
        momentum: its momentum; 0 if it has none.
        gradient: mean gradient of the client's batches at ``x``, if the rule has ``needs_gradient``.
    """

    delta: Tensor
    steps: int
    lr: float
    momentum: float
    gradient: Tensor | None = None


class Report(NamedTuple):
    """A client's output besides its delta.

    Attributes:
        state: the client's state for its next round: tensors and primitives in dicts and lists; None keeps none.
        message: a second float64 vector over the trainable parameters; the server gets its plain sum over the round's
            clients. With ``vectors_up=1`` it equals the update, and the server uses the update as it was sent.
        normalizer: a number; the server gets its mean over clients, weighted like their deltas.
    """

    state: Any = None
    message: Tensor | None = None
    normalizer: float = 1.0


class Merged(NamedTuple):
    """The server's input from a round.

    Attributes:
        delta: the aggregated delta over the trainable parameters; may be changed in place.
        messages: sum of the clients' messages; None if the rule has none.
        normalizer: weighted mean of the clients' normalizers.
        accepted: number of clients whose updates count.
        cohort: the round's clients.
    """

    delta: Tensor
    messages: Tensor | None
    normalizer: float
    accepted: int
    cohort: Cohort


class LocalRule(NamedTuple):
    """A rule for clients, in pure functions over flat float64 vectors of the trainable parameters.

    Attributes:
        name: name of the factory.
        init: ``(like) -> server state`` before the first round, for parameters like this vector.
        begin: ``(client state or None, server state) -> Correction``; None is a client that never took part.
        finish: ``(outcome, client state or None, server state) -> Report``.
        merge: ``(merged, server state) -> (delta, server state)``; the server optimizer moves along the delta.
        keeps_state: whether clients keep a state.
        sends_message: whether `Report.message` is set, and summed over ranks.
        vectors_up: number of vectors, as long as the parameters, that a client sends.
        vectors_down: number of such vectors that it receives.
        needs_gradient: whether `Outcome.gradient` is needed, which costs a pass over the client's batches.
        needs_sgd: whether the rule assumes SGD steps with ``Outcome.lr``, so that other optimizers are invalid, and
            momentum too, unless the rule ``knows_momentum``.
        knows_momentum: whether a rule that ``needs_sgd`` also supports ``Outcome.momentum``, but neither dampening nor
            Nesterov.
        changes_delta: whether ``finish`` changes ``Outcome.delta``.
        call: the call that made it, such as ``fed_prox(mu=0.1)``; for logs only.
        arguments: the arguments of that call; for logs only.
        instead: the alternative if a rule ``needs_sgd`` and clients use another optimizer; for messages.
    """

    name: str
    init: Callable[[Tensor], Any]
    begin: Callable[[Any, Any], Correction]
    finish: Callable[[Outcome, Any, Any], Report]
    merge: Callable[[Merged, Any], tuple[Tensor, Any]]
    keeps_state: bool = False
    sends_message: bool = False
    vectors_up: int = 1
    vectors_down: int = 1
    needs_gradient: bool = False
    needs_sgd: bool = False
    knows_momentum: bool = False
    changes_delta: bool = False
    call: str = ""
    instead: str = ""
    arguments: Mapping[str, Any] = Arguments()

    @property
    def operations(self) -> int:
        """Operations per element of a client's update, for additional vectors received, kept, sent and changed."""
        sent = 2 * self.sends_message  # one to compute it, one to sum it
        return self.vectors_down - 1 + self.keeps_state + sent + self.changes_delta
