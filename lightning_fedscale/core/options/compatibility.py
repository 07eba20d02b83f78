"""Checks for incompatible options, before training starts; errors give the reason."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

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
            "personal=Ditto(...) with client_optimizer='keep': which of its two models would a client's optimizer"
            " belong to? Use client_optimizer='reset'."
        )
    if algorithm.aggregator.hides_clients:
        reason = "the server would see what one client sends"
        _refuse_policies(algorithm, ("largest",), f"aggregator={algorithm.aggregator.call}", reason)
    if algorithm.local_rule is not None and algorithm.local_rule.sends_message and algorithm.aggregator.sees_all:
        rank_zero_warn(
            f"local_rule={algorithm.local_rule.name!r}: its second vector is summed plainly, so hostile clients reach"
            " the server through it whatever the aggregator does."
        )


def _refuse_policies(algorithm: AlgorithmOptions, policies: tuple[str, ...], rule: str, reason: str) -> None:
    for pattern, policy in algorithm.buffers:
        if policy in policies:
            raise ValueError(
                f"buffers={{{pattern!r}: {policy!r}}} with {rule}: {reason}. Use 'client', which keeps it there, or"
                " 'server', which keeps what the module was built with."
            )


def _check_privacy(options: Options, privacy: Privacy) -> None:
    algorithm = options.algorithm
    _refuse_policies(algorithm, ("mean", "largest"), "privacy", "it would leave the clients neither clipped nor noised")
    if algorithm.local_rule is not None and (algorithm.local_rule.sends_message or algorithm.local_rule.needs_sgd):
        raise ValueError(
            f"privacy with local_rule={algorithm.local_rule.name!r}: what the rule sends beside the update is neither"
            " clipped nor noised. Use local_rules.fed_prox(...) or none."
        )
    if options.asynchrony is not None:
        raise ValueError(
            "privacy with mode='async': who arrives is no Poisson sample, and nothing is known of what that costs. Use"
            " mode='sync'."
        )
    wanted = options.clients_per_round
    # As an int, 1 is a single client.
    everybody = wanted is None or wanted == (1.0 if isinstance(wanted, float) else options.num_clients)
    if options.sampler is not samplers.poisson and not everybody:
        raise ValueError(
            f"privacy with sampler={options.sampler!r}: the accounting holds where each client takes part independently"
            " of the others. Use sampler='poisson', or all clients in every round."
        )
    if options.population is not None and (options.population.may_drop or options.population.over_selection > 1):
        raise ValueError(
            "privacy with a population that drops clients: who takes part is then no Poisson sample. Leave out"
            " deadline, over_selection and device classes with availability below 1."
        )


def _check_asynchrony(options: Options) -> None:
    rule = options.algorithm.local_rule
    if rule is not None and (rule.sends_message or rule.keeps_state):
        raise ValueError(
            f"local_rule={rule.name!r} with mode='async': its correction is made of the server's state when a client"
            " starts, which has moved on when it arrives. Use fed_prox, fed_nova or none, or mode='sync'."
        )
    if callable(options.local_steps):
        raise ValueError(
            "local_steps as a function of the round with mode='async': when clients arrive would depend on rounds that"
            " are yet to come. Pass a number."
        )
    if options.sampler is not samplers.uniform:
        raise ValueError(
            f"sampler={options.sampler!r} with mode='async': whoever is done is replaced by a client drawn uniformly."
            " Leave the sampler out."
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
            f"personal={list(personal)!r} matches no parameter or buffer; their names are like"
            f" {', '.join(map(repr, names))}."
        )
    if personal and not shared.names and not shared.frozen:
        raise ValueError(f"personal={list(personal)!r} matches all parameters: nothing is left to be shared.")
    if options.algorithm.privacy is not None and (name := _norm_that_learns(options, module, shared)) is not None:
        raise ValueError(
            f"privacy: the running statistics of {name!r} would leave the clients unclipped. Keep them there, personal="
            f"['{name}.*'], or use GroupNorm or LayerNorm."
        )


def _check_buffers(algorithm: AlgorithmOptions, module: nn.Module, shared: SharedTensors) -> None:
    names = [*shared.kinds, *_not_there_yet(module)]
    for pattern, policy in algorithm.buffers:
        given = f"buffers={{{pattern!r}: {policy!r}}}"
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            close = get_close_matches(pattern.strip("*."), names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = f"The names are {enumerated(names)}" if names else "The module has none"
            raise ValueError(f"{given} matches no buffer.{hint} {known}: correct the pattern or leave it out.")
        both = [name for name in matching if any(fnmatchcase(name, own) for own in algorithm.personal)]
        if both and policy != "client":
            raise ValueError(
                f"{given} and personal={list(algorithm.personal)!r} both decide about {both[0]!r}: let only one of them"
                " match it."
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
            f"local_rule={rule.name!r} needs the gradient of the loss that training_step returns, and in manual"
            " optimization nobody knows it or the steps: use local_rules.fed_prox(mu=0.01), or automatic optimization."
        )
    reason = _why_unknown(rule, optimizers) if rule.needs_sgd else None
    if reason is not None:
        momentum = "SGD, with or without momentum" if rule.knows_momentum else "plain SGD"
        instead = f"{rule.instead}, or " if rule.instead else ""
        raise ValueError(
            f"local_rule={rule.name!r} reads the clients' mean gradient off their steps, and {reason}: use {instead}"
            f"torch.optim.SGD ({momentum}) with one learning rate."
        )


def _why_unknown(rule: LocalRule, optimizers: list[Optimizer]) -> str | None:
    if len(optimizers) > 1:
        return f"there are {len(optimizers)} optimizers"
    if type(optimizers[0]) is not SGD:
        return f"those of {type(optimizers[0]).__name__} are no multiples of gradients"
    groups = optimizers[0].param_groups
    if len({(float(group["lr"]), float(group["momentum"])) for group in groups}) > 1:
        return "groups of parameters have unequal learning rates or momenta"
    if any(group["dampening"] or group["nesterov"] for group in groups):
        return "dampening and Nesterov's momentum are not known to it"
    if groups[0]["momentum"] and not rule.knows_momentum:
        return f"with momentum={groups[0]['momentum']:g} they are longer than that"
    return None


def warn_of_lost_errors(options: Options, num_clients: int, cohort: int, rounds: int) -> None:
    """Warn if most clients take part only once, so that error feedback is of no use."""
    compressor = options.algorithm.compressor
    if compressor is not None and compressor.keeps_error and 0 < rounds * cohort < 2 * num_clients:
        rank_zero_warn(
            f"compressor={compressor.name}: what a client did not send waits until it takes part again, and with"
            f" {cohort} of {num_clients} clients in each of {rounds} rounds most do not come back: what waits is lost."
            " An unbiased compressor (qsgd, random_k) needs no error feedback."
        )
