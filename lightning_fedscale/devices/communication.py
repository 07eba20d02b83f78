"""Alpha-beta costs of communication patterns by which workers exchange a model.

A message of M bytes over a link costs ``latency + M / bandwidth``. In the formulae a is the latency in seconds, b the
seconds per byte, N the number of workers, and logarithms have base 2. Source: table I of Tyagi's AdOpT paper; they
agree with its measurements of a ring of eight workers within 3 %.
"""

from __future__ import annotations

import math


def parameter_server(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """Return the seconds to push to and pull from one server with a shared link: ``2 a + 2 (N - 1) M b``.

    Args:
        message_bytes: size of the message.
        workers: number of workers.
        latency: seconds.
        bandwidth: bytes per second.

    Returns:
        Seconds.

    Example:
        >>> parameter_server(1e6, workers=5, latency=0.01, bandwidth=1e8)
        0.1
    """
    return 2 * latency + 2 * (workers - 1) * message_bytes / bandwidth


def ring_all_reduce(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """Return the seconds of a ring all-reduce: ``2 (N - 1) a + 2 (N - 1) / N M b``; see `parameter_server`."""
    return 2 * (workers - 1) * latency + 2 * (workers - 1) / workers * message_bytes / bandwidth


def tree_all_reduce(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """Return the seconds of a tree all-reduce: ``2 log N (a + M b)``; see `parameter_server`."""
    return 2 * math.log2(workers) * (latency + message_bytes / bandwidth)


def broadcast(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """Return the seconds of a broadcast along a tree: ``log N (a + M b)``; see `parameter_server`."""
    return math.log2(workers) * (latency + message_bytes / bandwidth)


def all_gather(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """Return the seconds of an all-gather: ``a log N + (N - 1) M b``; see `parameter_server`."""
    return latency * math.log2(workers) + (workers - 1) * message_bytes / bandwidth


def top_k_all_gather(message_bytes: float, workers: int, latency: float, bandwidth: float, ratio: float) -> float:
    """Return the seconds to `all_gather` a share c (``ratio``) with indices: ``a log N + 2 (N - 1) c M b``."""
    return all_gather(2 * ratio * message_bytes, workers, latency, bandwidth)


def ar_top_k_ring(message_bytes: float, workers: int, latency: float, bandwidth: float, ratio: float) -> float:
    """Return the seconds to `broadcast` one worker's indices and `ring_all_reduce` the values, ``c M`` bytes each."""
    part = ratio * message_bytes, workers, latency, bandwidth
    return broadcast(*part) + ring_all_reduce(*part)


def ar_top_k_tree(message_bytes: float, workers: int, latency: float, bandwidth: float, ratio: float) -> float:
    """Return the seconds of `ar_top_k_ring` with a tree instead: ``3 log N (a + c M b)``."""
    part = ratio * message_bytes, workers, latency, bandwidth
    return broadcast(*part) + tree_all_reduce(*part)


def star(message_bytes: float, up: float, down: float, latency: float, answer_bytes: float | None = None) -> float:
    """Return the seconds of a client's downlink and uplink over its own link: ``2 a + M / down + A / up``.

    Clients do not slow each other down: the server's link is assumed to be wider than all of theirs together.

    Args:
        message_bytes: size of the server's message.
        up: uplink bytes per second.
        down: downlink bytes per second.
        latency: seconds.
        answer_bytes: size of the client's message; None means the same size.

    Returns:
        Seconds.

    Example:
        >>> star(1e6, up=1e6, down=4e6, latency=0.05)
        1.35
    """
    return 2 * latency + message_bytes / down + (message_bytes if answer_bytes is None else answer_bytes) / up
