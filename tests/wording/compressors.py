"""Messages of `compressors`."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lightning_fedscale.compressors import (
    adaptive,
    error_feedback,
    identity,
    phase_driven,
    power_sgd,
    qsgd,
    random_k,
    sign,
    top_k,
)
from lightning_fedscale.compressors.registry import by_name
from tests.wording import Row

PHASE = SimpleNamespace(critical=True)


ROWS: list[Row] = [
    Row(
        lambda: by_name("topk"),
        ValueError,
        "compressor='topk' is not known. Did you mean 'top_k'? Known: 'identity', 'top_k', 'random_k', 'qsgd', "
        "'sign', 'power_sgd', 'uniform_quantization', 'adaptive', 'error_feedback', 'phase_driven'.",
    ),
    Row(
        lambda: by_name("error_feedback"),
        ValueError,
        "compressor='error_feedback' needs compressor: pass an object, "
        "compressors.error_feedback(compressors.top_k(0.1)).",
    ),
    Row(
        lambda: by_name("phase_driven"),
        ValueError,
        "compressor='phase_driven' needs phase, critical, otherwise: pass an object, phase_driven(phase=..., "
        "critical=..., otherwise=...).",
    ),
    Row(
        lambda: top_k(0.1, k=3),
        ValueError,
        "ratio=0.1 and k=3: pass only one of them.",
    ),
    Row(
        lambda: top_k(20),
        ValueError,
        "ratio=20: pass a share of the elements in (0, 1], such as 0.01, or their number as k=...",
    ),
    Row(
        lambda: top_k(k=0),
        ValueError,
        "k=0: pass an integer of at least 1.",
    ),
    Row(
        lambda: random_k(0.1, unbiased=1),  # type: ignore[arg-type]
        TypeError,
        "unbiased=1: pass True or False.",
    ),
    Row(
        lambda: qsgd(0),
        ValueError,
        "levels=0: pass an integer from 1 to 65536.",
    ),
    Row(
        lambda: qsgd(per_tensor=2),  # type: ignore[arg-type]
        TypeError,
        "per_tensor=2: pass True or False.",
    ),
    Row(
        lambda: power_sgd(0),
        ValueError,
        "rank=0: pass an integer of at least 1.",
    ),
    Row(
        lambda: power_sgd(min_compression=0.5),
        ValueError,
        "min_compression=0.5: pass a number of at least 1, such as 2.",
    ),
    Row(
        lambda: error_feedback("top_k"),  # type: ignore[arg-type]
        TypeError,
        "compressor='top_k': pass a compressor such as compressors.top_k(0.01).",
    ),
    Row(
        lambda: error_feedback(error_feedback(sign())),
        ValueError,
        "error_feedback(error_feedback(sign())): it already keeps its errors: remove one error_feedback.",
    ),
    Row(
        lambda: error_feedback(qsgd(4)),
        ValueError,
        "error_feedback(qsgd(4)): its errors can be larger than the update, so they would grow without bound; "
        "they average out without feedback: remove error_feedback.",
    ),
    Row(
        lambda: error_feedback(random_k(0.1)),
        ValueError,
        "error_feedback(random_k(0.1)): its errors can be larger than the update, so they would grow without "
        "bound; they average out without feedback: remove error_feedback, or pass unbiased=False.",
    ),
    Row(
        lambda: phase_driven(True, sign(), sign()),  # type: ignore[arg-type]
        TypeError,
        "phase=True: pass an object with the attribute critical, such as a CriticalPhase callback.",
    ),
    Row(
        lambda: phase_driven(PHASE, error_feedback(sign()), sign()),
        ValueError,
        "phase_driven(error_feedback(sign())): its errors would not be sent while the other compressor is in "
        "use: apply error_feedback last, error_feedback(phase_driven(...)).",
    ),
    Row(
        lambda: adaptive(3),  # type: ignore[arg-type]
        TypeError,
        "compress=3: pass a function such as lambda factor: top_k(ratio=1 / factor).",
    ),
    Row(
        lambda: adaptive(lambda factor: power_sgd()),
        ValueError,
        "compress: it returned power_sgd(2), which has a state: return one without, such as top_k.",
    ),
    Row(
        lambda: adaptive(threshold=1.5),
        ValueError,
        "threshold=1.5: pass the least share of the squared norm to send, in (0, 1].",
    ),
    Row(
        lambda: adaptive(lowest=1),
        ValueError,
        "lowest=1: pass a compression factor above 1, at most highest.",
    ),
    Row(
        lambda: identity().decode(b"123", {"w": torch.zeros(1)}),
        ValueError,
        "payload has 3 bytes: a message of identity() for these parameters has 4: pass a message of the same "
        "compressor and model.",
    ),
]
