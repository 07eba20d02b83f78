"""Checks for incompatible options, before training starts; errors give the reason."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_fedscale import samplers
from lightning_fedscale.core.executors import SharedTensors
from lightning_fedscale.core.options.algorithm_options import AlgorithmOptions
from lightning_fedscale.core.options.options import Options
from lightning_fedscale.local_rules import LocalRule
from lightning_fedscale.privacy import Privacy
from lightning_fedscale.utils.checks import enumerated


def check_arguments(options: Options) -> None:
    """Check that the arguments are compatible with each other.

    Raises:
        ValueError: with the reason and the remedy.
    """
    algorithm = options.algorithm
    if algorithm.privacy is not None:
        _check_privacy(options, algorithm.privacy)
    if options.asynchrony is not None:
        _check_asynchrony(options)
    if algorithm.ditto is not None and options.keep_optimizers:
        raise ValueError(
            f"personal={algorithm.ditto!r} with client_optimizer='keep': a client trains two models, and one optimizer"
            " state cannot serve both. Use client_optimizer='reset'."
        )
    if algorithm.aggregator.hides_clients:
        reason = "the server would see the buffer of a single client"
        _refuse_policies(algorithm, ("largest",), f"aggregator={algorithm.aggregator.call}", reason)
    if algorithm.local_rule is not None and algorithm.local_rule.sends_message and algorithm.aggregator.sees_all:
        rank_zero_warn(
            f"local_rule={algorithm.local_rule.name!r} with aggregator={algorithm.aggregator.call or 'custom'}: clients"
            " also send a vector of the local rule, which is summed without protection from hostile clients. Use"
            " local_rules.fed_prox(...) if there may be any."
        )


def _refuse_policies(algorithm: AlgorithmOptions, policies: tuple[str, ...], rule: str, reason: str) -> None:
    for pattern, policy in algorithm.buffers:
        if policy in policies:
            raise ValueError(
                f"buffers={{{pattern!r}: {policy!r}}} with {rule}: {reason}. Use 'client', by which each client keeps"
                " its own value, or 'server', by which the initial value stays."
            )


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    if name is None and isinstance(function, partial):
        return _name(function.func)
    return name or type(function).__name__


def _check_privacy(options: Options, privacy: Privacy) -> None:
    algorithm = options.algorithm
    _refuse_policies(
        algorithm, ("mean", "largest"), "privacy", "clients would send the buffer without clipping and noise"
    )
    if algorithm.local_rule is not None and (algorithm.local_rule.sends_message or algorithm.local_rule.needs_sgd):
        raise ValueError(
            f"privacy with local_rule={algorithm.local_rule.name!r}: clients would send values besides their"
            " update without clipping and noise. Use local_rules.fed_prox(...) or no local rule."
        )
    if options.asynchrony is not None:
        raise ValueError(
            "privacy with mode='async': the clients that arrive are not a Poisson sample, so their privacy loss is"
            " unknown. Use mode='sync'."
        )
    wanted = options.clients_per_round
    # As an int, 1 is a single client.
    everybody = wanted is None or wanted == (1.0 if isinstance(wanted, float) else options.num_clients)
    if options.sampler is not samplers.poisson and not everybody:
        raise ValueError(
            f"privacy with sampler={_name(options.sampler)} and clients_per_round={wanted}: the privacy loss is known"
            " if each client takes part independently of the others. Use sampler='poisson', or clients_per_round=None."
        )
    if options.population is not None and (options.population.may_drop or options.population.over_selection > 1):
        raise ValueError(
            "privacy with a population that drops clients: the clients that take part are then not a Poisson sample."
            " Leave out deadline, over_selection and device classes with availability below 1."
        )


def _check_asynchrony(options: Options) -> None:
    rule = options.algorithm.local_rule
    if rule is not None and (rule.sends_message or rule.keeps_state):
        raise ValueError(
            f"local_rule={rule.name!r} with mode='async': a client's correction uses the server's state at its start,"
            " which is outdated when its update arrives. Use fed_prox, fed_nova or no local rule, or mode='sync'."
        )
    if callable(options.local_steps):
        raise ValueError(
            f"local_steps={_name(options.local_steps)} is a function of the round, so that with mode='async' the times"
            " at which clients arrive would depend on later rounds. Pass a number of local steps."
        )
    if options.sampler is not samplers.uniform:
        raise ValueError(
            f"sampler={_name(options.sampler)} with mode='async': it would never be called, since a client that is done"
            " is replaced by one drawn uniformly. Leave sampler out."
        )


def check_model(options: Options, module: nn.Module, shared: SharedTensors) -> None:
    """Check the arguments against the module.

    Raises:
        ValueError: with the reason and the remedy.
    """
    personal = options.algorithm.personal
    _check_buffers(options.algorithm, module, shared)
    if personal and not shared.personal:
        names = [name for name, _ in module.named_parameters()][:3]
        raise ValueError(
            f"personal={list(personal)!r} matches no parameter or buffer: correct the patterns; some of the names are"
            f" {', '.join(map(repr, names))}."
        )
    if personal and not (shared.names or shared.frozen or shared.untouched):
        raise ValueError(
            f"personal={list(personal)!r} matches all parameters, so clients share none: pass fewer patterns."
        )
    if options.algorithm.privacy is not None and (name := _norm_that_learns(options, module, shared)) is not None:
        raise ValueError(
            f"privacy: clients would send the running statistics of {name!r} without clipping. Keep them on the clients"
            f" by personal=['{name}.*'], or use GroupNorm or LayerNorm."
        )


def _check_buffers(algorithm: AlgorithmOptions, module: nn.Module, shared: SharedTensors) -> None:
    names = [*shared.kinds, *_not_there_yet(module)]
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    for pattern, policy in algorithm.buffers:
        given = f"buffers={{{pattern!r}: {policy!r}}}"
        may_match = [*names, *frozen] if policy == "mean" else names
        matching = [name for name in may_match if fnmatchcase(name, pattern)]
        if not matching:
            close = get_close_matches(pattern.strip("*."), names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = f"The names are {enumerated(names)}" if names else "The module has none"
            raise ValueError(f"{given} matches no buffer.{hint} {known}: correct the pattern or leave it out.")
        both = [name for name in matching if any(fnmatchcase(name, own) for own in algorithm.personal)]
        if both and policy != "client":
            raise ValueError(
                f"{given} and personal={list(algorithm.personal)!r} both match {both[0]!r}: change one of the patterns."
            )


def _not_there_yet(module: nn.Module) -> list[str]:
    """Return the names of buffers that are None until training fills them."""
    parts = [(f"{path}." if path else "", part) for path, part in module.named_modules()]
    return [prefix + name for prefix, part in parts for name, buffer in part._buffers.items() if buffer is None]


def _norm_that_learns(options: Options, module: nn.Module, shared: SharedTensors) -> str | None:
    own = {id(tensor) for tensor in shared.personal.values()}
    for name, part in module.named_modules():
        mean = part.running_mean if isinstance(part, nn.modules.batchnorm._NormBase) else None
        asked = options.algorithm.buffer_policies.chosen([f"{name}.running_mean" if name else "running_mean"])
        if mean is not None and id(mean) not in own and asked != "server":
            return str(name)
    return None


def check_optimizers(options: Options, module: torch.nn.Module, optimizers: list[Optimizer]) -> None:
    """Check that the local rule supports the optimizers.

    Raises:
        ValueError: with the reason and the remedy.
    """
    rule = options.algorithm.local_rule
    if rule is None or not (rule.needs_sgd or rule.needs_gradient):
        return
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"local_rule={rule.name!r} needs the gradients and steps of automatic optimization, and this module has"
            " automatic_optimization=False: use automatic optimization, or local_rules.fed_prox(mu=0.01)."
        )
    reason = _why_unknown(rule, optimizers) if rule.needs_sgd else None
    if reason is not None:
        momentum = "SGD, with or without momentum" if rule.knows_momentum else "plain SGD"
        instead = f"{rule.instead}, or " if rule.instead else ""
        raise ValueError(
            f"local_rule={rule.name!r} computes a client's mean gradient from its steps, but {reason}: use {instead}"
            f"torch.optim.SGD ({momentum}) with one learning rate."
        )


def _why_unknown(rule: LocalRule, optimizers: list[Optimizer]) -> str | None:
    if len(optimizers) > 1:
        return f"there are {len(optimizers)} optimizers"
    if type(optimizers[0]) is not SGD:
        return f"steps of {type(optimizers[0]).__name__} are not multiples of gradients"
    groups = optimizers[0].param_groups
    if len({(float(group["lr"]), float(group["momentum"])) for group in groups}) > 1:
        return "parameter groups have different learning rates or momenta"
    if any(group["dampening"] or group["nesterov"] for group in groups):
        return "it does not support dampening and Nesterov momentum"
    if groups[0]["momentum"] and not rule.knows_momentum:
        return f"with momentum={groups[0]['momentum']:g} steps also have earlier gradients"
    return None


def warn_of_lost_errors(options: Options, num_clients: int, cohort: int, rounds: int) -> None:
    """Warn if most clients take part only once, so that error feedback is of no use."""
    compressor = options.algorithm.compressor
    if compressor is not None and compressor.keeps_error and 0 < rounds * cohort < 2 * num_clients:
        rank_zero_warn(
            f"compressor={compressor.name}: a client adds its compression error to its next update, but with {cohort}"
            f" of {num_clients} clients in each of {rounds} rounds most clients take part only once, and their errors"
            " are lost. Use an unbiased compressor (qsgd, random_k), which needs no error feedback."
        )
