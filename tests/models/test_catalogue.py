"""Every network of the catalogue is fit for DP, or says in one sentence why it cannot be built."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from medfl_ray.config.model import ModelConfig
from medfl_ray.errors import ModelError
from medfl_ray.models.catalogue import CATALOGUE, build_network, smallest_size
from medfl_ray.models.fitness import check_fit_for_dp, unused_parameters
from medfl_ray.models.norms import num_groups_for
from medfl_ray.params import flatten, layout_of, load_into

SLOW = {("swin_unetr", 3), ("unetr", 3), ("basic_unet", 3)}
EVERY = [
    pytest.param(name, dims, norm, marks=[pytest.mark.ci] if (name, dims) in SLOW else [])
    for name, entry in CATALOGUE.items()
    for dims in entry.spatial_dims
    for norm in ("group", "instance")
]


def test_schema_and_catalogue_have_the_same_networks() -> None:
    names = get_args(ModelConfig.model_fields["type"].annotation)
    assert names == (*CATALOGUE, "custom", "bundle")


def model_of(name: str, norm: str = "group", **fields: object) -> ModelConfig:
    features = (12,) if name == "swin_unetr" else (8, 16, 32)
    return ModelConfig.model_validate({"type": name, "norm": norm, "features": features, **fields})


def patch_of(model: ModelConfig, dims: int) -> tuple[int, ...]:
    return smallest_size(model, dims, (32,) * dims)


@pytest.mark.parametrize(("name", "dims", "norm"), EVERY)
def test_builds_fit_for_dp(name: str, dims: int, norm: str) -> None:
    model = model_of(name, norm)
    patch = patch_of(model, dims)
    network = build_network(model, dims, 2, 3, True, patch)
    image = torch.randn(2, 2, *patch)
    output = network(image)
    assert output.shape == ((2, 3) if name == "densenet" else (2, 3, *patch))
    output.square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    assert set(layout_of(network).names) == set(gradients)
    assert not any(getattr(module, "inplace", False) for module in network.modules())


@pytest.mark.parametrize("name", ["unet2d", "dynunet", "densenet"])
def test_weights_go_out_and_come_back(name: str) -> None:
    model = model_of(name)
    network, other = (build_network(model, 2, 1, 2, False, (32, 32)) for _ in range(2))
    load_into(other, flatten(network))
    image = torch.randn(1, 1, 32, 32)
    assert torch.equal(network.eval()(image), other.eval()(image))


def test_group_norm_divides_every_width() -> None:
    network = build_network(model_of("segresnet", features=(6, 12, 24)), 2, 1, 2, True, (32, 32))
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert all(module.num_channels % module.num_groups == 0 for module in norms)


def test_groups_hold_four_channels_at_least() -> None:
    widths = {1: 1, 4: 1, 6: 1, 8: 2, 12: 3, 20: 5, 32: 8, 36: 6, 64: 8, 100: 5}
    assert {width: num_groups_for(width) for width in widths} == widths


def test_attention_unet_lost_its_batch_norm() -> None:
    network = build_network(model_of("attention_unet"), 2, 1, 2, True, (32, 32))
    assert not any("BatchNorm" in type(module).__name__ for module in network.modules())


def test_unetr_lost_what_takes_no_part() -> None:
    network = build_network(model_of("unetr"), 2, 1, 2, True, (32, 32))
    assert unused_parameters(network, torch.zeros(1, 1, 32, 32)) == []
    check_fit_for_dp(network, torch.zeros(2, 1, 32, 32))


def test_dropout_reaches_the_network() -> None:
    network = build_network(model_of("unet2d", dropout=0.5), 2, 1, 2, True, (32, 32))
    assert any(isinstance(module, nn.Dropout2d | nn.Dropout) and module.p == 0.5 for module in network.modules())


@pytest.mark.parametrize(
    ("model", "dims", "patch", "message"),
    [
        (model_of("unet2d"), 2, (30, 32), r"multiples of 4 voxels.*nearest that fits is \[32, 32\]"),
        (model_of("unet2d"), 2, (32, 32, 32), "has 3 values; the network has 2"),
        (model_of("unet3d"), 2, (32, 32), "3 spatial dimensions and the data 2"),
        (model_of("segresnet", features=(8, 24)), 2, (32, 32), r"set model.features to \[8, 16\]"),
        (model_of("swin_unetr", features=(8,)), 2, (32, 32), "multiple of 12"),
        (model_of("unetr", features=(8, 30)), 2, (32, 32), "attention heads"),
        (model_of("basic_unet", features=(8,) * 7), 2, (32, 32), "at most 6 levels"),
        (model_of("unet2d", norm="instance"), 2, (4, 4), "more than one voxel at the lowest level"),
    ],
)
def test_refusals_say_what_to_change(model: ModelConfig, dims: int, patch: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_network(model, dims, 1, 2, True, patch)
