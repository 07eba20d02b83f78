"""The user's `training_step` as a function of the client's own tensors, for many clients at once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Final, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torchmetrics import Metric, MetricCollection

from lightning_fedscale.executors.capture import Recording, unseen
from lightning_fedscale.executors.draws import ClientStreams, DrawPerClient
from lightning_fedscale.executors.exchange import Exchange

_LOG_ARGUMENTS = list(inspect.signature(pl.LightningModule.log).parameters)[3:]
_PER_CLIENT: Final = object()
# Recording costs about as much as this many steps.
_RECORD_AT = 20
_FORGOTTEN_TOO_OFTEN = 3


class Obstacle(RuntimeError):
    """Why clients of this module cannot train side by side."""


class Logged(NamedTuple):
    """One call of ``self.log``: its name, the values of all clients (or a metric object), its other arguments."""

    name: str
    values: Any
    options: dict[str, Any]


class StepResult(NamedTuple):
    """What `SideBySide.run` returns, one row for each client.

    Attributes:
        losses: None if ``training_step`` returned none.
        gradients: of the trainable parameters, None for those that took no part.
        buffers: new values.
        logged: in the order of the calls.
    """

    losses: Tensor | None
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    logged: list[Logged]


class SideBySide:
    """Runs one local batch of several clients in one go: forward under `torch.func.vmap`, backward as ever.

    Args:
        trainer: the Trainer.
        exchange: the module's tensors: every client has its own of the trainable parameters and the buffers.

    Attributes:
        record_at: how many times a step of one form is taken before it is recorded.
        ran_python: set when a step ran the module's own code, rather than a recording.
    """

    def __init__(self, trainer: pl.Trainer, exchange: Exchange) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._takes_batch_idx = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
        self._draws: bool | None = None  # unknown before the first run
        self.record_at = _RECORD_AT
        self.ran_python = False
        self._recordable = True
        self._recorded: dict[Any, Callable[..., StepResult]] = {}
        self._uses: dict[Any, int] = {}
        self._specs: list[TreeSpec] = []  # seen so far; in older releases of torch they have no hash
        self._forgotten = 0
        moving = [*exchange.trainable, *exchange.buffers]
        own = {id(tensor): i for i, tensor in enumerate(moving)}
        self._places = [(p.owner, p.name, p.tensor, own[id(p.tensor)]) for p in exchange.places if id(p.tensor) in own]
        self._parameters = exchange.trainable
        places = [(id(place.owner), place.name, id(place.tensor)) for place in exchange.places]
        self._of = places, list(own), len(exchange.trainable)
        self._buffers = range(len(exchange.trainable), len(moving))
        members = {
            id(metric)
            for part in self._module.modules()
            if isinstance(part, MetricCollection)
            for metric in part.modules()
            if metric is not part
        }
        self._metrics: list[Metric | MetricCollection] = [
            part
            for part in self._module.modules()
            if isinstance(part, Metric | MetricCollection) and id(part) not in members
        ]

    def is_of(self, exchange: Exchange) -> bool:
        """Whether ``exchange`` is about the same tensors in the same places."""
        moving = [*exchange.trainable, *exchange.buffers]
        places = [(id(place.owner), place.name, id(place.tensor)) for place in exchange.places]
        return self._of == (places, [id(tensor) for tensor in moving], len(exchange.trainable))

    def run(
        self,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        batch: Any,
        batch_idx: int,
        clients: Sequence[int],
        streams: ClientStreams,
        *,
        share: float = 1.0,
    ) -> StepResult:
        """Loss, gradients, buffers and logged values of one batch of every client.

        Args:
            parameters: stacked, leaves that require gradients.
            buffers: stacked.
            batch: leaves are stacked; others are shared.
            batch_idx: number of the batch within the client's round.
            clients: the rows' clients, by their number in ``streams``.
            streams: random streams of the clients.
            share: the loss's factor in the gradient.
        """
        leaves, spec = tree_flatten(batch)
        which = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in which]
        form = self._form(len(clients), leaves, spec, share)
        if (recorded := self._recorded.get(form)) is not None:
            return recorded(parameters, buffers, tensors, streams, clients)
        notes: list[Logged] = []

        def one(
            batch_idx: Any, parameters: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
            own = list(leaves)
            for i, tensor in zip(which, tensors, strict=True):
                own[i] = tensor
            return self._local_step(parameters, buffers, tree_unflatten(own, spec), batch_idx, notes)

        def everyone(
            batch_idx: Any, parameters: Sequence[Tensor], buffers: Sequence[Tensor], tensors: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor]]:
            notes.clear()
            randomness = "error" if self._draws is False else "different"
            # Not a partial, which some releases of torch would print with the number of the batch.
            mapped = vmap(lambda *given: one(batch_idx, *given), randomness=randomness)
            losses, new, values = mapped(list(parameters), list(buffers), tensors)
            gradients: list[Tensor | None] = [None] * len(parameters)
            if losses and losses[0].requires_grad:
                total = losses[0].sum() if share == 1.0 else losses[0].sum() * share
                if self._draws is None:
                    self._check_references(total)
                gradients = list(torch.autograd.grad(total, parameters, allow_unused=True))
            return [loss.detach() for loss in losses], gradients, new, values

        self.ran_python = True
        self._uses[form] = uses = self._uses.get(form, 0) + 1
        before = streams.copy() if form and uses == self.record_at and self._recordable else None
        with self._trainer.precision_plugin.train_step_context(), _batched_kernels(parameters[0].device):
            if self._draws is False:
                results = everyone(batch_idx, parameters, buffers, tensors)
            else:
                with DrawPerClient(streams, clients) as drawing:
                    results = everyone(batch_idx, parameters, buffers, tensors)
                self._draws = drawing.noticed
            if before is not None:
                self._record(form, everyone, results, notes, parameters, buffers, tensors, before, clients)
        return _result_of(results, notes)

    def _check_references(self, total: Tensor) -> None:
        """The module's own parameters should have had no part in it."""
        shared = [parameter for parameter in self._parameters if parameter.requires_grad]
        gradients = torch.autograd.grad(total, shared, allow_unused=True, retain_graph=True)
        if any(gradient is not None for gradient in gradients):
            raise Obstacle("training_step uses a parameter by a second reference, past the module")

    def _record(
        self,
        form: Any,
        function: Callable[..., Any],
        results: tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor]],
        notes: list[Logged],
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        tensors: list[Tensor],
        streams: ClientStreams,
        clients: Sequence[int],
    ) -> None:
        """Record a step that has been taken often enough, if that is the same to the last bit."""
        counts = [len(parameters), len(buffers), len(tensors)]
        lengths = [len(part) for part in results]
        kept = list(notes)

        def flat(*given: Tensor) -> list[Tensor | None]:
            parameters, buffers, tensors = _split(given, counts)
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            return [value for part in function(nothing, leaves, buffers, tensors) for value in part]

        given = [*(p.detach() for p in parameters), *buffers, *tensors]
        try:
            with unseen(self._module) as nothing:
                recording = Recording(flat, [tensor.clone() for tensor in given], parameters[0].device)
            expected = [value for part in results for value in part]

            def is_same() -> bool:
                again = recording.replay([tensor.clone() for tensor in given], streams.copy(), clients)
                return all(map(_same_bits, again, expected))

            same = is_same()
            if same:
                recording.improve(is_same)
        except Exception:
            same = False
        notes[:] = kept
        if not same:
            self._recordable = False
            return

        def replay(
            parameters: Sequence[Tensor],
            buffers: Sequence[Tensor],
            tensors: Sequence[Tensor],
            streams: ClientStreams,
            clients: Sequence[int],
        ) -> StepResult:
            given = [*(p.detach() for p in parameters), *buffers, *tensors]
            return _result_of(_split(recording.replay(given, streams, clients), lengths), kept)

        self._recorded[form] = replay

    def _form(self, width: int, leaves: Sequence[Any], spec: TreeSpec, share: float) -> Any:
        """What a recording depends on besides the module."""
        if spec not in self._specs:
            self._specs.append(spec)
        described = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        try:
            form = (width, share, self._specs.index(spec), *described)
            hash(form)
        except TypeError:
            return None
        return form

    def forget_recordings(self) -> None:
        """What was recorded does not hold any more."""
        self._recorded, self._uses = {}, {}
        self._forgotten += 1
        if self._forgotten >= _FORGOTTEN_TOO_OFTEN:
            self._recordable = False

    def _local_step(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor], batch: Any, batch_idx: int, notes: list[Logged]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of one client, as vmap sees it: loss (or none), buffers afterwards, logged tensors."""
        values: list[Tensor] = []

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            options = {**dict(zip(_LOG_ARGUMENTS, args, strict=False)), **kwargs}
            if isinstance(value, Tensor):
                values.append(value.detach())
                value = _PER_CLIENT
            notes.append(Logged(name, value, options))

        with self._holding([*parameters, *(buffer.clone() for buffer in buffers)]) as now, self._standing_in(log):
            arguments = (batch, batch_idx) if self._takes_batch_idx else (batch,)
            output = self._module.training_step(*arguments)
            new = [now(i) for i in self._buffers]
        loss: Any = output["loss"] if isinstance(output, dict) else output
        return [] if loss is None else [loss.reshape(())], [buffer.detach() for buffer in new], values

    @contextmanager
    def _holding(self, tensors: Sequence[Tensor]) -> Iterator[Callable[[int], Tensor]]:
        """The module has these tensors in place of its own; what it puts in their place can be read."""
        seat: dict[int, tuple[Any, str]] = {}
        for owner, name, _, i in self._places:
            owner[name] = tensors[i]
            seat[i] = owner, name
        try:
            yield lambda i: seat[i][0][seat[i][1]]
        finally:
            for owner, name, tensor, _ in self._places:
                owner[name] = tensor

    @contextmanager
    def _standing_in(self, log: Callable[..., None]) -> Iterator[None]:
        """``self.log`` and metrics understand values of many clients."""
        module = self._module
        outside = {name: vars(module)[name] for name in ("log",) if name in vars(module)}
        object.__setattr__(module, "log", log)
        patched: list[tuple[Any, str, Any]] = []
        for metric in self._metrics:
            for name in ("forward", "update"):
                original = getattr(metric, name)
                patched.append((metric, name, vars(metric).get(name, patched)))
                object.__setattr__(metric, name, _ForEachClient(self, original))
        module._current_fx_name = "training_step"
        try:
            yield
        finally:
            module._current_fx_name = None
            for metric, name, before in patched:
                if before is patched:
                    object.__delattr__(metric, name)
                else:
                    object.__setattr__(metric, name, before)
            object.__delattr__(module, "log")
            vars(module).update(outside)


@contextmanager
def _batched_kernels(device: torch.device) -> Iterator[None]:
    """Operators that work on all clients at once, where vmap would otherwise take one after the other."""
    if device.type != "cpu":
        yield
        return
    # Of the rest, the comparison of times takes account.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def _result_of(results: Sequence[Sequence[Any]], notes: Sequence[Logged]) -> StepResult:
    losses, gradients, buffers, values = results
    stacked = iter(values)
    logged = [note._replace(values=next(stacked)) if note.values is _PER_CLIENT else note for note in notes]
    return StepResult(losses[0] if losses else None, list(gradients), list(buffers), logged)


def _split(values: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    ends = list(accumulate(lengths))
    return [list(values[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def _same_bits(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


class _ForEachClient:
    """A metric's method that, given values of many clients, is called for one client after the other."""

    def __init__(self, owner: SideBySide, method: Callable[..., Any]) -> None:
        self._owner = owner
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(map(torch._C._functorch.is_batchedtensor, tensors)):
            return self._method(*args, **kwargs)
        self._owner._recordable = False  # what a metric does is not only a matter of tensors
        forms: list[TreeSpec] = []

        def call_once(tensors: Sequence[Tensor]) -> list[Tensor]:
            given = iter(tensors)
            own = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            own_args, own_kwargs = tree_unflatten(own, spec)
            values, form = tree_flatten(self._method(*own_args, **own_kwargs))
            forms.append(form)
            # A function of tensors must return one; `update` has nothing to say.
            return [torch.zeros(()) if value is None else torch.as_tensor(value) for value in values]

        results = _PerClientCall.apply(call_once, *tensors)  # type: ignore[no-untyped-call]
        return tree_unflatten(list(results), forms[0])


class _PerClientCall(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[[Sequence[Tensor]], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        rows = [
            function([t if dim is None else t.select(dim, row) for t, dim in zip(tensors, in_dims[1:], strict=True)])
            for row in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return stacked, (0,) * len(stacked)
