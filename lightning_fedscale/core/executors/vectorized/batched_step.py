"""The user's `training_step` as a function of the client's own tensors, for many clients at once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, Final, NamedTuple, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_fedscale.core.executors.shared_tensors import SharedTensors
from lightning_fedscale.core.executors.vectorized.captured_steps import CapturedSteps
from lightning_fedscale.core.executors.vectorized.graph_capture import CapturedStep, hide_trainer
from lightning_fedscale.core.executors.vectorized.metrics import MetricsPerClient
from lightning_fedscale.core.executors.vectorized.rng import ClientStreams, DrawPerClient
from lightning_fedscale.core.executors.vectorized.stacking import NotVectorizable, Opened
from lightning_fedscale.core.lightning.module_state import set_hook
from lightning_fedscale.core.user_code.guards import NoValues, Reads

_LOG_ARGUMENTS = list(inspect.signature(pl.LightningModule.log).parameters)[3:]
_PER_CLIENT: Final = object()
_LISTS = ("_flat_weights", "_flat_weight_refs")
_Results: TypeAlias = tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor]]


class Logged(NamedTuple):
    """One call of ``self.log``: its name, the values of all clients (or a metric object), its other arguments."""

    name: str
    values: Any
    options: dict[str, Any]


class StepResult(NamedTuple):
    """The result of `BatchedStep.run`, with one row for each client.

    Attributes:
        losses: the losses; None if ``training_step`` returned none.
        gradients: of the trainable parameters; None for unused parameters.
        buffers: the new values.
        logged: in the order of the calls.
    """

    losses: Tensor | None
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    logged: list[Logged]


class BatchedStep:
    """Runs one local batch of several clients at once: forward and backward pass under `torch.func.vmap`.

    The gradient is taken inside vmap, for each client: some operators (such as an embedding with ``padding_idx``)
    follow other rules backward than forward, and autograd outside of vmap would not know the clients.

    Args:
        trainer: the Trainer.
        shared: the module's tensors; every client has its own trainable parameters and buffers.

    Attributes:
        captured: the captured steps.
        ran_python: set when a step ran the module's code rather than a captured step.
        about_to_run_python: called just before that.
    """

    def __init__(self, trainer: pl.Trainer, shared: SharedTensors) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._takes_batch_idx = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
        self._draws: bool | None = None  # unknown before the first run
        self.captured = CapturedSteps(self._module)
        self.ran_python = False
        self.about_to_run_python: Callable[[], None] = lambda: None
        moving = [*shared.trainable, *shared.buffers]
        own = {id(tensor): i for i, tensor in enumerate(moving)}
        self._places = [(p.owner, p.name, p.tensor, own[id(p.tensor)]) for p in shared.bindings if id(p.tensor) in own]
        self._of = _described(shared)
        self._buffers = range(len(shared.trainable), len(moving))
        self._recurrent = [part for part in self._module.modules() if isinstance(part, nn.RNNBase)]
        self._metrics = MetricsPerClient(self._module, partial(self.captured.stop, "it calls a metric"))

    def is_of(self, shared: SharedTensors) -> bool:
        """Return whether ``shared`` has the same tensors in the same places."""
        return self._of == _described(shared)

    def run(
        self,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        batch: Opened,
        batch_idx: int,
        clients: Sequence[int],
        streams: ClientStreams,
        *,
        share: float = 1.0,
    ) -> StepResult:
        """Compute loss, gradients, buffers and logged values of one batch of every client.

        Args:
            parameters: stacked parameters.
            buffers: stacked buffers.
            batch: its tensors are stacked; everything else in it is the same for all clients.
            batch_idx: number of the batch within the client's round.
            clients: the rows' clients, by their number in ``streams``.
            streams: random streams of the clients.
            share: factor of the loss in the gradient.
        """
        tensors = batch.tensors
        key = self._key(len(clients), batch, share)
        if (captured := self.captured.find(key)) is not None:
            with self._trainer.precision_plugin.train_step_context():
                result: StepResult = captured(parameters, buffers, tensors, streams, clients)
            return result
        notes: list[Logged] = []
        everyone = self._vectorized(batch, share, notes)
        self.ran_python = True
        self.about_to_run_python()
        reads, before = (Reads(), streams.copy()) if self.captured.is_due(key) else (None, None)
        with self._trainer.precision_plugin.train_step_context(), _batched_kernels(parameters[0].device):
            with nullcontext() if reads is None else reads.watching():
                if self._draws is False:
                    results = everyone(batch_idx, parameters, buffers, tensors)
                else:
                    with DrawPerClient(streams, clients) as drawing:
                        results = everyone(batch_idx, parameters, buffers, tensors)
                    self._draws = drawing.noticed
            if reads is not None and before is not None:
                given = [*(p.detach() for p in parameters), *buffers, *tensors]
                counts = [len(parameters), len(buffers), len(tensors)]
                capture = partial(self._capture, everyone, results, notes, given, counts, before, clients)
                self.captured.add(key, capture, reads)
        return _result_of(results, notes)

    def _vectorized(self, batch: Opened, share: float, notes: list[Logged]) -> Callable[..., _Results]:
        """Return the step of all clients as a function of tensors; it adds what is logged to ``notes``."""
        taking_part: list[bool] = []

        def one(
            batch_idx: Any, parameters: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
            def step(parameters: list[Tensor]) -> tuple[Tensor, Any]:
                loss, new, values = self._local_step(parameters, buffers, batch.close(tensors), batch_idx, notes)
                found: Sequence[Tensor | None] = [None] * len(parameters)
                if loss and loss[0].requires_grad:
                    scaled = loss[0] if share == 1.0 else loss[0] * share
                    found = torch.autograd.grad(scaled, parameters, allow_unused=True)
                taking_part[:] = [gradient is not None for gradient in found]
                gradients = [gradient for gradient in found if gradient is not None]
                return torch.zeros(()), (loss, gradients, new, values)

            # vjp is used only for its tape: the gradient was taken inside, where unused parameters are known.
            results: Any = vjp(step, parameters, has_aux=True)
            return results[2]  # type: ignore[no-any-return]

        def everyone(
            batch_idx: Any, parameters: Sequence[Tensor], buffers: Sequence[Tensor], tensors: list[Tensor]
        ) -> _Results:
            notes.clear()
            randomness = "error" if self._draws is False else "different"
            # Not a partial, which some torch releases would print with the number of the batch.
            mapped = vmap(lambda *given: one(batch_idx, *given), randomness=randomness)
            losses, found, new, values = mapped([p.detach() for p in parameters], list(buffers), tensors)
            if any(loss.requires_grad for loss in losses):  # out here, autograd does not track the clients' parameters
                raise NotVectorizable("training_step uses a parameter through a second reference, as in a list")
            following = iter(found)
            losses = [loss.detach() for loss in losses]
            return losses, [next(following) if part else None for part in taking_part], new, values

        return everyone

    def _capture(
        self,
        function: Callable[..., Any],
        results: _Results,
        notes: list[Logged],
        given: list[Tensor],
        counts: list[int],
        streams: ClientStreams,
        clients: Sequence[int],
    ) -> Callable[..., StepResult]:
        """Capture a step and return its replay; raise an error if the replay is not bit-identical."""
        lengths = [len(part) for part in results]
        kept = list(notes)

        def flat(*given: Tensor) -> list[Tensor | None]:
            parameters, buffers, tensors = _split(given, counts)
            with NoValues():  # type: ignore[no-untyped-call]
                return [value for part in function(nothing, parameters, buffers, tensors) for value in part]

        try:
            with hide_trainer(self._module) as nothing:
                captured = CapturedStep(flat, [tensor.clone() for tensor in given], given[0].device)
        finally:
            notes[:] = kept
        # Some inputs, such as many zeros, may give bit-identical results by chance; noise does not.
        own = torch.Generator(given[0].device).manual_seed(0)
        noise = [torch.empty_like(t).normal_(generator=own) if t.is_floating_point() else t for t in given]

        def replayed(tensors: Sequence[Tensor]) -> list[Tensor | None]:
            return captured.replay([tensor.clone() for tensor in tensors], streams.copy(), clients)

        expected = [value for part in results for value in part], replayed(noise)

        def is_same() -> bool:
            pairs = zip((given, noise), expected, strict=True)
            return all(all(map(_same_bits, replayed(tensors), values)) for tensors, values in pairs)

        if not is_same():
            raise RuntimeError("the captured step gives other bits")
        captured.improve(is_same)

        def replay(
            parameters: Sequence[Tensor],
            buffers: Sequence[Tensor],
            tensors: Sequence[Tensor],
            streams: ClientStreams,
            clients: Sequence[int],
        ) -> StepResult:
            given = [*(p.detach() for p in parameters), *buffers, *tensors]
            return _result_of(_split(captured.replay(given, streams, clients), lengths), kept)

        return replay

    def _key(self, width: int, batch: Opened, share: float) -> Any:
        """Return everything besides the module on which a captured step depends; None if it cannot be compared."""
        guard = batch.guard()
        return None if guard is None else (width, share, guard)

    def _local_step(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor], batch: Any, batch_idx: int, notes: list[Logged]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Run one client's step under vmap; return its loss (or none), new buffers, and logged tensors."""
        values: list[Tensor] = []

        def note(logged: Logged) -> None:
            if isinstance(logged.values, Tensor):
                values.append(logged.values)
                logged = logged._replace(values=_PER_CLIENT)
            notes.append(logged)

        holding = self._holding([*parameters, *(buffer.clone() for buffer in buffers)])
        with holding as now, self._metrics.called_in_turn(), logging_to(self._module, note):
            arguments = (batch, batch_idx) if self._takes_batch_idx else (batch,)
            output = self._module.training_step(*arguments)
            new = [now(i) for i in self._buffers]
        loss = loss_of(output)
        return [] if loss is None else [loss.reshape(())], [buffer.detach() for buffer in new], values

    @contextmanager
    def _holding(self, tensors: Sequence[Tensor]) -> Iterator[Callable[[int], Tensor]]:
        """Replace the module's tensors by these; yield a function from a tensor's number to its present value."""
        seat: dict[int, tuple[Any, str]] = {}
        # Recurrent layers also keep their weights in lists, which they update when they run.
        lists = [(part, name, vars(part)[name]) for part in self._recurrent for name in _LISTS if name in vars(part)]
        for owner, name, _, i in self._places:
            owner[name] = tensors[i]
            seat[i] = owner, name
        try:
            yield lambda i: seat[i][0][seat[i][1]]
        finally:
            for owner, name, tensor, _ in self._places:
                owner[name] = tensor
            for part, name, weights in lists:
                vars(part)[name] = weights


@contextmanager
def logging_to(module: pl.LightningModule, note: Callable[[Logged], None]) -> Iterator[None]:
    """Redirect values that ``training_step`` logs to ``note``, tensors without their graph."""

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        options = {**dict(zip(_LOG_ARGUMENTS, args, strict=False)), **kwargs}
        note(Logged(name, value.detach() if isinstance(value, Tensor) else value, options))

    outside = {name: vars(module)[name] for name in ("log",) if name in vars(module)}
    object.__setattr__(module, "log", log)
    set_hook(module, "training_step")
    try:
        yield
    finally:
        set_hook(module, None)
        object.__delattr__(module, "log")
        vars(module).update(outside)


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in the output of ``training_step``; None if there is none."""
    loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else output
    return loss


def _described(shared: SharedTensors) -> tuple[Any, ...]:
    bindings = (*shared.bindings, *shared.untouched)
    places = [(id(p.owner), p.name, id(p.tensor), p.tensor.shape, p.tensor.dtype) for p in bindings]
    return places, [id(t) for t in shared.trainable], [id(t) for t in shared.buffers]


@contextmanager
def _batched_kernels(device: torch.device) -> Iterator[None]:
    """Choose operators that process all clients at once, where vmap would otherwise loop over them."""
    if device.type != "cpu":
        yield
        return
    # The comparison of times accounts for other operators.
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
