"""The quick layers give PyTorch's own values and gradients, ties and odd edges included."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.basic_unet import BasicUNet, UpCat
from torch import nn

from medfl_ray.models.quick_layers import HalvingMaxPool, LinearUpsample, leave_out_idle, quicken

SHAPES = [(3, 4, 9, 8), (2, 3, 8, 7, 6), (1, 2, 2, 3)]


def gradient(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    return out.detach(), torch.autograd.grad(out, x, weights)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_halving_takes_the_first_of_equal_voxels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).relu().round()  # full of ties
    original = nn.MaxPool2d(2) if len(shape) == 4 else nn.MaxPool3d(2)
    for ours, theirs in zip(gradient(HalvingMaxPool(len(shape) - 2), x), gradient(original, x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [2, 3])
def test_interpolation_equals_the_original(shape: tuple[int, ...], align_corners: bool, scale: int) -> None:
    torch.manual_seed(0)
    mode = "bilinear" if len(shape) == 4 else "trilinear"
    original = nn.Upsample(scale_factor=scale, mode=mode, align_corners=align_corners)
    x = torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(gradient(LinearUpsample(original), x), gradient(original, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [16, 18, 24])
def test_a_quick_network_computes_the_same(size: int) -> None:
    torch.manual_seed(0)
    features = (4, 4, 8, 8, 8, 4)
    network = BasicUNet(2, 1, 2, features, norm=("group", {"num_groups": 2}), upsample="nontrainable").double()
    x = torch.randn(2, 1, size, size, dtype=torch.float64)
    expected = network(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    names = list(network.state_dict())
    quick = quicken(network)
    out = quick(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out.square().sum(), list(quick.parameters()))
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert names == list(quick.state_dict())
    kinds = {type(module) for module in quick.modules()}
    assert {HalvingMaxPool, LinearUpsample} <= kinds
    assert not {nn.MaxPool2d, nn.Upsample} & kinds


def test_an_odd_edge_is_still_padded() -> None:
    network = quicken(BasicUNet(2, 1, 2, (4, 4, 4, 4, 4, 4), norm=("group", {"num_groups": 2})))
    block = next(module for module in network.modules() if isinstance(module, UpCat))
    network(torch.zeros(1, 1, 16, 16))
    assert not block.is_pad
    assert network(torch.zeros(1, 1, 17, 18)).shape[2:] == (17, 18)


def test_other_pools_are_left_alone() -> None:
    network = nn.Sequential(
        nn.MaxPool2d(3), nn.MaxPool2d(2, stride=1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2)
    )
    before = list(network)
    assert list(quicken(network)) == before


class RampsUp(nn.Module):
    """A user's network that reads and raises the probability of its dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.0), nn.Conv2d(4, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = min(0.9, module.p + 0.9)
        out: torch.Tensor = self.layers(x)
        return out


def test_dropout_stays_where_a_users_class_may_change_it() -> None:
    network = leave_out_idle(RampsUp().train())
    x = torch.ones(1, 1, 8, 8)
    assert not torch.equal(network(x), network(x))
    assert not any(isinstance(module, nn.Dropout) for module in leave_out_idle(RampsUp().layers).modules())
