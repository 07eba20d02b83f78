"""How long messages take: the alpha-beta costs of the ways in which workers exchange a model.

A message of M bytes over a link costs ``latency + M / bandwidth``. In the formulae a is the latency in seconds, b the
seconds per byte, N the number of workers, and logarithms have base 2. Source: table I of Tyagi's
AdOpT paper, whose measurements of a ring of eight workers they meet within 3 %.
"""

from __future__ import annotations

import math


def parameter_server(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """All workers push to one server and pull from it, whose link carries them all: ``2 a + 2 (N - 1) M b``.

    Args:
        message_bytes: size of the message.
        workers: how many take part.
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
    """Parts of the message go around a ring twice: ``2 (N - 1) a + 2 (N - 1) / N M b``; see `parameter_server`."""
    return 2 * (workers - 1) * latency + 2 * (workers - 1) / workers * message_bytes / bandwidth


def tree_all_reduce(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """Up a tree and down again: ``2 log N (a + M b)``; see `parameter_server`."""
    return 2 * math.log2(workers) * (latency + message_bytes / bandwidth)


def broadcast(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """From one to all along a tree: ``log N (a + M b)``; see `parameter_server`."""
    return math.log2(workers) * (latency + message_bytes / bandwidth)


def all_gather(message_bytes: float, workers: int, latency: float, bandwidth: float) -> float:
    """Every worker gets every message: ``a log N + (N - 1) M b``; see `parameter_server`."""
    return latency * math.log2(workers) + (workers - 1) * message_bytes / bandwidth


def top_k_all_gather(message_bytes: float, workers: int, latency: float, bandwidth: float, ratio: float) -> float:
    """`all_gather` of a share ``ratio`` of the values, each with its index: ``a log N + 2 (N - 1) c M b``."""
    return all_gather(2 * ratio * message_bytes, workers, latency, bandwidth)


def ar_top_k_ring(message_bytes: float, workers: int, latency: float, bandwidth: float, ratio: float) -> float:
    """One worker broadcasts its indices, a ring adds up values: `broadcast` and `ring_all_reduce` of ``c M`` bytes."""
    part = ratio * message_bytes, workers, latency, bandwidth
    return broadcast(*part) + ring_all_reduce(*part)


def ar_top_k_tree(message_bytes: float, workers: int, latency: float, bandwidth: float, ratio: float) -> float:
    """As `ar_top_k_ring` with a tree: ``3 log N (a + c M b)``."""
    part = ratio * message_bytes, workers, latency, bandwidth
    return broadcast(*part) + tree_all_reduce(*part)


def star(message_bytes: float, up: float, down: float, latency: float, answer_bytes: float | None = None) -> float:
    """A client fetches a message from the server and sends one back over its own link: ``2 a + M / down + A / up``.

    Clients do not slow each other down: the server's link is taken to be wider than all of theirs together.

    Args:
        message_bytes: size of the server's message.
        up: bytes per second towards the server.
        down: bytes per second from it.
        latency: seconds.
        answer_bytes: size of the client's message; None is the server's.

    Returns:
        Seconds.

    Example:
        >>> star(1e6, up=1e6, down=4e6, latency=0.05)
        1.35
    """
    return 2 * latency + message_bytes / down + (message_bytes if answer_bytes is None else answer_bytes) / up
