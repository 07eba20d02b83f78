"""Random numbers for vectorized clients: each draws from its own stream, as in sequential training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fedscale.utils import randomness


class ClientStreams:
    """The random streams of the clients of a wave.

    A stream is the state of Python's, numpy's and torch's global generators that the client would have in sequential
    training. It is set up when the client first draws.

    Args:
        seed_of: returns a client's seed; called when the client first draws.
        device: the clients' device.
    """

    def __init__(self, seed_of: Callable[[int], int], device: torch.device) -> None:
        self._seed_of = seed_of
        self._device = device
        self._generators: dict[tuple[int, str], torch.Generator] = {}
        self._hosts: dict[int, tuple[Any, Any]] = {}

    def begin(self, client: int, state: randomness.GlobalState) -> None:
        """Set the state of a stream from which the client has already drawn."""
        self._set(client, state)

    def copy(self) -> ClientStreams:
        """Return independent streams that continue from the present state."""
        other = ClientStreams(self._seed_of, self._device)
        other._generators = {key: generator.clone_state() for key, generator in self._generators.items()}
        other._hosts = dict(self._hosts)
        return other

    def generator(self, client: int, device: torch.device) -> torch.Generator:
        """Return the client's torch generator on a type of device."""
        key = client, device.type
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self._seed_of(client))
        return self._generators[key]

    @contextmanager
    def of(self, client: int) -> Iterator[None]:
        """Use this client's stream in the global generators inside the context, and restore them afterwards."""
        outside = randomness.capture(self._device)
        if client not in self._hosts:  # Python's and numpy's streams begin here; torch's may have begun
            randomness.seed_globals(self._seed_of(client), torch.device("cpu"))
            begun = randomness.capture(torch.device("cpu"))
            self._hosts[client] = begun.python, begun.numpy
        cpu = self.generator(client, torch.device("cpu")).get_state()
        device = None if outside.device is None else self.generator(client, self._device).get_state()
        randomness.restore(randomness.GlobalState(*self._hosts[client], cpu, device), self._device)
        try:
            yield
        finally:
            self._set(client, randomness.capture(self._device))
            randomness.restore(outside, self._device)

    @contextmanager
    def of_operator(self, client: int, device: torch.device) -> Iterator[None]:
        """Use this client's stream in the default generator of a device, which is all that an operator draws from.

        This is much cheaper than `of`: on a GPU no state is copied, and nothing waits.
        """
        own, default = self.generator(client, device), default_generator(device)
        if device.type == "cpu":
            outside = default.get_state()
            default.set_state(own.get_state())
            try:
                yield
            finally:
                own.set_state(default.get_state())
                default.set_state(outside)
            return
        shared = default.graphsafe_get_state()
        default.graphsafe_set_state(own)  # it now advances the state of the client's generator
        try:
            yield
        finally:
            default.graphsafe_set_state(shared)

    def _set(self, client: int, state: randomness.GlobalState) -> None:
        self._hosts[client] = state.python, state.numpy
        self.generator(client, torch.device("cpu")).set_state(state.cpu)
        if state.device is not None:
            self.generator(client, self._device).set_state(state.device)


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator from which operators on a device draw by default."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def is_random(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator draws random numbers when it is called with these arguments.

    The fused kernels of attention and recurrent layers count as random to torch even without dropout.
    """
    if not isinstance(func, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    place = _place_of_dropout(func)
    if place is None:
        return True
    number, name, default = place
    dropout = args[number] if number < len(args) else kwargs.get(name, default)
    return bool(dropout != 0)


@cache
def _place_of_dropout(func: Any) -> tuple[int, str, Any] | None:
    """Return the number, name and default of the argument without which an operator draws nothing; None without it."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout"):
            return number, argument.name, argument.default_value
    return None


class DrawPerClient(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes every client draw from its own stream below `torch.func.vmap(..., randomness="different")`.

    vmap draws the random numbers of all clients at once, with the clients along the first dimension.

    Args:
        streams: the clients' streams.
        clients: the vectorized clients, in the order of the first dimension.

    Attributes:
        noticed: whether anything was drawn.
    """

    def __init__(self, streams: ClientStreams, clients: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noticed = False
        self._streams = streams
        self._clients = clients

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_random(func, args, kwargs or {}):
            return func(*args, **kwargs or {})
        self.noticed = True
        return draw_per_client(self._streams, self._clients, func, *args, **kwargs or {})


def draw_per_client(streams: ClientStreams, clients: Sequence[int], func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a random operator once for every client, under its stream, on its part of the first dimension.

    Raises:
        NotImplementedError: if the arguments do not have the clients along the first dimension.
    """
    count = len(clients)

    def part(value: Any, row: int) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0 or value.shape[0] != count:
                raise NotImplementedError(f"{func} draws for several clients in one go")
            return value[row]
        return value

    # Factories take the size as a list, which begins with the number of clients.
    size = next((i for i, argument in enumerate(func._schema.arguments) if argument.name == "size"), None)
    if size is not None and (not args[size] or args[size][0] != count):
        raise NotImplementedError(f"{func} draws the same size for all clients in one go")
    if size is None and not any(isinstance(arg, Tensor) for arg in args):
        raise NotImplementedError(f"{func} draws for one client at a time")
    generator = _place_for_generator(func)
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), kwargs.get("device") or torch.device("cpu"))
    parts = []
    for row, client in enumerate(clients):
        own = [part(arg, row) for arg in args]
        if size is not None:
            own[size] = list(args[size][1:])
        if generator is not None:
            own_kwargs = {**kwargs, "generator": streams.generator(client, device)}
            parts.append(generator(*own, **own_kwargs))
        else:
            with streams.of_operator(client, device):
                parts.append(func(*own, **kwargs))
    if func._schema.is_mutable:
        return args[0]
    if isinstance(parts[0], tuple):
        return tuple(torch.stack(column) for column in zip(*parts, strict=True))
    return torch.stack(parts)


@cache
def _place_for_generator(func: Any) -> Any:
    """Return the overload of an operator that takes a generator; None if there is none."""
    packet = func.overloadpacket
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        arguments = overload._schema.arguments
        names = [argument.name for argument in arguments if argument.name != "generator"]
        if len(names) < len(arguments) and names == [
            argument.name for argument in func._schema.arguments if argument.name != "generator"
        ]:
            return overload
    return None
