"""The shape of what a client does differently from plain local training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lightning_fedscale.types import Cohort


class Correction(NamedTuple):
    r"""What is added to a client's gradient before every optimizer step (and before clipping).

    :math:`g \leftarrow g + s + \mu (y - x)`, with the client's model :math:`y` and the global one :math:`x` that it
    started from.

    Attributes:
        shift: :math:`s`, one float64 vector over the trainable parameters, constant through the round; None is zero.
        proximal: :math:`\mu`.
    """

    shift: Tensor | None = None
    proximal: float = 0.0

    @property
    def operations(self) -> int:
        """For each element, in every optimizer step: one for the shift, two for the proximal term."""
        return (self.shift is not None) + 2 * (self.proximal != 0)


class Outcome(NamedTuple):
    """What a client's local training came to.

    Attributes:
        delta: ``x - y`` over the trainable parameters, a float64 vector; a rule may change it in place, and that is
            what is sent.
        steps: optimizer steps that were taken.
        lr: learning rate of the local optimizer's first group in this round.
        momentum: its momentum, 0 without.
        gradient: mean gradient of the client's batches at ``x``, where the rule asks for it (``needs_gradient``).
    """

    delta: Tensor
    steps: int
    lr: float
    momentum: float
    gradient: Tensor | None = None


class Report(NamedTuple):
    """What a client leaves behind.

    Attributes:
        state: what it keeps for its next round: tensors and primitives in dicts and lists; None keeps nothing.
        message: a second float64 vector over the trainable parameters, of which the server sees the plain sum over the
            round's clients. With ``vectors_up=1`` it is the update once more, and the server sees it as it was sent.
        normalizer: a number of which the server sees the mean over clients, weighted as their deltas.
    """

    state: Any = None
    message: Tensor | None = None
    normalizer: float = 1.0


class Merged(NamedTuple):
    """What the server sees of a round.

    Attributes:
        delta: the aggregated delta over the trainable parameters; may be changed in place.
        messages: sum of the clients' messages; None if the rule has none.
        normalizer: weighted mean of the clients' normalizers.
        accepted: number of clients whose updates count.
        cohort: who took part.
    """

    delta: Tensor
    messages: Tensor | None
    normalizer: float
    accepted: int
    cohort: Cohort


class LocalRule(NamedTuple):
    """A rule for clients, in pure functions over flat float64 vectors of the trainable parameters.

    Attributes:
        name: what the factory is called.
        init: ``(like) -> server state`` before the first round, for parameters like this vector.
        begin: ``(client state or None, server state) -> Correction``; None is a client that never took part.
        finish: ``(outcome, client state or None, server state) -> Report``.
        merge: ``(merged, server state) -> (delta, server state)``; the server optimizer moves along the delta.
        keeps_state: whether clients keep a state.
        sends_message: whether `Report.message` is given, and crosses ranks.
        vectors_up: how many vectors as long as the parameters a client sends.
        vectors_down: how many it receives.
        needs_gradient: whether `Outcome.gradient` is wanted; costs a pass over the client's batches.
        needs_sgd: whether the rule knows the local optimizer's steps as those of SGD with ``Outcome.lr``, so that no
            other optimizer will do; and no momentum, unless the rule ``knows_momentum``.
        knows_momentum: whether a rule that ``needs_sgd`` also bears ``Outcome.momentum``, though neither dampening nor
            Nesterov.
        changes_delta: whether ``finish`` changes ``Outcome.delta``.
        call: how it was made, such as ``fed_prox(mu=0.1)``; for logs only.
        instead: what to use where a rule ``needs_sgd`` and clients train with another optimizer; for messages.
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

    @property
    def operations(self) -> int:
        """For each element of a client's update: of the vectors that it receives, keeps, sends and changes besides."""
        sent = 2 * self.sends_message  # made, and added up
        return self.vectors_down - 1 + self.keeps_state + sent + self.changes_delta
