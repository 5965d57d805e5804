"""Members of a grouped network against the same network run on each member's samples alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medfl_ray.config.model import ModelConfig
from medfl_ray.models.catalogue import build_network
from medfl_ray.models.grouped import group, repeat_weights, stack, unstack, why_not_grouped

MEMBERS, SAMPLES = 3, 2
GROUPABLE = ["unet2d", "basic_unet", "segresnet", "dynunet", "attention_unet", "densenet"]


class Everything(nn.Module):
    """One of each layer that has a grouped form."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding="same", bias=False),
            nn.InstanceNorm2d(4, affine=True),
            nn.PReLU(),
            nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, dilation=1),
            nn.GroupNorm(2, 8),
            nn.PReLU(8),
            nn.GroupNorm(2, 8, affine=False),
            nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


def largest_difference(network: nn.Module, patch: tuple[int, ...], channels: int) -> float:
    """Largest error of any member's gradient, relative to that gradient's norm; also checks the outputs."""
    network = network.double()
    images = list(torch.randn(MEMBERS, SAMPLES, channels, *patch, dtype=torch.float64))
    members = group(network, MEMBERS)
    outputs = unstack(members(stack(images)), MEMBERS)
    grouped = torch.autograd.grad(sum(out.square().mean() for out in outputs), list(members.parameters()))
    worst = 0.0
    for index, image in enumerate(images):
        expected = network(image)
        assert torch.allclose(outputs[index], expected, atol=1e-10)
        gradient = torch.autograd.grad(expected.square().mean(), list(network.parameters()))
        norm = torch.cat([part.flatten() for part in gradient]).norm()
        error = torch.cat([(mine[index] - part).flatten() for mine, part in zip(grouped, gradient, strict=True)]).norm()
        worst = max(worst, (error / norm).item())
    return worst


@pytest.mark.parametrize("name", GROUPABLE)
@pytest.mark.parametrize("norm", ["group", "instance"])
def test_gradients_of_the_catalogue(name: str, norm: str) -> None:
    features = (4,) * 5 if name == "basic_unet" else (4, 8)
    model = ModelConfig.model_validate({"type": name, "features": features, "norm": norm})
    network = build_network(model, 2, 2, 3, True, (32, 32))
    assert why_not_grouped(network) == ""
    assert largest_difference(network, (32, 32), 2) < 1e-10


def test_gradients_in_three_dimensions() -> None:
    network = build_network(ModelConfig(features=(4, 8)), 3, 2, 3, True, (8, 8, 8))
    assert largest_difference(network, (8, 8, 8), 2) < 1e-10


def test_every_kind_of_layer() -> None:
    assert why_not_grouped(Everything()) == ""
    assert largest_difference(Everything(), (8, 8), 1) < 1e-10
    assert largest_difference(nn.Conv2d(1, 2, 3), (8, 8), 1) < 1e-10


def test_members_can_drift_apart_and_come_back() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2))
    members = group(network, MEMBERS)
    with torch.no_grad():
        for number, parameter in enumerate(members.parameters()):
            parameter[1] += 1.0 + number
    image = torch.randn(1, 1, 8, 8)
    first, second, third = unstack(members(stack([image] * MEMBERS)), MEMBERS)
    assert torch.equal(first, third)
    assert not torch.allclose(first, second)
    repeat_weights(network, members)
    assert all(torch.allclose(out, network(image), atol=1e-6) for out in unstack(members(stack([image] * 3)), 3))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (build_network(ModelConfig(type="unetr", features=(4, 8)), 2, 1, 2, False, (32, 32)), "no grouped form"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "'reflect'"),
        (nn.InstanceNorm2d(1, affine=True, track_running_stats=True), "running statistics"),
    ],
)
def test_networks_without_a_grouped_form(network: nn.Module, reason: str) -> None:
    assert reason in why_not_grouped(network)
