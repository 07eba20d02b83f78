"""Parameters that are not ordinary: frozen, followed by a target network, tied, complex."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.features import local_loops
from tests.features.local_loops import Model, check, parameters


class Frozen(Model):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(12, 12).requires_grad_(False)
        self.net[0].bias.requires_grad_(False)

    def extra(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def test_frozen_parameters_stay_bit_equal_and_do_not_travel() -> None:
    before, after, trainer = check(Frozen)
    for name in ("backbone.weight", "backbone.bias", "net.0.bias"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["net.0.weight"], after["net.0.weight"])
    travels = parameters(before) - before["net.0.bias"].numel()
    assert trainer.strategy.last_round.upload_bytes == 2 * 4 * travels  # type: ignore[attr-defined]


class Target(Model):
    """A frozen target network that follows the trained one, as in BYOL."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(12, 16).requires_grad_(False)

    def extra(self, batch: list[Tensor]) -> Tensor | float:
        with torch.no_grad():
            for target, online in zip(self.target.parameters(), self.net[0].parameters(), strict=True):
                target.mul_(0.9).add_(online, alpha=0.1)
        return (self.net[0](batch[0]) - self.target(batch[0])).square().mean()


class ReplacedTarget(Target):
    """The same by assignment to ``.data``, as published code has it."""

    def extra(self, batch: list[Tensor]) -> Tensor | float:
        for target, online in zip(self.target.parameters(), self.net[0].parameters(), strict=True):
            target.data = target.data * 0.9 + online.data * 0.1
        return (self.net[0](batch[0]) - self.target(batch[0])).square().mean()


class Copied(Target):
    """A hard copy that shares memory with what it copies."""

    def extra(self, batch: list[Tensor]) -> Tensor | float:
        self.target.weight.data = self.net[0].weight.data  # type: ignore[assignment]
        return 0.0


@pytest.mark.parametrize("kind", [Target, ReplacedTarget])
def test_a_target_network_is_aggregated(kind: type[Model]) -> None:
    before, after, _ = check(kind)
    assert float((before["target.weight"] - after["target.weight"]).abs().max()) > 1e-2


def test_memory_that_a_client_made_two_tensors_share_is_two_again() -> None:
    module = local_loops.make(Copied)
    local_loops.fit(module, 2)
    assert module.target.weight.data_ptr() != module.net[0].weight.data_ptr()
    assert torch.allclose(module.target.weight, module.net[0].weight)


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, 12, bias=False)
        self.embedding.weight = nn.Parameter(torch.randn(12, 16) * 0.1)
        self.decoder = nn.Linear(16, 12, bias=False)
        self.decoder.weight = self.embedding.weight

    def extra(self, batch: list[Tensor]) -> Tensor:
        hidden = torch.tanh(batch[0] @ self.embedding.weight)
        return (self.decoder(hidden) - batch[0]).square().mean()


def test_tied_parameters_stay_tied_and_travel_once() -> None:
    before, after, trainer = check(Tied)
    assert torch.equal(after["embedding.weight"], after["decoder.weight"])
    module = trainer.lightning_module
    assert module.embedding.weight is module.decoder.weight  # type: ignore[union-attr]
    assert not torch.equal(before["decoder.weight"], after["decoder.weight"])
    assert trainer.strategy.last_round.upload_bytes == 2 * 4 * (parameters(before) + 12 * 16)  # type: ignore[attr-defined]


class Complex(Model):
    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(12, dtype=torch.complex64))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))

    def extra(self, batch: list[Tensor]) -> Tensor:
        self.phase += torch.view_as_complex(batch[0][:, :4].mean(0).reshape(2, 2))
        return (torch.fft.fft(batch[0]) * self.spectrum).abs().square().mean() * 0.01


def test_complex_parameters_and_buffers() -> None:
    before, after, trainer = check(Complex)
    assert float((before["spectrum"] - after["spectrum"]).imag.abs().max()) > 1e-3
    assert trainer.strategy.last_round.upload_bytes == 2 * (4 * parameters(before) + 8 * 14)  # type: ignore[attr-defined]
