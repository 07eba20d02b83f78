"""Messages of `callbacks`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_fedscale import phases
from lightning_fedscale.callbacks import ClientMetrics, ComputeAccounting, CriticalPhase, MaxBatchProbe, ServerEMA
from lightning_fedscale.callbacks.compute_accounting.coverage import OperatorCoverage
from lightning_fedscale.callbacks.compute_accounting.limit import ComputeLimit
from lightning_fedscale.callbacks.compute_accounting.tokens import TokenCounter
from lightning_fedscale.callbacks.critical_phase.client_steps import ClientStepWatch
from lightning_fedscale.callbacks.critical_phase.gradients import GradientsExpected
from lightning_fedscale.callbacks.critical_phase.rounds import RoundWatch
from lightning_fedscale.callbacks.critical_phase.steps import StepWatch
from lightning_fedscale.callbacks.critical_phase.update_scaling import UpdateScaling
from lightning_fedscale.callbacks.max_batch_probe.agreement import explained
from lightning_fedscale.callbacks.max_batch_probe.rank_probe import check_whole_module
from lightning_fedscale.devices import CATALOGUE
from lightning_fedscale.devices.profiling.operator_counter import UNKNOWN, Operator
from lightning_fedscale.partitioners import IidPartitioner
from tests.wording import Row

TRAINER: Any = SimpleNamespace(
    strategy=SimpleNamespace(), lightning_module=nn.Identity(), accumulate_grad_batches=1, global_step=0
)
UNCOUNTED: Any = SimpleNamespace(steps=4, training_flops=0.0)


def _raise(error: Exception) -> None:
    raise error


def _check(kind: Any, noise: str = "diagonal", **options: Any) -> None:
    """Check arguments of `CriticalPhase` with what observes steps or rounds."""
    kind(CriticalPhase(**options)._judge).check(TRAINER, TRAINER.lightning_module, noise)


def _fft() -> OperatorCoverage:
    coverage = OperatorCoverage()
    coverage.operators["aten.fft"] = Operator(UNKNOWN)
    return coverage


ROWS: list[Row] = [
    # CriticalPhase
    Row(
        lambda: CriticalPhase(action="noise"),
        ValueError,
        "target_batch=None: action='noise' needs it: pass the number of samples whose noise is wanted.",
    ),
    Row(
        lambda: CriticalPhase(target_batch=32),
        ValueError,
        "target_batch=32: action='scale' adds no noise: leave it out, or pass action='noise'.",
    ),
    Row(
        lambda: CriticalPhase(action="noise", target_batch=0),
        ValueError,
        "target_batch=0: pass a number of samples above 0.",
    ),
    Row(
        lambda: CriticalPhase(detector=3),  # type: ignore[arg-type]
        TypeError,
        "detector=3: pass a name, or a Detector from a function of lightning_fedscale.phases.",
    ),
    Row(
        lambda: CriticalPhase(detector=phases.accordion(), threshold=0.3),
        ValueError,
        "threshold=0.3: it applies to a detector given by name: pass it to the function that makes the Detector.",
    ),
    Row(
        lambda: _check(StepWatch, detector="federated_gradient_norm"),
        ValueError,
        "detector='federated_gradient_norm': it needs clients: choose another detector, or train by FederatedStrategy.",
    ),
    Row(
        lambda: _check(StepWatch, detector="fisher_trace", noise_every=None),
        ValueError,
        "noise_every=None: detector 'fisher_trace' needs the noise of single samples: pass a number of batches, such as"
        " 200.",
    ),
    Row(
        lambda: _check(StepWatch, scale=phases.adascale(64, 8)),
        ValueError,
        "the scale rule needs the noise of single samples, which is measured only in automatic optimization, on one"
        " device or by DDP: choose another one.",
    ),
    Row(
        lambda: _check(StepWatch, "reweighting", action="noise", target_batch=4),
        ValueError,
        "noise='reweighting': it needs the updates of clients at level='round': choose noise='diagonal'.",
    ),
    Row(
        lambda: _check(RoundWatch, detector="fisher_trace", noise_every=None),
        ValueError,
        "noise_every=None: detector 'fisher_trace' needs the noise of single samples: pass a number of batches, such as"
        " 200.",
    ),
    Row(
        lambda: _check(ClientStepWatch, detector=phases.accordion(accumulate=2)),
        ValueError,
        "level='step': with FederatedStrategy, local steps are judged only by detectors of the gradient norm of single"
        " steps: choose 'page_hinkley', 'relative_change' or accordion(accumulate=1), or level='round'.",
    ),
    Row(
        lambda: _check(ClientStepWatch, action="noise", target_batch=4),
        ValueError,
        "level='step': with FederatedStrategy, action='noise' changes the aggregated update: choose level='round'.",
    ),
    Row(
        lambda: UpdateScaling(torch.optim.Rprop([torch.ones(1, requires_grad=True)])).check(),
        ValueError,
        "action='scale': the steps of Rprop depend on neither the size of gradients nor the learning rate: choose"
        " another optimizer, or action='observe'.",
    ),
    Row(
        lambda: GradientsExpected().missing(25, TRAINER, critical=True),
        UserWarning,
        "CriticalPhase: no gradients were seen in 25 batches, so the phase stays critical=True. If the module trains,"
        " step the optimizers of configure_optimizers; those from self.optimizers(use_pl_optimizer=False) must step"
        " without a closure.",
    ),
    # MaxBatchProbe
    Row(
        lambda: MaxBatchProbe(budget=None),  # type: ignore[arg-type]
        ValueError,
        "budget=None: pass bytes, an amount such as '8GiB', 'auto', or a device class. Known: 'phone', 'old-phone', "
        "'raspberry-pi-5', 'jetson-nano', 'jetson', 'jetson-agx', 'laptop', 't4', 'a100', 'h100'.",
    ),
    Row(lambda: MaxBatchProbe(budget=0), ValueError, "budget=0: pass more than 0 bytes."),
    Row(
        lambda: MaxBatchProbe(budget="jetsen"),
        ValueError,
        "budget='jetsen': pass bytes, an amount such as '8GiB', 'auto', or a device class. Did you mean 'jetson'?"
        f" Known: {', '.join(map(repr, CATALOGUE))}.",
    ),
    Row(
        lambda: MaxBatchProbe(headroom=1.0),
        ValueError,
        "headroom=1.0: pass the share of the budget to leave free, in [0, 1).",
    ),
    Row(
        lambda: MaxBatchProbe(verify="maybe"),  # type: ignore[arg-type]
        ValueError,
        "verify='maybe': choose 'auto', True or False.",
    ),
    Row(
        lambda: MaxBatchProbe(apply="no"),  # type: ignore[arg-type]
        TypeError,
        "apply='no': pass True to set the batch size, False to only report it.",
    ),
    Row(
        lambda: MaxBatchProbe(device_classes="phone"),
        TypeError,
        "device_classes='phone': pass a list, ['phone'].",
    ),
    Row(
        lambda: MaxBatchProbe(make_batch=3),  # type: ignore[arg-type]
        TypeError,
        "make_batch=3: pass a function of the number of samples.",
    ),
    Row(
        lambda: MaxBatchProbe(max_samples=0),
        ValueError,
        "max_samples=0: pass a number of samples, at least 1, or None.",
    ),
    Row(
        lambda: MaxBatchProbe(noise_scale=0),
        ValueError,
        "noise_scale=0: pass a number of samples above 0, or None if unknown.",
    ),
    Row(
        lambda: check_whole_module(TRAINER),
        ValueError,
        "strategy=SimpleNamespace: MaxBatchProbe cannot predict the memory of a module that is divided between"
        " processes: choose a single device, DDP or FederatedStrategy.",
    ),
    Row(
        lambda: _raise(explained(KeyError("mine"))),
        RuntimeError,
        "MaxBatchProbe: a training step on a copy of the module fails (KeyError: 'mine'). Pass make_batch=, a function"
        " of the number of samples that returns a batch for training_step, or remove MaxBatchProbe. With apply=False,"
        " training starts without a probe.",
    ),
    # ComputeAccounting
    Row(
        lambda: ComputeAccounting(max_flops=True),
        ValueError,
        "max_flops=True: pass a number of FLOPs above 0, or None.",
    ),
    Row(lambda: ComputeAccounting(budget=0), ValueError, "budget=0: pass a number of FLOPs above 0, or None."),
    Row(
        lambda: ComputeAccounting(tokens_fn=3),  # type: ignore[arg-type]
        TypeError,
        "tokens_fn=3: pass a function that returns the number of tokens in a batch.",
    ),
    Row(
        lambda: ComputeAccounting(study=3),  # type: ignore[arg-type]
        TypeError,
        "study=3: pass 'auto', the size.json of fedscale size, or None.",
    ),
    Row(
        lambda: ComputeAccounting(study="nowhere/size.json"),
        ValueError,
        "study='nowhere/size.json': it cannot be read ([Errno 2] No such file or directory: 'nowhere/size.json'): pass"
        " the size.json of fedscale size, or None.",
    ),
    Row(
        lambda: TokenCounter(lambda batch: 0).of_batch([]),
        ValueError,
        "tokens_fn returned 0: return a number above 0, the tokens in the batch.",
    ),
    Row(
        lambda: TokenCounter(lambda batch: batch["text"]).of_batch({}),
        ValueError,
        "tokens_fn failed on a batch (KeyError: 'text'): it must accept every batch.",
    ),
    Row(
        lambda: ComputeLimit(1e9).check(TRAINER.lightning_module, UNCOUNTED, OperatorCoverage()),
        ValueError,
        "max_flops=1e+09 is never reached, since the steps of Identity contain no matrix multiplication: pass"
        " max_steps, max_epochs or max_time to the Trainer instead.",
    ),
    Row(
        lambda: _fft().warn_if_incomplete(),
        UserWarning,
        "ComputeAccounting: the FLOPs are underestimated, since operators of unknown cost (aten.fft) take an unknown"
        " part of the time.",
    ),
    # ClientMetrics
    Row(
        lambda: ClientMetrics(clients=1.5),
        ValueError,
        "clients=1.5: pass a fraction in (0, 1], a number of clients, or None for all.",
    ),
    Row(
        lambda: ClientMetrics(personal="yes"),  # type: ignore[arg-type]
        TypeError,
        "personal='yes': pass True, False or None.",
    ),
    Row(
        lambda: ClientMetrics(partitioner=3),  # type: ignore[arg-type]
        TypeError,
        "partitioner=3: pass a name, a Partitioner or a Partition of the validation data.",
    ),
    Row(
        lambda: ClientMetrics(partitioner="iid", dataloaders=[]),
        ValueError,
        "partitioner='iid': with a loader for each client there is nothing to divide: leave it out, or pass a single"
        " loader in dataloaders=.",
    ),
    Row(
        lambda: ClientMetrics(partitioner=IidPartitioner(5, seed=None)),
        ValueError,
        "partitioner: seed=None divides the data differently on every rank and after every restart: pass a partitioner"
        " with a number as its seed.",
    ),
    Row(
        lambda: ClientMetrics(lower_is_better="loss"),
        TypeError,
        "lower_is_better='loss': pass a list of patterns, such as ['*loss*'].",
    ),
    # ServerEMA
    Row(
        lambda: ServerEMA().setup(TRAINER, TRAINER.lightning_module, "fit"),
        TypeError,
        "ServerEMA averages over rounds, but strategy=SimpleNamespace has none: pass"
        " Trainer(strategy=FederatedStrategy(...)), or use Lightning's EMAWeightAveraging.",
    ),
]
